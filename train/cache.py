# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files in the cache: each is named after a hash of all that it depends on, written by one process, and appears complete.

Large arrays are memory-mapped, so that the processes of a node share them.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    stat = file.stat()
    signature = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_dir / "hashes" / f"{hash_of(str(file.resolve()))}.json"
    if memo.exists():
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
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time create `path`."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(f"{path.parent}: the cache cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file or folder that replaces `target` at the end, or is removed after an error."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


class MappedArrays:
    """Named arrays of a folder, memory-mapped and read-only; a pickle holds the folder only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __reduce__(self) -> tuple[type["MappedArrays"], tuple[Path]]:
        return MappedArrays, (self.folder,)


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
