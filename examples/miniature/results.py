# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The result of an arm with one seed, as JSON: what went through the encoder, what probes and questions found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...convert.storage.files import replace_text
from ...evaluate.probe.files import RESULTS
from .arms import ARMS
from .setting import Setting
from .world import PROBE_SETS, TEXT


def _group_by_training() -> dict[str, list[str]]:
    """Return training set -> probe sets; one without a training set is tested with the heads of `objects`."""
    groups: dict[str, list[str]] = {}
    for name, probe_set in PROBE_SETS.items():
        groups.setdefault(name if "train" in probe_set.splits else "objects", []).append(name)
    return groups


PROBES = _group_by_training()
SETS = [name for sets in PROBES.values() for name in sets]
HEADS = {"linear": "linear", "mlp": "MLP", "knn": "kNN", "whitened_knn": "whitened kNN"}  # name -> for tables
RUN_FIELDS = ("recipe", "data", "samples_seen", "tiles_seen", "precision", "loss", "hours", "torch", "transformers")


def write_result(
    out: Path, arm: str, setting: Setting, runs: Mapping[str, Sequence[Path]], folder: Path,
    transfers: Mapping[str, Sequence[Path]],
) -> None:  # fmt: skip
    """
    Write the result of an arm.

    Args:
        out: The JSON file.
        arm: Its name.
        setting: Of the miniature.
        runs: "pretraining" and "stages": the runs that made the encoder.
        folder: Of the miniature, with probe/ and answers/.
        transfers: Language model -> runs; left out unless all of them have answered.
    """
    described = {name: [_describe_run(run) for run in own] for name, own in runs.items()}
    result: dict[str, Any] = {"arm": arm, "seed": setting.world.seed, "setting": setting.title}
    result |= {name: sum(run[name] for run in described["stages"]) for name in ("pictures", "tiles_seen")}
    result["probes"] = {}
    for train in PROBES:
        result["probes"] |= _read_probe(folder / "probe" / arm / train / RESULTS, train)
    answers = folder / "answers"
    result["answers"] = _read_answers(answers / f"{arm}.json") if ARMS[arm].has_language else {}
    files = {run: answers / f"{run.parent.name}-{run.name}.json" for own in transfers.values() for run in own}
    finished = transfers if all(path.exists() for path in files.values()) else {}
    result["transfer"] = {
        language: {run.name: _read_answers(files[run]) for run in own} for language, own in finished.items()
    }
    made = [_describe_run(run) for own in finished.values() for run in own]
    result["runs"] = {**described, "transfer": made}
    replace_text(out, json.dumps(result, indent=1) + "\n")


def describe_probe(content: Mapping[str, Any], train: str) -> str:
    """Return the accuracies of a probe, a line for each test set."""
    lines = []
    for name, heads in _by_set(content, train).items():
        accuracies = [f"{head} {entry['accuracy']:.3f}" for head, entry in heads.items()]
        lines.append(f"{name}: {', '.join(accuracies)}")
    return "\n".join(lines)


def _describe_run(run: Path) -> dict[str, Any]:
    """Return what the record of a finished run says about its last stage, and the pictures that it has seen."""
    stage = json.loads((run / "training.json").read_text("utf-8"))["training"]["stages"][-1]
    kinds = dict(kind.rsplit(" ", 1) for kind in stage["kinds"])
    text = int(kinds.get(TEXT, 0))
    if text and stage["samples_seen"] != stage["data_samples"]:
        raise ValueError(f"{run}: expected one epoch of {stage['data_samples']} samples, got {stage['samples_seen']}")
    pictures = stage["samples_seen"] - text
    return {"run": run.name, "pictures": pictures, **{name: stage[name] for name in RUN_FIELDS}}


def _read_probe(path: Path, train: str) -> dict[str, dict[str, Any]]:
    return _by_set(json.loads(path.read_text("utf-8")), train)


def _by_set(content: Mapping[str, Any], train: str) -> dict[str, dict[str, Any]]:
    """Return probe set -> head -> accuracy, its interval over the pictures, and their number."""
    found: dict[str, dict[str, Any]] = {}
    for entry in content["results"]:
        name = Path(entry["test"]).parent.name or train  # .../NAME/test, or "test" where it is the only one
        found.setdefault(name, {})[entry["head"]] = {key: entry[key] for key in ("accuracy", "low", "high", "n")}
    return found


def _read_answers(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
