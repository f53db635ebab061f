# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files in the cache: each is named after a hash of all that it depends on, written by one process, and appears complete.

Large arrays are memory-mapped, so that the processes of a node share them.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xxhash
from filelock import FileLock


SETTLED_SECONDS = 2.0  # a file may change again within the resolution of its time stamps


def hash_of(value: Any) -> str:
    """Return a hash of a JSON value."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def content_hash(file: Path, cache_dir: Path) -> str:
    """
    Return a hash of the content of a file.

    It is computed once for a file and its time stamps. These include that of the last change of status, which cannot be
    set: a new content of equal size under an old modification time is noticed.
    """
    memo = cache_dir / "hashes" / f"{hash_of(str(file.resolve()))}.json"
    with locked(memo):
        stat = file.stat()
        signature = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        with suppress(OSError, ValueError, KeyError):  # no memo, or a damaged one
            known = json.loads(memo.read_text())
            if known["signature"] == signature:
                return known["hash"]
        digest = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            with new_file(memo) as temporary:
                temporary.write_text(json.dumps({"signature": signature, "hash": digest.hexdigest()}))
        return digest.hexdigest()


@contextmanager
def cache_errors(cache_dir: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one that names the cache and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise _unwritable(cache_dir, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    reason = error.strerror or error
    return OSError(f"{folder}: the cache cannot be written: {reason}: choose another (--cache-dir, cache_dir)")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time create `path`; remove what a process that was killed left of it."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        for rest in path.parent.glob(f".{path.name}*"):
            _remove(rest)
        yield
    finally:
        lock.release()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file or folder that replaces `target` at the end, or is removed after an error."""
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


class MappedArrays:
    """Named arrays of a folder, memory-mapped and read-only; a pickle holds the folder only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._arrays = {file.stem: _map_array(file) for file in folder.glob("*.npy")}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __reduce__(self) -> tuple[type["MappedArrays"], tuple[Path]]:
        return MappedArrays, (self.folder,)


def _map_array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except ValueError:  # an empty file region cannot be mapped
        return np.load(file)


def store_arrays(folder: Path, compute: Callable[[], Mapping[str, np.ndarray]]) -> MappedArrays:
    """
    Return the arrays of a folder, which is written if it does not exist.

    Args:
        folder: Named after everything that the arrays depend on.
        compute: Called by one process only.

    Raises:
        OSError: The folder cannot be written.
    """
    with locked(folder):
        if not folder.exists():
            with new_file(folder) as temporary:
                temporary.mkdir()
                for name, array in compute().items():
                    np.save(temporary / f"{name}.npy", array)
    return MappedArrays(folder)
