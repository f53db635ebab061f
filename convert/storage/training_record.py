"""
The record of a training run: a run writes it next to its weights ({"training": {"stages": [...]}} in training.json),
convert copies it to provenance.json, and the model card shows it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import CheckpointError
from .sources import PROVENANCE


TRAINING = "training.json"
SCALAR = (str, int, float, bool, type(None))
NUMBER = (int, float)


@dataclass(frozen=True)
class TrainingRecord:
    """
    Attributes:
        engine: What saved the weights, such as "DeepSpeed ZeRO-3".
        trained_from: Name of the model that the run loaded, as its config.json has it.
        base: The checkpoint that completes this one: "name", "revision", licence, and what was taken from it.
        adapter: "peft_type", "r", "lora_alpha" of the adapter that was merged.
        merged: Component -> "r", "lora_alpha" of LoRA that was saved within the weights.
        mean_of: Of each checkpoint of an average, its "name" and record.
        stages: Of each stage in order, name -> number, string, or list of these.
        other: Entries that this version does not know.
    """

    engine: str | None = None
    ranks: float | None = None
    step: float | None = None
    epoch: float | None = None
    tokens_seen: float | None = None
    trained_from: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    merged: Mapping[str, Any] = field(default_factory=dict)
    mean_of: list[Mapping[str, Any]] = field(default_factory=list)
    stages: list[Mapping[str, Any]] = field(default_factory=list)
    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, file: str) -> "TrainingRecord":
        """
        Args:
            value: What `file` has under "training": an object, or the list of stages alone; None if it has nothing.

        Raises:
            CheckpointError: An entry is of another type; the message names it.
        """
        entries = {"stages": value} if isinstance(value, list) else {} if value is None else value
        _check(entries, Mapping, f"{file}: training", "an object or a list of stages")
        entries = {name: entry for name, entry in entries.items() if entry is not None}
        for names, kind, expected in (
            (("engine", "trained_from"), str, "a string"),
            (("ranks", "step", "epoch", "tokens_seen"), NUMBER, "a number"),
            (("base", "adapter", "merged"), Mapping, "an object"),
            (("stages", "mean_of"), list, "a list"),
        ):
            for name in entries.keys() & names:
                _check(entries[name], kind, f"{file}: training.{name}", expected)
        for name in entries.keys() & {"stages", "mean_of"}:
            for index, row in enumerate(entries[name]):
                _check(row, Mapping, f"{file}: training.{name}[{index}]", "an object")
        for index, stage in enumerate(entries.get("stages", [])):
            for name, entry in stage.items():
                for scalar in entry if isinstance(entry, list) else [entry]:
                    _check(scalar, SCALAR, f"{file}: training.stages[{index}].{name}", "a number or a string")
        known = {entry.name for entry in fields(cls)} - {"other"}
        other = {name: entry for name, entry in entries.items() if name not in known}
        return cls(**{name: entry for name, entry in entries.items() if name in known}, other=other)

    def to_json(self) -> dict[str, Any]:
        """Return what from_json reads, without what is not known."""
        entries = asdict(self)
        entries |= entries.pop("other")
        return {name: entry for name, entry in entries.items() if entry not in (None, {}, [])}


def read_training(document: Callable[[str], Mapping[str, Any]]) -> TrainingRecord:
    """
    Return what a folder records of its training, of a run that ended there before what a conversion copied.

    Args:
        document: File name -> its JSON content, empty if there is no such file.

    Raises:
        CheckpointError: An entry is of another type; the message names it.
    """
    file = TRAINING if "training" in document(TRAINING) else PROVENANCE
    return TrainingRecord.from_json(document(file).get("training"), file)


def _check(value: Any, kind: Any, location: str, expected: str) -> None:
    if not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool)):
        raise CheckpointError(f"{location}: expected {expected}, got {value!r:.60}: correct it")
