# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The folder of a run: checkpoints that are complete or do not count, and files that say what the run is.

    OUTPUT/run.json           what the run is, written when it starts
    OUTPUT/checkpoint-N/      a checkpoint; complete.json, written last, lists its files and their sizes
    OUTPUT/interrupted        the run stopped, after the step that is in it; the same command goes on
    OUTPUT/training.json      the record, written last: the run is finished
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..convert.storage.output_folder import sync
from ..convert.storage.training_record import TRAINING
from .cache import new_file


RUN, MARKER, LOCK = "run.json", "complete.json", ".lock"
STOPPED = "interrupted"  # for launchers, which hide the exit code


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears complete or not at all, also after a power failure."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_training(folder: Path, stages: list[dict[str, Any]]) -> None:
    """Write the record of a model."""
    write_json(folder / TRAINING, {"training": {"stages": stages}})


# The folder of a run


def check_output(output: Path) -> None:
    """
    Check that a folder is a new one, an empty one, or that of a run.

    Raises:
        ValueError: It holds something else.
    """
    if output.is_symlink() and not output.exists():
        raise ValueError(f"{output}: a link that leads nowhere: choose another output")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a folder, got a file: choose another output")
    names = {path.name for path in output.iterdir() if not _is_of_start(path.name)} if output.exists() else set()
    if names and RUN not in names:
        found = ", ".join(sorted(names)[:3])
        raise ValueError(f"{output}: it holds something else ({found}), not a run: choose another output")
    if names and not read_json(output / RUN):
        raise ValueError(f"{output / RUN}: damaged: it is unknown which run this is; choose another output")


def _is_of_start(name: str) -> bool:
    """Return whether a run has a file before its run.json: its lock, and what the first rank may be writing."""
    return name in (LOCK, STOPPED) or name.startswith((f".{RUN}.", f".{STOPPED}."))


def is_finished(output: Path) -> bool:
    return (output / TRAINING).exists()


@contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """
    Keep other processes from training in the same folder, until this one ends.

    Raises:
        ValueError: Another process trains there.
        OSError: The folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{output}: another process is training there: wait for it, or stop it") from error
    except OSError as error:
        raise OSError(f"{output}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


# Checkpoints


def mark_complete(folder: Path) -> None:
    """Write the files of a checkpoint to the disk, then its marker."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in {path.parent for path in files}:
        sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / MARKER, {"files": sizes})
    sync(folder.parent)


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint has its marker, and every file in the size that this states."""
    sizes = read_json(folder / MARKER).get("files")
    if not isinstance(sizes, Mapping) or not sizes:
        return False
    paths = ((folder / name, size) for name, size in sizes.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def list_checkpoints(output: Path) -> dict[int, Path]:
    """Return step -> folder of all checkpoints, complete or not, the newest last."""
    found = {}
    for path in output.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    return next((path for path in reversed(list_checkpoints(output).values()) if is_complete(path)), None)


def remove_incomplete(output: Path) -> list[Path]:
    """Remove the checkpoints that are not complete, and return their folders."""
    broken = [path for path in list_checkpoints(output).values() if not is_complete(path)]
    for path in broken:
        remove_checkpoint(path)
    return broken


def keep_newest(output: Path, count: int) -> None:
    """Remove all complete checkpoints but the newest ones."""
    complete = [path for path in list_checkpoints(output).values() if is_complete(path)]
    for path in complete[:-count]:
        remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove the marker first: a checkpoint that is half removed does not count."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)
