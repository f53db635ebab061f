"""JSON files, hashes, and copies of whole files: reflinks or hard links where possible."""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError
from .tensors import CHUNK


REFLINKED, LINKED, COPIED = "reflinked", "hard-linked", "copied"
FICLONE = 0x40049409  # ioctl of linux/fs.h: share the blocks of another file, copy-on-write
COPY_CHUNK = 16 * CHUNK  # bytes


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; raises a CheckpointError if it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number; no integer beyond those that a float can represent."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all, and its folder; raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file, from an index of shards; raises a CheckpointError if it names files outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path}: no index of shards: expected weight_map to map tensor names to file names")
    for file in set(weight_map.values()):
        if is_outside(file):
            raise CheckpointError(f"{path}: the shard {file!r} is outside its folder: correct weight_map")
    return weight_map


def is_outside(file: str) -> bool:
    """Whether a relative path, read from a file, could lead out of that file's folder."""
    parts = PurePosixPath(file).parts
    return not parts or file.startswith("/") or ".." in parts or any(mark in file for mark in "\\:\0")


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file in hexadecimal; of its beginning only, if `stop` is set meanwhile."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while not (stop and stop.is_set()) and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()


def copy_file(source: Path, target: Path, on_progress: Callable[[int], None] = lambda count: None) -> None:
    """Copy a file; `on_progress` is called with the number of bytes written since the last call."""
    buffer = memoryview(bytearray(COPY_CHUNK))
    with source.open("rb", buffering=0) as read, target.open("wb") as written:
        while count := read.readinto(buffer):
            on_progress(written.write(buffer[:count]))


def link_files(files: Mapping[Path, Path], hard: bool = False) -> dict[Path, str]:
    """
    Create files (new -> existing; symbolic links are followed) without copying data, where the file system can. With
    `hard` they may be hard links, except to files in the Hub's cache, which other programs share. Returns REFLINKED or
    LINKED for each that was created.
    """
    made = {}
    for target, source in files.items():
        source = source.resolve()
        if _reflink(source, target):
            made[target] = REFLINKED
        elif hard and not is_cached(source):
            with suppress(OSError):
                os.link(source, target)
                made[target] = LINKED
    return made


def count_bytes(total: int, on_progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a callback that adds up the byte counts it is called with, and calls on_progress(sum, total)."""
    done = 0

    def count(read_or_written: int) -> None:
        nonlocal done
        done += read_or_written
        on_progress(done, total)

    return count


def is_cached(path: Path) -> bool:
    """Whether a file, or the target of a link, is in a cache of the Hub."""
    return bool(re.search(r"/(models|datasets|spaces)--[^/]*/(blobs|snapshots)(/|$)", path.resolve().as_posix()))


def is_hard_link(path: Path) -> bool:
    """Whether a regular file has other names on its disk."""
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as read, target.open("wb") as written:
            fcntl.ioctl(written.fileno(), FICLONE, read.fileno())
    except OSError:  # not supported, or another file system
        target.unlink(missing_ok=True)
        return False
    return True
