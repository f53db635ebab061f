"""
Folders of torch.distributed.checkpoint, which FSDP saves: `.metadata` and the files of every rank. A tensor is cut into
n-dimensional shards, each saved by torch.save as some bytes of a file.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import CheckpointError
from .files import is_outside
from .sources import DCP_METADATA, Source
from .tensors import CHUNK, ITEM_SIZES, ComputedTensor, StoredTensor, read_bytes, spans
from .torch_pickle import OpaqueObject, read_opaque, read_saved


CORRUPT = "the file is truncated or corrupt, copy it again"


class Shard(NamedTuple):
    """A block of a tensor, in `nbytes` bytes of a file next to .metadata, from `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int


def read_dcp(source: Source, folder: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """
    The tensors of the model in `folder` ("" or a name with a slash at the end) of a source, and metadata of the
    training. With `trust`, its pickles may name unknown classes. Raises a CheckpointError if a file is missing, corrupt
    or outside the folder, or names what could run code.
    """
    path = source.path(folder + DCP_METADATA)
    metadata = read_opaque(path, trust)
    state = metadata.state if isinstance(metadata, OpaqueObject) else {}
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path}: no metadata of a distributed checkpoint: {CORRUPT}")
    positions = {
        (index.state["fqn"], tuple(index.state.get("offset") or ())): _position(path, info)
        for index, info in storage.items()
    }
    names = _model_entries(path, entries, state.get("planner_data") or {})
    tensors = {n: _sharded_tensor(path, entry, entries[entry].state, positions, trust) for n, entry in names.items()}
    chunks = ((entry, chunk.state) for entry in names.values() for chunk in entries[entry].state["chunks"])
    files = {positions[entry, tuple(one["offsets"])][0] for entry, one in chunks if math.prod(one["sizes"])}
    for file in sorted(files):
        source.path(folder + file)  # downloads it, or names it if it is missing
    ranks = {match[1] for file in files if (match := re.match(r"__(\d+)_", file))}
    engine = "FSDP" if folder.startswith("pytorch_model_fsdp") else "torch.distributed.checkpoint"
    return tensors, {"engine": engine, "ranks": len(ranks) or None}


def _position(path: Path, info: Any) -> tuple[str, int, int]:
    """File, first byte and bytes of a shard, from its _StorageInfo."""
    state = info.state if isinstance(info, OpaqueObject) else {}
    file, start, nbytes = (state.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not all(type(number) is int and number >= 0 for number in (start, nbytes)):
        raise CheckpointError(f"{path}: it does not say where its tensors are: {CORRUPT}")
    if is_outside(file):
        raise CheckpointError(f"{path}: the file {file!r} is outside its folder")
    if transforms := state.get("transform_descriptors"):
        raise CheckpointError(f"{path}: its files are transformed ({transforms}): save it without transforms")
    return file, start, nbytes


def _model_entries(path: Path, entries: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, str]:
    """
    Map names of the model's tensors to names in the checkpoint, which may hold several nested state dicts; `planned`
    has the keys of a name in these. Raises a CheckpointError if none or several of them could be the model.
    """
    states: dict[tuple[Any, ...], dict[str, str]] = {}
    for entry, described in entries.items():
        if isinstance(described, OpaqueObject) and "chunks" in described.state:
            keys = tuple(planned.get(entry) or (entry,))
            states.setdefault(keys[:-1], {})[str(keys[-1])] = entry
    found = {keys: names for keys, names in states.items() if not any(str(key).startswith("optim") for key in keys)}
    if len(found) > 1:
        found = {keys: names for keys, names in found.items() if keys and keys[-1] in ("model", "module", "state_dict")}
    if len(found) != 1:
        several = sorted(".".join(map(str, keys)) or "(top)" for keys in states)
        raise CheckpointError(f"{path}: none or several of its parts could be the model: {', '.join(several[:9])}")
    return next(iter(found.values()))


def _sharded_tensor(
    path: Path, name: str, described: Mapping[str, Any], positions: Mapping[Any, tuple[str, int, int]], trust: bool
) -> ComputedTensor:
    properties, shape, shards = described["properties"].state, tuple(described["size"]), []
    dtype = properties[""][0] if "" in properties else properties.get("dtype")
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: {name}: the dtype {dtype!r} is not known")
    for chunk in described["chunks"]:
        offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        if math.prod(sizes) and (name, offsets) not in positions:
            raise CheckpointError(f"{path}: {name}: no position of its shard at {list(offsets)}: {CORRUPT}")
        if math.prod(sizes):
            shards.append(Shard(offsets, sizes, *positions[name, offsets]))
    if not _fill(shards, shape):
        raise CheckpointError(f"{path}: {name}: its shards do not make {list(shape)}: save it again")
    read = partial(_read_shards, dtype, shape or (1,), shards, cache(partial(_locate, path.parent, dtype, trust)))
    return ComputedTensor(path, dtype, shape, read=read)


def _fill(shards: Sequence[Shard], shape: tuple[int, ...]) -> bool:
    """Whether every element is in exactly one shard."""
    vectors = [shape, *(vector for shard in shards for vector in (shard.offsets, shard.sizes))]
    if not all(len(v) == len(shape) and all(type(size) is int and size >= 0 for size in v) for v in vectors):
        return False
    begins = np.array([shard.offsets for shard in shards], np.int64).reshape(len(shards), len(shape))
    ends = begins + np.array([shard.sizes for shard in shards], np.int64).reshape(begins.shape)
    if sum(math.prod(shard.sizes) for shard in shards) != math.prod(shape) or (ends > shape).any():
        return False
    overlaps = (((begin < ends) & (begins < end)).all(axis=1).sum() for begin, end in zip(begins, ends, strict=True))
    return all(count == 1 for count in overlaps)  # each overlaps itself


def _locate(folder: Path, dtype: str, trust: bool, shard: Shard) -> StoredTensor:
    path = folder / shard.file
    stored = read_saved(path, trust, shard.start, shard.nbytes)
    found = (stored.dtype, stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
    if found != (dtype, shard.sizes):
        what = f"at byte {shard.start}: expected {(dtype, shard.sizes)} as in .metadata, got {found}"
        raise CheckpointError(f"{path}: {what}: the file is of another run, copy it again")
    return stored


def _read_shards(
    dtype: str, shape: tuple[int, ...], shards: Sequence[Shard], locate: Callable[[Shard], StoredTensor],
    start: int, stop: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    """As many rows at a time as fit into CHUNK, at least one."""
    item, row = ITEM_SIZES[dtype], max(math.prod(shape[1:]), 1)
    for top, bottom in spans(start // row, -(-stop // row), max(CHUNK // (row * item), 1)):
        rows = np.empty((bottom - top, *shape[1:]), f"V{item}")
        for shard in shards:
            (begin, *columns), (height, *widths) = shard.offsets or (0,), shard.sizes or (1,)
            first, last, width = max(top, begin), min(bottom, begin + height), math.prod(widths)
            if first < last:
                data = read_bytes(locate(shard), (first - begin) * width, (last - begin) * width).view(rows.dtype)
                block = (slice(at, at + size) for at, size in zip(columns, widths, strict=True))
                rows[(slice(first - top, last - top), *block)] = data.reshape(-1, *widths)
        data = rows.reshape(-1).view(np.uint8)
        yield data[max(start - top * row, 0) * item : (min(stop, bottom * row) - top * row) * item]
