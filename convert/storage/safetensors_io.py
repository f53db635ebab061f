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

from .errors import CheckpointError
from .files import first_line, write_json
from .output_folder import sync
from .tensors import ITEM_SIZES, NewTensor, StoredTensor


LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

DOWNLOAD = "copy or download it again"


def read_safetensors(path: Path, remote: BinaryIO | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a safetensors file, or of an open remote one, of which `path` is the name; only its header is read.
    Raises a CheckpointError if that violates the format, or states another length than the file has.
    """
    with remote or path.open("rb") as file:
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
    metadata, tensors, end = header.pop("__metadata__", {}), {}, 8 + length
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header: expected strings, got {str(metadata)[:80]}")
    for name, entry in header.items():
        if problem := _entry_problem(entry):
            raise CheckpointError(f"{path}: tensor {name!r}: {problem}")
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), end + entry["data_offsets"][0])
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            kind = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}: the header is corrupt: {DOWNLOAD}")
        end += tensor.nbytes
    if end != size:
        kind = "cut short" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: expected {end} bytes, got {size}: {DOWNLOAD}")
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
        "".join(header).encode()  # raises for half a character
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {first_line(error)}: {DOWNLOAD}") from error
    return header


def _entry_problem(entry: Any) -> str | None:
    """What is wrong with a tensor's entry in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets in the header"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        return f"the dtype {dtype!r} is not known"
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            return f"{numbers!r} is not a list of whole numbers"
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]:
        return f"data_offsets {offsets} do not hold {dtype} {shape}"
    return None


def write_weights(
    folder: Path, tensors: Iterable[NewTensor], max_shard_size: int | str, on_progress: Callable[[int], None]
) -> dict[str, str]:
    """
    Write tensors, in order, to model.safetensors, or to shards and their index if it would be larger than
    `max_shard_size` (in bytes, or as "5GB"). `on_progress` is called with the number of bytes written since the last
    call. Returns tensor name -> sha256 in hexadecimal; raises a CheckpointError if max_shard_size is no size.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = split_in_shards(by_name, max_shard_size)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        synced = []
        for file, names in shards.items():
            ordered = sorted((by_name[name] for name in names), key=lambda each: -ITEM_SIZES[each.dtype])  # aligns each
            with (folder / file).open("wb") as written:
                written.write(safetensors_header(ordered))
                digests |= {each.name: _write_tensor(written, each, hashing, on_progress) for each in ordered}
            synced.append(syncing.submit(sync, folder / file))
        for done in synced:
            done.result()
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        metadata = {"total_size": sum(tensor.nbytes for tensor in by_name.values())}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return digests


def split_in_shards(tensors: Mapping[str, NewTensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """
    Map file names to tensor names, as huggingface_hub splits them. Raises a CheckpointError if `max_shard_size` is no
    positive number of bytes, nor a size such as "5GB".
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


def safetensors_header(tensors: Iterable[NewTensor]) -> bytes:
    """The length field and header of a safetensors file, padded to align the data to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
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
        file.write(chunk)
        written += len(chunk)
        on_progress(len(chunk))
    for hashed in pending:
        hashed.result()
    if written != tensor.nbytes:
        raise AssertionError(f"{tensor.name}: expected {tensor.nbytes} bytes, got {written}")
    return digest.hexdigest()
