"""
Folders of DeepSpeed. Under ZeRO every rank has its own files, and those of the optimizer hold the fp32 master weights.
Opening reads the pickles that describe the tensors; the moments of the optimizer are never read.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from .errors import CheckpointError
from .sources import Source
from .tensors import FLOAT_BITS, ComputedTensor, StoredTensor, cast, read_bytes
from .torch_pickle import OpaqueObject, read_saved


MASTERS = "masters"  # key of the metadata: names of the trained parameters

SAMPLE = 64  # master weights of every slice that are compared with the model's rounded weights

PATTERNS = {
    "model": r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt",
    "optim": r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt",
}

OTHER_RUN = "it is of another run or step, copy it again"


def read_zero(source: Source, folder: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """
    The tensors in `folder` ("" or a name with a slash at the end) of a source, fp32 master weights where there are any,
    and metadata of the training. With `trust`, its pickles may name unknown classes. Raises a CheckpointError if a file
    is missing, corrupt, of another run, or names what could run code.
    """
    model_files, optimizer_files = (RankFiles(source, folder, kind) for kind in PATTERNS)
    if not model_files.files:
        raise CheckpointError(f"{model_files.name}: there is no *_model_states.pt: copy the folder again")
    models = model_files.load(trust)
    first = models[min(models)]
    stage = _check_models(model_files, models, has_optimizer=bool(optimizer_files.files))
    optimizers = _load_optimizers(optimizer_files, stage, trust) if stage else []
    masters = {3: _zero3_masters, 2: _zero2_masters, 0: lambda *_: {}}[stage](optimizer_files, first, optimizers)
    _compare_with_rounded(model_files.name, masters, first["module"])
    tensors = _tensors_without_masters(model_files.name, models, stage) | masters
    for name, tied_to in (first.get("shared_params") or {}).items():
        if tied_to in tensors:
            tensors[name] = tensors[tied_to]
    if not tensors:
        raise CheckpointError(f"{model_files.name}: there is no tensor in it")
    return tensors, {
        "engine": f"DeepSpeed ZeRO-{_stage_of(optimizers[0]) if stage == 2 else stage}" if stage else "DeepSpeed",
        "engine_version": first.get("ds_version"),
        "ranks": max(len(models), len(optimizers)) if stage else first.get("dp_world_size"),
        "step": first.get("global_steps"),
        "samples": first.get("global_samples"),
        MASTERS: frozenset(masters),
    }


class RankFiles:
    """The model's or the optimizer's files (`kind`, a key of PATTERNS) in a folder, by rank."""

    def __init__(self, source: Source, folder: str, kind: str):
        self.source, self.name = source, f"{source.name}/{folder}".rstrip("/")
        files: dict[int, str] = {}
        matches = {file: re.fullmatch(re.escape(folder) + PATTERNS[kind], file) for file in source.files}
        for file, match in matches.items():
            if match and int(match[2]):
                what = "tensor parallelism, whose parts of parameters are not supported: merge them with the trainer"
                raise CheckpointError(f"{source.name}/{file}: {what}")
            if match and (other := files.setdefault(int(match[1] or 0), file)) != file:
                raise CheckpointError(f"{self.name}: {file} and {other} are of one rank: remove one")
        self.files = dict(sorted(files.items()))

    def error(self, rank: int, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source.name}/{self.files[rank]}: {what}")

    def load(self, trust: bool) -> dict[int, dict[str, Any]]:
        loaded = {rank: read_saved(self.source.path(file), trust) for rank, file in self.files.items()}
        for rank, content in loaded.items():
            if not isinstance(content, dict):
                raise self.error(rank, "no file of DeepSpeed")
        return loaded

    def check_ranks(self, count: Any) -> None:
        """Refuse files that are not those of ranks 0 to count - 1."""
        expected = set(range(count)) if type(count) is int and 0 < count < 1 << 20 else set(self.files)
        if missing := sorted(expected - self.files.keys()):
            file = re.sub(r"pp_rank_\d+", f"pp_rank_{missing[0]}", next(iter(self.files.values())))
            what = f"missing, as {len(missing)} of {count} ranks are: copy it from the machine that wrote it"
            raise CheckpointError(f"{self.source.name}/{file}: {what}")
        if foreign := sorted(self.files.keys() - expected):
            raise self.error(foreign[0], f"left over from another run, this one had {count} ranks: remove it")


def _check_models(files: RankFiles, models: Mapping[int, dict[str, Any]], has_optimizer: bool) -> int:
    """The ZeRO stage: 0 without ZeRO, 3 if parameters are partitioned, else 2 (also for 1)."""
    rank, first = next(iter(models.items()))
    if not isinstance(first.get("module"), dict):
        raise CheckpointError(f"{files.name}: no model in it: pipelines save it by layers, which is not supported")
    is_partitioned = "zero_pp" in files.files[rank]
    has_shapes = isinstance(first.get("param_shapes"), list)
    if not has_shapes and (is_partitioned or has_optimizer):
        raise CheckpointError(f"{files.name}: it does not say which parameters were trained: copy it again")
    for other, model in models.items():
        for key in ("global_steps", "dp_world_size", "param_shapes", "frozen_param_shapes"):
            if model.get(key) != first.get(key):
                raise files.error(other, f"its {key} are not those of rank {rank}: {OTHER_RUN}")
    if is_partitioned:
        files.check_ranks(first.get("dp_world_size"))
    return 3 if is_partitioned else 2 if has_shapes else 0


def _load_optimizers(files: RankFiles, stage: int, trust: bool) -> list[dict[str, Any]]:
    """The optimizer's state of every rank, with its flat fp32 tensors under "groups"."""
    if not files.files:
        fix = "copy them, or name model.safetensors if its rounded weights will do"
        raise CheckpointError(f"{files.name}: no *_optim_states.pt, which have the fp32 master weights: {fix}")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    states = []
    for rank, content in files.load(trust).items():
        state = content.get("optimizer_state_dict")
        groups = state.get(key) if isinstance(state, dict) else None
        if not isinstance(groups, list) or not all(isinstance(g, StoredTensor) and len(g.shape) == 1 for g in groups):
            raise files.error(rank, f"it has no {key}: copy it again")
        counts = state.get("partition_count")
        files.check_ranks(max(counts) if isinstance(counts, list) else counts)
        if isinstance(counts, list) and len(set(counts)) > 1:
            raise CheckpointError(f"{files.name}: MoE expert parallelism is not supported")
        states.append({**state, "groups": groups})
    if len({(len(state["groups"]), _stage_of(state)) for state in states}) > 1:
        raise CheckpointError(f"{files.name}: its *_optim_states.pt are not of one run: copy them again")
    return states


def _stage_of(optimizer: Mapping[str, Any]) -> Any:
    """The stage that an optimizer stores, which alone tells ZeRO-2 from ZeRO-1, the default."""
    stage = optimizer.get("zero_stage", 1)
    return stage.arguments[0] if isinstance(stage, OpaqueObject) and stage.arguments else stage


def _tensors_without_masters(name: str, models: Mapping[int, dict[str, Any]], stage: int) -> dict[str, StoredTensor]:
    """Buffers, and frozen parameters in the precision of the engine."""
    first = models[min(models)]
    names = set(first.get("buffer_names") or ()) if stage == 3 else first["module"].keys()
    tensors = {key: each for key, each in first["module"].items() if key in names and isinstance(each, StoredTensor)}
    for key, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [(model.get("frozen_param_fragments") or {}).get(key) for model in models.values()]
        if not all(isinstance(part, StoredTensor) for part in parts):
            raise CheckpointError(f"{name}: the frozen {key} is in some of its files only: copy it again")
        if stage != 3:
            tensors[key] = parts[0]
            continue
        shares = _shares(shape, len(parts))
        slices = [*chain.from_iterable(_slice([part], 0, n) for part, n in zip(parts, shares, strict=True))]
        if _count(slices) < math.prod(shape):
            raise CheckpointError(f"{name}: the parts of {key} have fewer elements than {shape}: copy it again")
        tensors[key] = _concatenate(slices, shape, parts[0])
    return tensors


def _shares(shape: Sequence[int], ranks: int) -> list[int]:
    """Elements of a parameter that every rank has under ZeRO-3: equal shares, the last ones shorter or empty."""
    count = math.prod(shape)
    share = -(-count // ranks)
    return [max(min(share, count - rank * share), 0) for rank in range(ranks)]


def _zero3_masters(files: RankFiles, model: dict[str, Any], states: list[dict[str, Any]]) -> dict[str, ComputedTensor]:
    """Every rank has its share of every parameter, padded to equal length, one after another in flat groups."""
    ranks = [state["groups"] for state in states]
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    tensors, position = {}, 0
    for name, shape in shapes.items():
        shares = _shares(shape, len(ranks))
        slices = [_slice(groups, position, share) for groups, share in zip(ranks, shares, strict=True)]
        tensors[name] = _concatenate([*chain.from_iterable(slices)], shape, ranks[0][0])
        position += shares[0]
    for rank, groups in zip(files.files, ranks, strict=True):
        if (count := _count(groups)) != position:
            raise files.error(rank, f"has {count} master weights, expected {position}: {OTHER_RUN}")
    return tensors


def _zero2_masters(files: RankFiles, model: dict[str, Any], states: list[dict[str, Any]]) -> dict[str, ComputedTensor]:
    """The parameters of a group, each perhaps padded, one after another, are cut into one part a rank."""
    tensors: dict[str, ComputedTensor] = {}
    if len(model["param_shapes"]) != len(states[0]["groups"]):
        raise CheckpointError(f"{files.name}: files of the model and of the optimizer are not of one run")
    paddings = states[0].get("param_alignment_paddings") or [None] * len(model["param_shapes"])
    spare = max(2 * len(states), sum(sum(state.get("group_paddings") or (0,)) for state in states))
    for index, shapes in enumerate(model["param_shapes"]):
        parts, position, stop = [state["groups"][index] for state in states], 0, 0
        for (name, shape), padding in zip_longest(shapes.items(), paddings[index] or (), fillvalue=0):
            stop = position + math.prod(shape)
            tensors[name] = _concatenate(_slice(parts, position, stop - position), shape, parts[0])
            position = stop + padding
        if not max(stop, position - 2 * len(states)) <= _count(parts) <= position + spare:
            what = f"group {index} has {_count(parts)} master weights, expected {position} for its parameters"
            raise CheckpointError(f"{files.name}: {what}: files of several runs? Copy them again")
    return tensors


def _count(parts: Sequence[StoredTensor]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _slice(parts: Iterable[StoredTensor], start: int, count: int) -> list[ComputedTensor]:
    """Elements `start` to `start + count`, as far as there are any, of flat tensors, one after another."""
    slices = []
    for part in parts:
        size = math.prod(part.shape)
        first, last = max(start, 0), min(start + count, size)
        if first < last:
            slices.append(ComputedTensor(
                part.file, part.dtype, (last - first,), parents=(part,),
                read=lambda begin, end, part=part, first=first: part.chunks(first + begin, first + end),
            ))  # fmt: skip
        start -= size
    return slices


def _concatenate(parts: Sequence[StoredTensor], shape: Sequence[int], group: StoredTensor) -> ComputedTensor:
    """Flat tensors, one after another, in the shape of a parameter; with the dtype of `group` if there is none."""

    def read(start: int, stop: int) -> Iterator[np.ndarray]:
        return chain.from_iterable(part.chunks() for part in _slice(parts, start, stop - start))

    first = parts[0] if parts else group
    return ComputedTensor(first.file, first.dtype, tuple(shape), read=read, parents=tuple(parts))


def _compare_with_rounded(name: str, masters: Mapping[str, ComputedTensor], module: Mapping[str, Any]) -> None:
    """Refuse master weights whose samples differ from the model's rounded weights; under ZeRO-3 it has none."""
    equal = total = 0
    for key, master in masters.items():
        stored, position = module.get(key), 0
        if not isinstance(stored, StoredTensor) or stored.shape != master.shape or stored.dtype not in FLOAT_BITS:
            continue
        for (count,) in (part.shape for part in master.parents):
            stop, bits = position + min(count, SAMPLE), FLOAT_BITS[stored.dtype][0]
            rounded = cast(read_bytes(master, position, stop), master.dtype, stored.dtype).view(bits)
            equal += int((rounded == read_bytes(stored, position, stop).view(bits)).sum())
            total, position = total + len(rounded), position + count
    if equal < 0.9 * total:
        what = f"{total - equal} of {total} sampled master weights are not the model's weights before rounding"
        raise CheckpointError(f"{name}: {what}: files of several runs, or of exchanged ranks? Copy them again")
