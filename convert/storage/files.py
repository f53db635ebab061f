"""
Whole files into a folder, so that nothing written there reaches the originals: their blocks shared until one side is
written (a reflink), where the file system can, else copied. Hard links are two names of one file, and made on request.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .errors import CheckpointError
from .tensors import CHUNK


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file, in hexadecimal, or of its beginning if it is stopped."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while not (stop and stop.is_set()) and (got := file.readinto(buffer)):
            digest.update(buffer[:got])
    return digest.hexdigest()


def _line(text: object) -> str:
    """The first line of a message."""
    return (str(text).strip() or type(text).__name__).splitlines()[0].strip()


def read_index(path: Path) -> dict[str, str]:
    """
    Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        CheckpointError: It is no index, or names a file outside its folder.
    """
    index = read_json(path)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError(f"{path}: no index of shards: weight_map has to map names of tensors to names of files")
    for file in set(weights.values()):
        if is_outside(file):
            raise CheckpointError(f"{path}: the shard {file!r} lies outside its folder: correct weight_map")
    return weights


def is_outside(file: str) -> bool:
    """Whether a name that stands in a file could lead out of the folder of that file."""
    parts = PurePosixPath(file).parts
    return not parts or file.startswith("/") or ".." in parts or "\\" in file or ":" in file or "\0" in file


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


REFLINKED, LINKED, COPIED = "reflinked", "hard-linked", "copied"

FICLONE = 0x40049409  # of linux/fs.h: the open file gets the blocks of another

COPY_CHUNK = 16 * CHUNK  # bytes


def link_files(files: Mapping[Path, Path], hard: bool = False) -> dict[Path, str]:
    """
    Makes files that take no room.

    Args:
        files: Those to be -> those there are; links are followed.
        hard: Whether hard links may be made; never to what lies in a cache of the Hub, which all its users share.

    Returns:
        REFLINKED or LINKED of those that were made; the others are to be copied.
    """
    made = {}
    for target, source in files.items():
        source = source.resolve()
        if _reflink(source, target):
            made[target] = REFLINKED
        elif hard and not is_cached(source) and _hard_link(source, target):
            made[target] = LINKED
    return made


def copy_file(source: Path, target: Path, on_progress: Callable[[int], None] = lambda count: None) -> None:
    """
    Args:
        on_progress: Called with the number of bytes written since the last call.
    """
    with source.open("rb", buffering=0) as before, target.open("wb", buffering=0) as after:
        for chunk in _chunks(before):
            while chunk:
                written = after.write(chunk)
                on_progress(written)
                chunk = chunk[written:]


def count_bytes(total: int, on_progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a callback that adds up the byte counts it is called with, and calls on_progress(sum, total)."""
    done = 0

    def count(read_or_written: int) -> None:
        nonlocal done
        done += read_or_written
        on_progress(done, total)

    return count


def is_cached(path: Path) -> bool:
    """Whether a file, or what it is a link to, lies in a cache of the Hub."""
    parts = path.resolve().parts
    return any(
        part.startswith(("models--", "datasets--", "spaces--")) and inside in ("blobs", "snapshots")
        for part, inside in pairwise(parts)
    )


def is_hard_link(path: Path) -> bool:
    """Whether a file has other names on this disk; a link to a file has not."""
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as before, target.open("wb") as after:
            fcntl.ioctl(after.fileno(), FICLONE, before.fileno())
    except OSError:  # another file system, or one that cannot
        target.unlink(missing_ok=True)
        return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _chunks(file: BinaryIO) -> Iterable[memoryview]:
    buffer = memoryview(bytearray(COPY_CHUNK))
    while got := file.readinto(buffer):
        yield buffer[:got]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
