"""Folders of torch.distributed.checkpoint, which FSDP writes: tensors in boxes; metadata say where they are."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .files import is_outside
from .sharded_tensors import Shard, ShardedTensor
from .sources import Source
from .tensors import ITEM_SIZES, StoredTensor
from .torch_pickle import OpaqueObject, read_record


# Objects in its metadata; each becomes a record of what it holds.
DISTRIBUTED = {
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                     "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
}  # fmt: skip


def read_distributed(source: Source, folder: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """A folder of torch.distributed.checkpoint."""
    path = source.path(folder + ".metadata")
    metadata = read_record(path, DISTRIBUTED, trust)
    state = metadata.state if isinstance(metadata, OpaqueObject) else {}
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path}: no metadata of a distributed checkpoint: copy it again")
    places = {}
    for index, info in storage.items():
        places[index.state["fqn"], tuple(index.state.get("offset") or ())] = _storage_info(path, info)
    names = _model_names(path, entries, state.get("planner_data") or {})
    boxed = {
        name: _boxed(source, folder, path, entry, entries[entry].state, places, trust) for name, entry in names.items()
    }
    files = {box.info[0] for tensor in boxed.values() for box in tensor.boxes}
    ranks = {match[1] for file in files if (match := re.match(r"__(\d+)_", file))}
    for file in sorted(files):
        source.path(folder + file)  # which names the one that is missing
    engine = "FSDP" if folder.startswith("pytorch_model_fsdp") else "torch.distributed.checkpoint"
    return boxed, {"engine": engine, "ranks": len(ranks) or None}


def _storage_info(path: Path, info: Any) -> tuple[str, int, int]:
    state = info.state if isinstance(info, OpaqueObject) else {}
    file, start, length = (state.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not all(type(number) is int and number >= 0 for number in (start, length)):
        raise CheckpointError(f"{path}: it does not say where its tensors are: copy it again")
    if is_outside(file):
        raise CheckpointError(f"{path}: the file {file!r} lies outside its folder: nothing should be read there")
    if state.get("transform_descriptors"):
        raise CheckpointError(f"{path}: its files are transformed ({state['transform_descriptors']}): save it plain")
    return file, start, length


def _model_names(path: Path, entries: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, str]:
    """
    Name of a tensor of the model -> its name in the checkpoint, in which states of several things may lie nested.

    Raises:
        CheckpointError: Nothing says which of several things is the model.
    """
    states: dict[tuple[Any, ...], dict[str, str]] = {}
    for entry, described in entries.items():
        if isinstance(described, OpaqueObject) and "chunks" in described.state:
            way = tuple(planned.get(entry) or (entry,))
            states.setdefault(way[:-1], {})[str(way[-1])] = entry
    found = {way: names for way, names in states.items() if not any(str(part).startswith("optim") for part in way)}
    if len(found) > 1:
        found = {way: names for way, names in found.items() if way and way[-1] in ("model", "module", "state_dict")}
    if len(found) != 1:
        ways = sorted(".".join(map(str, way)) or "(top)" for way in states)
        raise CheckpointError(f"{path}: none or several of its parts could be the model: {', '.join(ways[:9])}")
    return next(iter(found.values()))


def _boxed(
    source: Source,
    folder: str,
    path: Path,
    name: str,
    described: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
    trust: bool,
) -> ShardedTensor:
    properties = described["properties"].state
    dtype = properties[""][0] if "" in properties else properties.get("dtype")
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: {name}: the dtype {dtype!r} is not known")
    shape, boxes = tuple(described["size"]), []
    for chunk in described["chunks"]:
        offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        if not math.prod(sizes):
            continue
        if (name, offsets) not in places:
            raise CheckpointError(f"{path}: {name}: nothing says where its part at {list(offsets)} is")
        boxes.append(Shard(offsets, sizes, places[name, offsets]))
    if not _fill(boxes, shape):
        raise CheckpointError(f"{path}: {name}: its parts do not make {list(shape)}: save it again")
    where = source.path(folder + ".metadata")
    return ShardedTensor(where, dtype, shape, boxes=tuple(boxes), source=source, folder=folder, trust=trust)


def _fill(boxes: Sequence[Shard], shape: tuple[int, ...]) -> bool:
    """Whether every element is in exactly one box."""
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            return False
        spans = zip(box.offsets, box.sizes, shape, strict=True)
        if any(at < 0 or size < 1 or at + size > whole for at, size, whole in spans):
            return False
    if sum(math.prod(box.sizes) for box in boxes) != math.prod(shape):
        return False
    edges = [
        sorted({edge for box in boxes for edge in (box.offsets[axis], box.offsets[axis] + box.sizes[axis])})
        for axis in range(len(shape))
    ]
    if math.prod(len(edge) for edge in edges) > 1 << 24:
        return False
    cells = np.zeros([max(len(edge) - 1, 0) for edge in edges], np.int32)
    for box in boxes:
        spans = zip(edges, box.offsets, box.sizes, strict=True)
        cells[tuple(slice(edge.index(at), edge.index(at + size)) for edge, at, size in spans)] += 1
    return bool((cells == 1).all())
