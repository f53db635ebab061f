# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run is and what it has seen: to recognise it when it goes on, and for the stages of its model's record."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.storage.checkpoint import Checkpoint
from ..convert.storage.sources import public_name
from ..convert.storage.training_record import read_training
from .cache import content_hash, hash_of
from .log import LOG, read_lines


if TYPE_CHECKING:
    from .packing import PackedBatches
    from .recipe import Recipe

# Fields of a recipe that may change when a run goes on: they change no step.
OPERATIONAL = {
    "name", "description", "model", "data", "output", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "peak_tflops", "workers", "max_hours", "gradient_checkpointing", "kinds", "timeout_minutes", "language_parameters",
}  # fmt: skip
PACKAGES = ("sailvit", "torch", "transformers", "accelerate", "deepspeed")
SUMS = ("samples", "tokens", "answer_tokens", "tiles")  # of log.jsonl


# What a run is


def settings_of(recipe: "Recipe") -> dict[str, Any]:
    """Return the fields of a recipe that the weights depend on."""
    return {name: value for name, value in recipe.model_dump().items() if name not in OPERATIONAL}


def identity(recipe: "Recipe", batches: "PackedBatches", source: Checkpoint, engine: str) -> dict[str, Any]:
    """
    Return what must be the same when a run goes on.

    ZeRO cannot load a checkpoint on another number of ranks; other engines can.
    """
    cache = batches.corpus.cache_dir
    hashes = {file: content_hash(source.source.path(file), cache) for file in source.files}
    weights = hash_of([hashes, source.document("config.json")])
    ranks = {"ranks": batches.ranks} if engine.startswith("zero") else {}
    fixed = {"data": batches.corpus.fingerprint, "model": weights, "engine": engine, **ranks}
    return {"recipe": settings_of(recipe), **fixed}


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the entries of two identities that differ: "seed: 0 in the run, 1 now"."""
    shared = recorded.keys() & current.keys()  # the engine that runs counts, not the "auto" of the recipe
    recipes = (recorded.get("recipe", {}), current["recipe"])
    pairs = [tuple({k: value for k, value in recipe.items() if k not in shared} for recipe in recipes)]
    pairs.append(({**recorded, "recipe": None}, {**current, "recipe": None}))
    found = []
    for before, now in pairs:
        before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
        names = dict.fromkeys([*before, *now])
        found += [name for name in names if before.get(name) != now.get(name) and name in ("data", "model")]
        found += [
            f"{name}: {json.dumps(before.get(name))} in the run, {json.dumps(now.get(name))} now"
            for name in names
            if before.get(name) != now.get(name) and name not in ("data", "model")
        ]
    texts = {"data": "data: other samples than in the run", "model": "model: other weights than in the run"}
    return [texts.get(text, text) for text in found]


# What a run has seen


def parent_stages(source: Checkpoint) -> list[dict[str, Any]]:
    """Return the stages that a model went through before; one of an unknown trainer is what its record says."""
    record = read_training(source.document)
    stages = [dict(stage) for stage in record.pop("stages", [])]
    other = {name: value for name, value in record.items() if isinstance(value, (str, int, float, bool))}
    return stages or ([other] if other else [])


def describe_stage(
    recipe: "Recipe", batches: "PackedBatches", source: Checkpoint, step: int, engine: str, precision: str
) -> dict[str, Any]:
    """Return the record of a stage up to a step: numbers, strings, and lists of these."""
    corpus, seen = batches.corpus, _sum_log(Path(recipe.output), step)
    kinds = [f"{name} {count}" for name, count in corpus.count_kinds().items()]
    stage = {"recipe": recipe.name, "trained_from": public_name(source.source), "step": step}
    stage |= {f"{name}_seen": seen[name] for name in SUMS}
    stage |= {"data": Path(recipe.data).name, "data_fingerprint": corpus.fingerprint, "data_samples": len(corpus)}
    stage |= {"kinds": kinds, "bad_samples": len(corpus.skipped), "skipped": seen["skipped"]}
    stage |= dict(corpus.too_long)
    stage |= dict(_flatten(settings_of(recipe)))
    stage |= {"engine": engine, "precision": precision, "ranks": batches.ranks}
    stage |= {"loss": seen["loss"], "hours": round(seen["seconds"] / 3600, 4), "date": time.strftime("%Y-%m-%d")}
    return {name: value for name, value in (stage | _versions()).items() if value not in (None, [])}


def _sum_log(output: Path, step: int) -> Counter:
    """Return the sums of log.jsonl up to a step, and the loss of that step."""
    total: Counter = Counter()
    for entry in read_lines(output / LOG, step):
        total.update({name: entry[name] for name in (*SUMS, "skipped", "seconds")})
        total["loss"] = entry["loss"]
    return total


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values as one level: "learning_rate.vision"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
