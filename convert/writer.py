"""
Writes folders whole or not at all, and safetensors in a stream: what is held is one chunk of one tensor.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from .problems import CheckpointError
from .readers import ITEM_SIZES, PROVENANCE


@dataclass(frozen=True)
class NewTensor:
    """
    A tensor to be written.

    Attributes:
        name: In the file.
        dtype: A key of ITEM_SIZES.
        shape: Its dimensions.
        chunks: Yields its bytes (uint8), row-major, from the first on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A folder to fill, which becomes `out` when the block ends, and is gone if it does not end well. A kill leaves it
    behind as `.NAME.part`; the next attempt clears it away.

    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or another process is writing it.
    """
    check_free(out, overwrite)
    out = out.parent.resolve() / out.name
    part = out.with_name(f".{out.name}.part")
    made = [parent for parent in part.parents if not parent.exists()]
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: {os.strerror(error.errno or 0)}: give another name or place") from error
    lock = FileLock(part / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{out}: another process is writing it") from None
    try:
        _clear(part)
        yield part
        _sync(part)
        _put_in_place(part, out)
        (out / ".lock").unlink()  # not before: a second process would take a new one in the old place
    except OSError as error:
        _remove(part, made)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(f"{out}: {os.strerror(error.errno)}: make room; nothing was left there") from error
    except BaseException:
        _remove(part, made)
        raise
    finally:
        lock.release()


def _remove(part: Path, made: list[Path]) -> None:
    shutil.rmtree(part, ignore_errors=True)
    for parent in made:
        with suppress(OSError):  # somebody else's files are in it
            parent.rmdir()


def check_free(out: Path, overwrite: bool) -> None:
    """
    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or is nothing that was written here.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} is no folder: give another name")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists: give --overwrite, or another name")
    if out.exists() and any(out.iterdir()) and not (out / PROVENANCE).exists():
        raise CheckpointError(f"{out} holds no {PROVENANCE}, so no conversion wrote it: remove it yourself")


def _clear(part: Path) -> None:
    for left in part.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != ".lock":
            left.unlink()


def _sync(folder: Path) -> None:
    """Has the disk hold the files of a folder, and the list of them."""
    for path in [*folder.iterdir(), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_path(out.parent)


def check_space(folder: Path, wanted: int) -> None:
    """
    Raises:
        CheckpointError: The disk has less room than `wanted` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CheckpointError(f"{folder.parent}: {wanted / 1e6:.1f} MB are to be written, {free / 1e6:.1f} MB are free")


def write_weights(
    folder: Path, tensors: Iterable[NewTensor], max_shard_size: int | str, on_progress: Callable[[int], None]
) -> dict[str, str]:
    """
    Writes model.safetensors, or shards and their index if it would be larger than `max_shard_size`.

    Args:
        folder: Where; it exists.
        tensors: In the order in which they shall lie in the files.
        max_shard_size: In bytes, or as "5GB".
        on_progress: Called with the number of bytes written since the last call.

    Returns:
        Tensor name -> sha256 of its bytes, in hexadecimal.

    Raises:
        CheckpointError: The disk is full, or max_shard_size is no size.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = split_in_shards(by_name, max_shard_size)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        synced = []
        for file, names in shards.items():
            digests |= _write_shard(folder / file, [by_name[name] for name in names], hashing, on_progress)
            synced.append(syncing.submit(_sync_path, folder / file))
        for done in synced:
            done.result()
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(tensor.nbytes for tensor in by_name.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return digests


def split_in_shards(tensors: Mapping[str, NewTensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """
    File name -> names of the tensors in it, as the Hub's client splits them.

    Raises:
        CheckpointError: max_shard_size is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        if not re.search("[1-9]", str(max_shard_size)) or str(max_shard_size).startswith("-"):
            raise ValueError
        return split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            get_storage_id=lambda tensor: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=int(max_shard_size) if str(max_shard_size).isdecimal() else max_shard_size,
        ).filename_to_tensors
    except ValueError as error:
        raise CheckpointError(f"--max-shard-size {max_shard_size}: a size such as 200MB or 5GB is wanted") from error


def _write_shard(
    path: Path, tensors: list[NewTensor], hashing: ThreadPoolExecutor, on_progress: Callable[[int], None]
) -> dict[str, str]:
    tensors = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])  # so that each is aligned
    with path.open("wb", buffering=0) as file:
        _write_all(file, safetensors_header(tensors))
        return {tensor.name: _write_tensor(file, tensor, hashing, on_progress) for tensor in tensors}


def safetensors_header(tensors: Iterable[NewTensor]) -> bytes:
    """Length and header of a safetensors file, padded so that the data is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: BinaryIO, tensor: NewTensor, hashing: ThreadPoolExecutor, on_progress: Callable[[int], None]
) -> str:
    """Writes and hashes at once, both of which let other threads run, the hash a few chunks behind."""
    digest, written = hashlib.sha256(), 0
    behind: deque[Future[None]] = deque()
    for chunk in tensor.chunks():
        behind.append(hashing.submit(digest.update, chunk))
        if len(behind) > 4:
            behind.popleft().result()
        _write_all(file, chunk)
        written += len(chunk)
        on_progress(len(chunk))
    for hashed in behind:
        hashed.result()
    if written != tensor.nbytes:
        raise AssertionError(f"{tensor.name}: {written} bytes were made, {tensor.nbytes} are its size")
    return digest.hexdigest()


def _write_all(file: BinaryIO, data: bytes | np.ndarray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
