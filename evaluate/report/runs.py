"""Finished runs of `sailvit train`: records, logs, skipped samples, and the base model that they began with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...convert.storage.files import first_line, is_number, read_json
from ...convert.storage.training_record import TRAINING, read_training


RUN, LOG, SKIPPED = "run.json", "log.jsonl", "skipped.jsonl"  # as `sailvit train` names them; a test compares them
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """
    A finished stage of training.

    Attributes:
        name: Of the folder, with its parent's where two have the same.
        stages: The records of all stages up to this one, which is the last.
        log: Of each step: "step", "loss", "loss_by_kind", ...; empty without log.jsonl.
        skipped: Samples that were left out: "step" (0: before the first), "source", "path", "reason".
    """

    folder: Path
    name: str
    stages: tuple[Entry, ...]
    log: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    @property
    def stage(self) -> Entry:
        return self.stages[-1]

    @property
    def kinds(self) -> dict[str, int]:
        """Samples of each kind in an epoch."""
        pairs = (str(kind).rpartition(" ") for kind in self.stage.get("kinds", ()))
        return {kind: int(count) for kind, _, count in pairs if count.isdecimal()}


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """
    Return the runs of folders, each a run or a folder of runs; those with fewer stages before them first.

    Raises:
        ValueError: A folder has no run, or a run is not finished or damaged.
    """
    folders = [folder for path in paths for folder in _run_folders(path)]
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    runs = [
        _read_run(folder, name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}")
        for folder, name in zip(folders, names, strict=True)
    ]
    return sorted(runs, key=lambda run: len(run.stages))


def find_gaps(runs: Sequence[Run]) -> list[str]:
    """Return a line for each stage that a run began with, and that is not among the runs."""
    given, gaps = [run.stages for run in runs], {}
    for run in runs:
        for count in range(1, len(run.stages)):
            if run.stages[:count] not in given:
                recipe = run.stages[count - 1].get("recipe", "")
                gaps.setdefault(
                    (count, recipe), f"Stage {count} ({recipe}), which {run.name} began with: name its run, too."
                )
    return list(gaps.values())


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder: expected one that `sailvit train` wrote, or one of these")
    if _is_run(path):
        return [path]
    found = [child for child in sorted(path.iterdir()) if _is_run(child)]
    if not found:
        raise ValueError(f"{path}: no run in it: expected a folder that `sailvit train` wrote, or one of these")
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RUN, TRAINING))


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / TRAINING).is_file():
        raise ValueError(
            f"{folder}: this run is not finished (it has no {TRAINING}): finish it with the command that began it, or "
            "name the folders of finished runs"
        )
    record = read_training(lambda file: read_json(folder / file) if (folder / file).is_file() else {})
    if not record.get("stages"):
        raise ValueError(f"{folder / TRAINING}: no stages in it: expected the record that `sailvit train` writes")
    log = tuple(_read_lines(folder / LOG, ("step", "loss")))
    return Run(folder, name, tuple(record["stages"]), log, tuple(_read_lines(folder / SKIPPED, ("step",))))


def _read_lines(path: Path, numbers: Sequence[str]) -> Iterator[Entry]:
    """Yield the objects of a JSONL file in which some fields are numbers; none if there is no such file."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {first_line(error)}: remove the line") from error
        if not isinstance(entry, dict) or not all(is_number(entry.get(name)) for name in numbers):
            raise ValueError(f"{path}: line {number}: expected an object with {' and '.join(numbers)}: remove the line")
        yield entry


def find_base(runs: Sequence[Run], given: str | None = None) -> str:
    """
    Return the folder or Hub name of the model that the runs began with: as given, else as their records name it.

    Records keep no local paths: a folder is looked for next to the runs, one folder above, and in the current one.

    Raises:
        ValueError: The records name several or none, or there is no such folder.
    """
    if given:
        return given
    names = list(dict.fromkeys(str(run.stages[0].get("trained_from", "")) for run in runs))
    if len(names) > 1 or not names[0]:
        found = ", ".join(filter(None, names)) or "none"
        raise ValueError(f"expected runs that began with one base model, got {found}: name it with --base")
    (name,) = names
    if "/" in name:
        return name
    parents = runs[0].folder.resolve().parents
    for place in (parents[0], *parents[1:2], Path()):
        if (place / name / "config.json").is_file():
            return str(place / name)
    raise ValueError(f"{runs[0].folder}: its base model {name!r} is not next to the runs: name its folder with --base")
