"""
Folders of DeepSpeed: under ZeRO every process has files of its own, and in those of the optimizer lie the float32
masters. Opening reads what describes them; of the moments beside them nothing is read.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import Any

from .errors import CheckpointError
from .sharded_tensors import ConcatenatedTensor, FlatSlice
from .sources import Source
from .tensors import FLOAT_BITS, StoredTensor, cast, read_bytes
from .torch_pickle import OpaqueObject, read_saved


MASTERS = "masters"  # in Checkpoint.engine: the names of what was trained, where the engine says so

# Objects of DeepSpeed in its files; each becomes a record of what it holds.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}

SAMPLE = 64  # masters of a run that are held against the model's weights

OPTIMIZER_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


class ZeroCheckpoint:
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
        self._check_rounded(masters, first["module"])
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
        if len({(len(state["groups"]), _stage_of(state)) for state in states}) > 1:
            raise CheckpointError(f"{self.name}: its *_optim_states.pt are not of one run: copy them again")
        return states

    def _check_rounded(self, masters: Mapping[str, ConcatenatedTensor], module: Mapping[str, Any]) -> None:
        """
        Holds the beginning of every run of masters against the weights that the model's files have of them.

        Raises:
            CheckpointError: They are not the same, rounded.
        """
        equal = total = 0
        for name, master in masters.items():
            held, at = module.get(name), 0
            if not isinstance(held, StoredTensor) or held.shape != master.shape or held.dtype not in FLOAT_BITS:
                continue  # as under ZeRO-3, which has no weights there
            for run in master.runs:
                stop, bits = at + min(run.count, SAMPLE), FLOAT_BITS[held.dtype][0]
                own = cast(read_bytes(master, at, stop), master.dtype, held.dtype).view(bits)
                equal += int((own == read_bytes(held, at, stop).view(bits)).sum())
                total, at = total + len(own), at + run.count
        if equal < 0.9 * total:
            what = f"{total - equal} of {total} masters that were looked at are not the model's weights before rounding"
            raise CheckpointError(f"{self.name}: {what}: files of several runs, or of exchanged ranks? Copy them again")

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
            tensors[name] = ConcatenatedTensor(parts[0].file, parts[0].dtype, tuple(shape), runs=tuple(runs))
        return tensors

    def _masters_of_3(
        self, model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]
    ) -> dict[str, StoredTensor]:
        """Every parameter is cut into equal shares, one a rank, the last ones padded; a rank has its shares in line."""
        lines = [FlatBuffer(state["groups"]) for state in optimizers]
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
            line, at = FlatBuffer([state["groups"][index] for state in optimizers]), 0
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
    stage = _stage_of(optimizers[0]) if stage == 2 else stage
    return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"


def _stage_of(optimizer: Mapping[str, Any]) -> Any:
    said = optimizer.get("zero_stage", 1)
    return said.made[0] if isinstance(said, OpaqueObject) and said.made else said


def _are_flat(groups: Any) -> bool:
    return isinstance(groups, list) and all(isinstance(g, StoredTensor) and len(g.shape) == 1 for g in groups)


def _shares(parts: Sequence[StoredTensor], share: int, count: int) -> list[FlatSlice]:
    return [FlatSlice(part, 0, max(min(share, count - rank * share), 0)) for rank, part in enumerate(parts)]


def _joined(lines: Sequence["FlatBuffer"], shape: tuple[int, ...], runs: Sequence[FlatSlice]) -> ConcatenatedTensor:
    head = runs[0].tensor if runs else lines[0].parts[0]
    return ConcatenatedTensor(head.file, head.dtype, shape, runs=tuple(runs))


class FlatBuffer:
    """Flat tensors as if they were one."""

    def __init__(self, parts: Sequence[StoredTensor]):
        self.parts = parts
        self.starts = [0, *accumulate(math.prod(part.shape) for part in parts)]
        self.count = self.starts[-1]

    def runs(self, start: int, count: int, where: str) -> list[FlatSlice]:
        """The runs in which `count` elements from `start` on lie."""
        if start + count > self.count:
            raise CheckpointError(f"{where}: its files have fewer masters than there are parameters: copy them again")
        found, stop = [], start + count
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[index + 1])
            if end > start:
                found.append(FlatSlice(self.parts[index], start - self.starts[index], end - start))
            start, index = end, index + 1
        return found
