# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The result of an arm with one seed, as JSON: what went through the encoder, what probes and questions found."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ...convert.storage.files import read_json, replace_text
from ...evaluate.probe.files import RESULTS
from .answers import CATEGORIES
from .arms import ARMS, SINGLE
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
TRANSFER = ("connector", "language")  # the runs of a transfer, named after what is trained first in each
HEADS = {"linear": "linear", "mlp": "MLP", "knn": "kNN", "whitened_knn": "whitened kNN"}  # name -> for tables
Result = Mapping[str, Any]
Results = Mapping[str, Mapping[int, Result]]  # arm -> seed -> result
FIELDS = {"arm": str, "seed": int, "setting": str, "pictures": int, "tiles_seen": int, "probes": dict, "answers": dict,
          "transfer": dict}  # fmt: skip
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


# Reading


def read_results(folder: Path) -> Results:
    """
    Return the results in a folder, in the order of ARMS and of the seeds.

    Args:
        folder: With NAME/results/ARM.json, a NAME for every seed.

    Raises:
        ValueError: There are none, one is not as `write_result` writes it, two are of the same arm and seed, or not all
            of the same setting and language models.
    """
    read = {path: _read_result(path) for path in sorted(folder.glob("*/results/*.json"))}
    if not read:
        raise ValueError(
            f"{folder}: no results: expected seed-N/results/ARM.json, which `sailvit miniature --arms` writes"
        )
    _check_same({path: result["setting"] for path, result in read.items()}, "setting")
    languages = {path: ", ".join(sorted(result["transfer"])) for path, result in read.items() if result["transfer"]}
    _check_same(languages, "set of language models for transfer")
    found: dict[str, dict[int, Path]] = {name: {} for name in ARMS}
    for path, result in read.items():
        before = found[result["arm"]].setdefault(result["seed"], path)
        if before != path:
            same = f"{result['arm']} with seed {result['seed']}"
            raise ValueError(f"{path}: expected one result of {same}, got another one in {before}: remove one")
    return {arm: {seed: read[seeds[seed]] for seed in sorted(seeds)} for arm, seeds in found.items() if seeds}


def list_entries(result: Result) -> dict[str, Mapping[str, Any]]:
    """Return "probes/SET/HEAD", "answers/CATEGORY", "transfer/LANGUAGE/RUN/CATEGORY" -> its entry in a result."""
    groups = {f"probes/{name}": heads for name, heads in result["probes"].items()} | {"answers": result["answers"]}
    for language, runs in result["transfer"].items():
        groups |= {f"transfer/{language}/{run}": answers for run, answers in runs.items()}
    return {f"{group}/{name}": one for group, entries in groups.items() for name, one in entries.items()}


def _read_result(path: Path) -> Result:
    result = read_json(path)
    arm, seed = result.get("arm"), result.get("seed")
    if wrong := [name for name, kind in FIELDS.items() if type(result.get(name)) is not kind] or _wrong_entries(result):
        raise ValueError(f"{path}: expected a result with {wrong[0]}: remove it, and the same command writes it anew")
    if arm not in ARMS:
        raise ValueError(f"{path}: expected one of the arms {', '.join(ARMS)}, got {arm!r}: remove it")
    if seed < 0 or (ARMS[arm].single and seed != SINGLE):
        expected = f"seed {SINGLE}, the only one of {arm}" if ARMS[arm].single else "a seed from 0"
        raise ValueError(f"{path}: expected {expected}, got {seed}: remove it")
    return result


def _wrong_entries(result: Result) -> list[str]:
    """Return what is missing in the entries of a result, or is not as `write_result` writes it."""
    try:
        found = list_entries(result)
        answers = {name: one for name, one in found.items() if not name.startswith("probes/")}
        shares = {f"{name}: accuracy": one["accuracy"] for name, one in found.items()}
        for name, one in answers.items():
            shares[f"{name}: accuracy_with_another_picture"] = one["accuracy_with_another_picture"]
        wrong = [name for name, share in shares.items() if not 0 <= share <= 1]
        wrong += [f"{name}: right" for name, one in answers.items() if {*one["right"]} - {*"01 "}]
        runs = {f"transfer/{language}/{run}" for language, run in product(result["transfer"], TRANSFER)}
        expected = {*runs, *({"answers"} if result["answers"] else ())}
        return wrong + [name for name in sorted(map("/".join, product(expected, CATEGORIES))) if name not in answers]
    except (AttributeError, KeyError, TypeError):
        return ["probes, answers and transfer as `sailvit miniature` writes them"]


def _check_same(values: Mapping[Path, str], what: str) -> None:
    """Raise ValueError if results differ in something."""
    first: dict[str, Path] = {}
    for path, value in values.items():
        first.setdefault(value, path)
    if len(first) > 1:
        described = " and ".join(f"{value} ({path})" for value, path in first.items())
        raise ValueError(f"expected results of one {what}, got {described}: remove those of the other")
