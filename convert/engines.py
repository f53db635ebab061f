"""
Folders that training engines leave, DeepSpeed's ZeRO and torch's distributed checkpoints (FSDP): tensors in pieces.

A piece is a run of elements, or a box, that lies somewhere in a file of one process. Opening reads what describes the
pieces; of the states of the optimizer beside the float32 masters, nothing else is read.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from .pickles import Record, explained, read_record, read_saved
from .problems import CheckpointError
from .readers import CHUNK, ITEM_SIZES, StoredTensor, is_outside
from .sources import STATES, Source


MASTERS = "masters"  # in Checkpoint.engine: the names of what was trained, where the engine says so
# Objects of the engines in the files they write; each becomes a record of what it holds.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
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
OPTIMIZER_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


# Tensors in pieces


@dataclass(frozen=True)
class Run:
    """Elements of a stored tensor that follow one another: `count` of them, from `first` on."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class JoinedTensor(StoredTensor):
    """
    A tensor in runs, one after the other.

    Attributes:
        runs: They hold as many elements as the tensor.
    """

    runs: tuple[Run, ...] = field(default=(), repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        at, stop = 0, math.prod(self.shape) if stop is None else stop
        for run in self.runs:
            first, last = max(start - at, 0), min(stop - at, run.count)
            if first < last:
                yield from run.tensor.chunks(run.first + first, run.first + last)
            at += run.count


@dataclass(frozen=True)
class Box:
    """
    A part of a tensor: where it begins, its sizes, and the file in which torch.save wrote it.

    Attributes:
        info: Of the engine: name of the file, first byte, bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: tuple[str, int, int]


@dataclass(frozen=True)
class BoxedTensor(StoredTensor):
    """
    A tensor in boxes, that fill it.

    Attributes:
        boxes: None of them empty.
        source, folder: Where their files are.
        opened: The boxes that were looked for -> where their elements lie.
    """

    boxes: tuple[Box, ...] = field(default=(), repr=False, compare=False)
    source: Source | None = field(default=None, repr=False, compare=False)
    folder: str = ""
    opened: dict[Box, StoredTensor] = field(default_factory=dict, repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """As many rows at a time as fit into CHUNK, but one at least."""
        item, shape = ITEM_SIZES[self.dtype], self.shape or (1,)
        stop = math.prod(shape) if stop is None else stop
        row = math.prod(shape[1:])
        step = max(CHUNK // max(row * item, 1), 1)
        for top in range(start // max(row, 1), -(-stop // max(row, 1)), step):
            bottom = min(top + step, shape[0])
            slab = self._slab(top, bottom, shape, item)
            yield slab[max(start - top * row, 0) * item : (min(stop, bottom * row) - top * row) * item]

    def _slab(self, top: int, bottom: int, shape: tuple[int, ...], item: int) -> np.ndarray:
        """The bytes of the rows from `top` to `bottom`."""
        slab = np.empty((bottom - top, *shape[1:]), f"V{item}")
        for box in self.boxes:
            offsets, sizes = (box.offsets, box.sizes) if self.shape else ((0,), (1,))
            first, last = max(top, offsets[0]), min(bottom, offsets[0] + sizes[0])
            if first < last:
                inner = math.prod(sizes[1:])
                rows = read_bytes(self._open(box), (first - offsets[0]) * inner, (last - offsets[0]) * inner)
                rest = (slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
                target = (slice(first - top, last - top), *rest)
                slab[target] = rows.view(slab.dtype).reshape(last - first, *sizes[1:])
        return slab.reshape(-1).view(np.uint8)

    def _open(self, box: Box) -> StoredTensor:
        if box in self.opened:
            return self.opened[box]
        file, start, length = box.info
        path = self.source.path(self.folder + file)
        stored = read_saved(path, start=start, length=length)
        found = (stored.dtype, stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
        if found != (self.dtype, box.sizes):
            what = f"at byte {start} is {found}, not {(self.dtype, box.sizes)} as .metadata says"
            raise CheckpointError(f"{path}: {what}: it is of another run, copy it again")
        self.opened[box] = stored
        return stored


def read_bytes(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Elements `start` to `stop` of a tensor, in one piece."""
    chunks = [*tensor.chunks(start, stop)]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint8), *chunks])


# Folders of engines


def read_engine(source: Source, entry: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """
    The tensors of an engine's folder, and what it says of the training.

    Args:
        source: What the folder lies in.
        entry: As sources.find_engine names it.
        trust: Whether pickles may name what is no object of the engine.

    Raises:
        CheckpointError: A file is missing, broken, of another run, or names what could run code.
    """
    with explained(f"{source.name}/{entry}"):
        if entry.endswith(STATES):
            return _Zero(source, entry.removesuffix(STATES), trust).read()
        return _read_distributed(source, entry.removesuffix(".metadata"), trust)


class _Zero:
    """A folder of DeepSpeed: files of the model, and, under ZeRO, of the optimizer with the float32 masters."""

    def __init__(self, source: Source, folder: str, trust: bool):
        self.source, self.folder, self.trust = source, folder, trust
        self.name = f"{source.name}/{folder}".rstrip("/")
        self.models = self._find(MODEL_FILE)
        self.optimizers = self._find(OPTIMIZER_FILE)
        self.ranks = max(len(self.models), len(self.optimizers), 1)

    def _find(self, pattern: re.Pattern[str]) -> dict[int, str]:
        """Rank -> file."""
        found: dict[int, str] = {}
        for file in self.source.files:
            match = pattern.fullmatch(file.removeprefix(self.folder)) if file.startswith(self.folder) else None
            if match and int(match[2]):
                what = "tensor parallelism cuts the parameters themselves, which nothing here puts together"
                raise CheckpointError(f"{self.source.name}/{file}: {what}: merge them with the trainer's own tool")
            if match and found.setdefault(int(match[1] or 0), file) != file:
                raise CheckpointError(
                    f"{self.name}: {file} and {found[int(match[1] or 0)]} are of one rank: remove one"
                )
        return dict(sorted(found.items()))

    def read(self) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        if not self.models:
            raise CheckpointError(f"{self.name}: there is no *_model_states.pt: copy the folder again")
        models = self._load(self.models)
        first = models[min(models)]
        stage = self._check_models(models)
        optimizers = self._load_optimizers(stage) if stage else []
        tensors = self._rest(models, stage)
        masters = self._masters_of_3(first, optimizers) if stage == 3 else {}
        masters |= self._masters_of_2(first, optimizers) if stage == 2 else {}
        tensors |= masters
        for twin, name in (first.get("shared_params") or {}).items():
            if name in tensors:
                tensors[twin] = tensors[name]
        if not tensors:
            raise CheckpointError(f"{self.name}: there is no tensor in it")
        return tensors, {
            "engine": _zero_title(stage, optimizers),
            "engine_version": first.get("ds_version"),
            "ranks": self.ranks if stage else first.get("dp_world_size"),
            "step": first.get("global_steps"),
            "samples": first.get("global_samples"),
            MASTERS: frozenset(masters),
        }

    def _load(self, files: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        loaded = {}
        for rank, file in files.items():
            loaded[rank] = read_saved(self.source.path(file), DEEPSPEED, self.trust)
            if not isinstance(loaded[rank], dict):
                raise CheckpointError(f"{self.source.name}/{file}: no file of DeepSpeed")
        return loaded

    def _check_models(self, models: Mapping[int, dict[str, Any]]) -> int:
        """The stage: 0 without ZeRO, 3 where parameters are in parts, else 2, which says 1 or 2."""
        first = models[min(models)]
        if not isinstance(first.get("module"), dict):
            raise CheckpointError(f"{self.name}: no model in it: pipelines save theirs in layers, not read here")
        in_parts = "zero_pp" in self.models[min(models)]
        shapes = first.get("param_shapes")
        if not isinstance(shapes, list) and (in_parts or self.optimizers):
            raise CheckpointError(f"{self.name}: it does not say which parameters were trained: copy it again")
        for rank, model in models.items():
            for key in ("global_steps", "dp_world_size", "param_shapes", "frozen_param_shapes"):
                if model.get(key) != first.get(key):
                    what = f"its {key} are not those of rank {min(models)}: it is of another run or step, copy it again"
                    raise CheckpointError(f"{self.source.name}/{self.models[rank]}: {what}")
        if in_parts:
            self._check_ranks(self.models, first.get("dp_world_size"), "model")
        return 3 if in_parts else 2 if isinstance(shapes, list) else 0

    def _check_ranks(self, files: Mapping[int, str], count: Any, kind: str) -> None:
        """
        Raises:
            CheckpointError: They are not the files of ranks 0 to count - 1.
        """
        wanted = set(range(count)) if type(count) is int and 0 < count < 1 << 20 else set(files)
        if missing := sorted(wanted - files.keys()):
            pattern = next(iter(files.values()), f"{self.folder}zero_pp_rank_0_mp_rank_00_{kind}_states.pt")
            file = re.sub(r"pp_rank_\d+", f"pp_rank_{missing[0]}", pattern)
            what = f"missing, as {len(missing)} of {count} ranks are: copy it from the machine that wrote it"
            raise CheckpointError(f"{self.source.name}/{file}: {what}")
        if foreign := sorted(files.keys() - wanted):
            what = f"left over from another run, this one had {count} ranks: remove it"
            raise CheckpointError(f"{self.source.name}/{files[foreign[0]]}: {what}")

    def _load_optimizers(self, stage: int) -> list[dict[str, Any]]:
        """What the optimizer has of every rank, in order."""
        if not self.optimizers:
            mend = "copy them, or name model.safetensors if that will do"
            raise CheckpointError(f"{self.name}: no *_optim_states.pt, which have the float32 masters: {mend}")
        states = []
        for rank, content in self._load(self.optimizers).items():
            state = content.get("optimizer_state_dict")
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            if not isinstance(state, dict) or not _are_flat(state.get(key)):
                raise CheckpointError(f"{self.source.name}/{self.optimizers[rank]}: it has no {key}: copy it again")
            counts = state.get("partition_count")
            self._check_ranks(self.optimizers, max(counts) if isinstance(counts, list) else counts, "optim")
            if isinstance(counts, list) and len(set(counts)) > 1:
                raise CheckpointError(f"{self.name}: experts are partitioned otherwise than the rest: not read here")
            states.append({**state, "groups": state[key]})
        if len({len(state["groups"]) for state in states}) > 1:
            raise CheckpointError(f"{self.name}: its *_optim_states.pt are not of one run: copy them again")
        return states

    def _rest(self, models: Mapping[int, dict[str, Any]], stage: int) -> dict[str, StoredTensor]:
        """What has no master: buffers, and frozen parameters as the engine holds them."""
        first = models[min(models)]
        names = set(first.get("buffer_names") or ()) if stage == 3 else first["module"].keys()
        tensors = {
            name: tensor for name, tensor in first["module"].items()
            if name in names and isinstance(tensor, StoredTensor)
        }  # fmt: skip
        shapes = first.get("frozen_param_shapes") or {}
        for name, shape in shapes.items():
            parts = [(model.get("frozen_param_fragments") or {}).get(name) for model in models.values()]
            if not all(isinstance(part, StoredTensor) for part in parts):
                raise CheckpointError(f"{self.name}: the frozen {name} is in some of its files only: copy it again")
            if stage != 3:
                tensors[name] = parts[0]
                continue
            count = math.prod(shape)
            share = -(-count // len(parts))
            runs = _shares(parts, share, count)
            if any(run.count > math.prod(run.tensor.shape) for run in runs):
                raise CheckpointError(f"{self.name}: the parts of {name} are less than {shape}: copy it again")
            tensors[name] = JoinedTensor(parts[0].file, parts[0].dtype, tuple(shape), runs=tuple(runs))
        return tensors

    def _masters_of_3(
        self, model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]
    ) -> dict[str, StoredTensor]:
        """Every parameter is cut into equal shares, one a rank, the last ones padded; a rank has its shares in line."""
        lines = [_Line(state["groups"]) for state in optimizers]
        shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
        tensors, at = {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            share = -(-count // len(lines))
            runs = []
            for rank, line in enumerate(lines):
                runs += line.runs(at, max(min(share, count - rank * share), 0), self.name)
            tensors[name] = _joined(lines, shape, runs)
            at += share
        for rank, line in enumerate(lines):
            if line.count != at:
                what = f"has {line.count} masters, {at} belong to these parameters: it is of another run"
                raise CheckpointError(f"{self.source.name}/{self.optimizers[rank]}: {what}, copy it again")
        return tensors

    def _masters_of_2(
        self, model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]
    ) -> dict[str, StoredTensor]:
        """The parameters of a group lie in line, which is cut into one piece a rank; padding may follow each."""
        tensors: dict[str, StoredTensor] = {}
        if len(model["param_shapes"]) != len(optimizers[0]["groups"]):
            raise CheckpointError(f"{self.name}: files of the model and of the optimizer are not of one run")
        paddings = optimizers[0].get("param_alignment_paddings") or [None] * len(model["param_shapes"])
        for index, shapes in enumerate(model["param_shapes"]):
            line, at = _Line([state["groups"][index] for state in optimizers]), 0
            for (name, shape), padding in zip_longest(shapes.items(), paddings[index] or (), fillvalue=0):
                tensors[name] = _joined([line], tuple(shape), line.runs(at, math.prod(shape), self.name))
                at += math.prod(shape) + padding
            spare = sum(sum(state.get("group_paddings") or (0,)) for state in optimizers)
            if line.count - at > max(2 * len(optimizers), spare) or at - line.count > 2 * len(optimizers):
                what = f"group {index} has {line.count} masters, {at} belong to its parameters: files of several runs?"
                raise CheckpointError(f"{self.name}: {what} Copy them again")
        return tensors


def _zero_title(stage: int, optimizers: Sequence[Mapping[str, Any]]) -> str:
    """ZeRO-1 and ZeRO-2 lie alike, but for the number; an optimizer that has none is of stage 1."""
    if stage == 2:
        said = optimizers[0].get("zero_stage", 1)
        stage = said.made[0] if isinstance(said, Record) and said.made else said
    return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"


def _are_flat(groups: Any) -> bool:
    return isinstance(groups, list) and all(isinstance(g, StoredTensor) and len(g.shape) == 1 for g in groups)


def _shares(parts: Sequence[StoredTensor], share: int, count: int) -> list[Run]:
    return [Run(part, 0, max(min(share, count - rank * share), 0)) for rank, part in enumerate(parts)]


def _joined(lines: Sequence["_Line"], shape: tuple[int, ...], runs: Sequence[Run]) -> JoinedTensor:
    head = runs[0].tensor if runs else lines[0].parts[0]
    return JoinedTensor(head.file, head.dtype, shape, runs=tuple(runs))


class _Line:
    """Flat tensors as if they were one."""

    def __init__(self, parts: Sequence[StoredTensor]):
        self.parts = parts
        self.starts = [0, *accumulate(math.prod(part.shape) for part in parts)]
        self.count = self.starts[-1]

    def runs(self, start: int, count: int, where: str) -> list[Run]:
        """The runs in which `count` elements from `start` on lie."""
        if start + count > self.count:
            raise CheckpointError(f"{where}: its files have fewer masters than there are parameters: copy them again")
        found, stop = [], start + count
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[index + 1])
            if end > start:
                found.append(Run(self.parts[index], start - self.starts[index], end - start))
            start, index = end, index + 1
        return found


def _read_distributed(source: Source, folder: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """A folder of torch.distributed.checkpoint."""
    path = source.path(folder + ".metadata")
    metadata = read_record(path, DISTRIBUTED, trust)
    state = metadata.state if isinstance(metadata, Record) else {}
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path}: no metadata of a distributed checkpoint: copy it again")
    places = {}
    for index, info in storage.items():
        places[index.state["fqn"], tuple(index.state.get("offset") or ())] = _storage_info(path, info)
    names = _model_names(path, entries, state.get("planner_data") or {})
    boxed = {name: _boxed(source, folder, path, entry, entries[entry].state, places) for name, entry in names.items()}
    files = {box.info[0] for tensor in boxed.values() for box in tensor.boxes}
    ranks = {match[1] for file in files if (match := re.match(r"__(\d+)_", file))}
    for file in sorted(files):
        source.path(folder + file)  # which names the one that is missing
    engine = "FSDP" if folder.startswith("pytorch_model_fsdp") else "torch.distributed.checkpoint"
    return boxed, {"engine": engine, "ranks": len(ranks) or None}


def _storage_info(path: Path, info: Any) -> tuple[str, int, int]:
    state = info.state if isinstance(info, Record) else {}
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
        if isinstance(described, Record) and "chunks" in described.state:
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
) -> BoxedTensor:
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
        boxes.append(Box(offsets, sizes, places[name, offsets]))
    if not _fill(boxes, shape):
        raise CheckpointError(f"{path}: {name}: its parts do not make {list(shape)}: save it again")
    where = source.path(folder + ".metadata")
    return BoxedTensor(where, dtype, shape, boxes=tuple(boxes), source=source, folder=folder)


def _fill(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
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
