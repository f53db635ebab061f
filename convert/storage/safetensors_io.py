"""TODO convert/storage/safetensors_io.py."""

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
from .files import write_json
from .output_folder import _sync_path
from .tensors import ITEM_SIZES, NewTensor, StoredTensor


LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def read_safetensors(path: Path, opened: BinaryIO | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a safetensors file, by its header alone.

    Args:
        path: Where the file is, or what to call it.
        opened: The file, if it is elsewhere.

    Raises:
        CheckpointError: The header is not what the format asks for, or the file is shorter or longer than it says.
    """
    with opened or path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: the file is cut short or no safetensors: copy or download it again")
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, {LONGEST_HEADER} is the most there can be"
            )
        header = _parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not a map of texts")
    spans = {name: _read_entry(path, name, entry) for name, entry in header.items()}
    return _place(path, spans, 8 + length, size)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            raise CheckpointError(f"{path}: the header names something twice")
        return seen

    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        for name in header:
            name.encode()
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read, copy or download the file again: {error}") from error
    return header


def _read_entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """First byte, last byte + 1, dtype and shape of one tensor, each checked on its own."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r}: the header wants dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: tensor {name!r}: the dtype {dtype!r} is not known")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{path}: tensor {name!r}: {numbers!r} is not a list of whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets {offsets} do not hold {dtype} {shape}")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _place(
    path: Path, spans: dict[str, tuple[int, int, str, tuple[int, ...]]], data: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors, once it is sure that they lie one after the other and fill the file."""
    end = 0
    for name, (start, stop, _, _) in sorted(spans.items(), key=lambda entry: entry[1][:2]):
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}: the header is broken, download the file again")
        end = stop
    if data + end != size:
        kind = "cut short" if size < data + end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: {size} bytes instead of {data + end}; copy or download it again")
    return {name: StoredTensor(path, dtype, shape, data + start) for name, (start, _, dtype, shape) in spans.items()}


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
