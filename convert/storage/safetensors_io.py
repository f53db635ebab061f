"""Safetensors files: headers read without the library, weights written as a stream, one chunk in memory."""

import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import CheckpointError
from .files import first_line, write_json
from .output_folder import sync
from .tensors import ITEM_SIZES, NewTensor, StoredTensor


LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

DOWNLOAD = "copy or download it again"


def read_safetensors(path: Path, opened: BinaryIO | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a safetensors file; only its header is read.

    Args:
        path: The file, or its name in error messages and in the tensors if it is remote.
        opened: The file, if it is remote.

    Raises:
        CheckpointError: The header violates the format, or the file has another length than the header says.
    """
    with opened or path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: the file is cut short or no safetensors: {DOWNLOAD}")
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, {LONGEST_HEADER} is the most there can be"
            )
        header = _parse_header(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header: expected strings, got {str(metadata)[:80]}")
    tensors = {name: _read_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise CheckpointError(f"{path}: the header has a key twice")
        return dict(pairs)

    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        for name in header:
            name.encode()
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {first_line(error)}: {DOWNLOAD}") from error
    return header


def _read_entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """A tensor from its entry in the header; `data` is the offset of the first tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r}: expected dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: tensor {name!r}: the dtype {dtype!r} is not known")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{path}: tensor {name!r}: {numbers!r} is not a list of whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets {offsets} do not hold {dtype} {shape}")
    return StoredTensor(path, dtype, tuple(shape), data + offsets[0])


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
    """
    Raises:
        CheckpointError: The tensors do not fill the file one after another.
    """
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            kind = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}: the header is corrupt: {DOWNLOAD}")
        end += tensor.nbytes
    if end != size:
        kind = "cut short" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: expected {end} bytes, got {size}: {DOWNLOAD}")


def write_weights(
    folder: Path, tensors: Iterable[NewTensor], max_shard_size: int | str, on_progress: Callable[[int], None]
) -> dict[str, str]:
    """
    Write model.safetensors, or shards and their index if it would be larger than `max_shard_size`.

    Args:
        tensors: In the order of the files.
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
            synced.append(syncing.submit(sync, folder / file))
        for done in synced:
            done.result()
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(tensor.nbytes for tensor in by_name.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return digests


def split_in_shards(tensors: Mapping[str, NewTensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """
    Map file names to tensor names, as huggingface_hub splits them.

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
        raise CheckpointError(f"--max-shard-size {max_shard_size}: expected a size such as 200MB or 5GB") from error


def _write_shard(
    path: Path, tensors: list[NewTensor], hashing: ThreadPoolExecutor, on_progress: Callable[[int], None]
) -> dict[str, str]:
    tensors = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])  # keeps each aligned
    with path.open("wb", buffering=0) as file:
        _write_all(file, safetensors_header(tensors))
        return {tensor.name: _write_tensor(file, tensor, hashing, on_progress) for tensor in tensors}


def safetensors_header(tensors: Iterable[NewTensor]) -> bytes:
    """The length field and header of a safetensors file, padded to align the data to 8 bytes."""
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
    """Write a tensor and return its sha256; hashing runs in another thread, at most four chunks behind."""
    digest, written = hashlib.sha256(), 0
    pending: deque[Future[None]] = deque()
    for chunk in tensor.chunks():
        pending.append(hashing.submit(digest.update, chunk))
        if len(pending) > 4:
            pending.popleft().result()
        _write_all(file, chunk)
        written += len(chunk)
        on_progress(len(chunk))
    for hashed in pending:
        hashed.result()
    if written != tensor.nbytes:
        raise AssertionError(f"{tensor.name}: expected {tensor.nbytes} bytes, got {written}")
    return digest.hexdigest()


def _write_all(file: BinaryIO, data: bytes | np.ndarray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
