"""
The record of a training run: a run writes it next to its weights ({"training": {"stages": [...]}} in training.json),
convert copies it to provenance.json, and the model card shows it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .errors import CheckpointError
from .sources import PROVENANCE


TRAINING = "training.json"

# Types of JSON -> their names in messages.
NUMBER, SCALAR = (int, float), (str, int, float, bool, type(None))
TYPES = {str: "a string", NUMBER: "a number", Mapping: "an object", list: "a list", SCALAR: "a number or a string"}

# The entries of a record, in order; others are kept as they are.
ENTRIES = {
    "engine": str,  # what saved the weights, such as "DeepSpeed ZeRO-3"
    "ranks": NUMBER,
    "step": NUMBER,
    "epoch": NUMBER,
    "tokens_seen": NUMBER,
    "trained_from": str,  # name of the model that the run loaded, as its config.json has it
    "base": Mapping,  # the checkpoint that completes this one: "name", "revision", licence, and what was taken from it
    "adapter": Mapping,  # "peft_type", "r", "lora_alpha" of the adapter that was merged
    "merged": Mapping,  # component -> "r", "lora_alpha" of LoRA that was saved within the weights
    "mean_of": list,  # of each checkpoint of an average, its "name" and record
    "stages": list,  # of each stage in order, name -> number, string, or list of these
}


def read_training(document: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """
    Return what a folder records under "training", ENTRIES and others that are not empty, or a list of stages alone: of
    a run that ended there before what a conversion copied. `document` maps the name of a file to its JSON content,
    empty if there is none. Raises a CheckpointError that names an entry of another type.
    """
    file = TRAINING if "training" in document(TRAINING) else PROVENANCE
    value = document(file).get("training")
    record = {"stages": value} if isinstance(value, list) else {} if value is None else value
    _check(record, Mapping, f"{file}: training", "an object or a list of stages")
    record = {name: record[name] for name in dict.fromkeys([*ENTRIES, *record]) if record.get(name) is not None}
    for name in record.keys() & ENTRIES.keys():
        _check(record[name], ENTRIES[name], f"{file}: training.{name}")
        for index, row in enumerate(record[name] if ENTRIES[name] is list else ()):
            _check(row, Mapping, f"{file}: training.{name}[{index}]")
    for index, stage in enumerate(record.get("stages", ())):
        for name, entry in stage.items():
            for scalar in entry if isinstance(entry, list) else [entry]:
                _check(scalar, SCALAR, f"{file}: training.stages[{index}].{name}")
    return {name: entry for name, entry in record.items() if entry not in ({}, [])}


def _check(value: Any, kind: Any, location: str, expected: str | None = None) -> None:
    if not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool)):
        raise CheckpointError(f"{location}: expected {expected or TYPES[kind]}, got {value!r:.60}: correct it")
