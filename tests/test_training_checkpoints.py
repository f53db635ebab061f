"""
What training engines leave. The slow tests read folders that the engines themselves wrote, on several processes, and
hold them against the weights that were alive at that moment; the fast ones write the same files by hand.
"""

import enum
import json
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SHAPE, published_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata

from sailvit.convert import CheckpointError, convert_checkpoint, inspect_checkpoint
from sailvit.convert.models.aimv2_names import LAYOUTS
from sailvit.convert.models.name_tables import tensor_specs
from sailvit.convert.storage.checkpoint import Checkpoint, FileCheckpoint, check_values
from sailvit.convert.storage.overlay import Overlay
from sailvit.convert.storage.sources import find_source
from sailvit.convert.storage.tensors import StoredTensor, torch_name
from sailvit.convert.storage.training_run import open_checkpoint, training_notes


def read(stored: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    chunks = [np.empty(0, np.uint8), *stored.chunks(start, stop)]
    data = torch.from_numpy(np.concatenate(chunks))
    numbers = data.view(getattr(torch, torch_name(stored.dtype))) if len(data) else torch.empty(0)
    return numbers.reshape(stored.shape) if (start, stop) == (0, None) else numbers


def assert_same(checkpoint: Checkpoint, truth: dict[str, torch.Tensor]) -> None:
    """Every tensor, bit by bit, in the precision it should have."""
    assert checkpoint.weight_map.keys() == truth.keys()
    for name, tensor in truth.items():
        found = read(checkpoint[name])
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def opened(folder: Path, trust: bool = False) -> Checkpoint:
    return FileCheckpoint(*find_source(str(folder)), trust)


def tower_tensors(prefix: str = "vision_model.", seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + piece.name: torch.randn(piece.shape, generator=generator)
        for piece in tensor_specs(LAYOUTS["sailvit"], TINY_SHAPE)
    }


# Files of DeepSpeed, written by hand


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self):
        self.cur_scale, self.dynamic = 1.0, False


class fragment_address:  # noqa: N801
    def __init__(self):
        self.numel, self.start = 1, 0


@pytest.fixture
def deepspeed(monkeypatch):
    """Its classes under their names, as far as its files have them."""
    for module, owned in [
        ("deepspeed.runtime.zero.config", ZeroStageEnum),
        ("deepspeed.runtime.fp16.loss_scaler", LossScaler),
        ("deepspeed.utils.tensor_fragment", fragment_address),
    ]:
        packages = module.split(".")
        for depth in range(1, len(packages) + 1):
            monkeypatch.setitem(sys.modules, ".".join(packages[:depth]), types.ModuleType(packages[0]))
        monkeypatch.setattr(owned, "__module__", module)
        setattr(sys.modules[module], owned.__name__, owned)


def model_state(groups: list[dict[str, torch.Tensor]], frozen: dict[str, torch.Tensor], ranks: int) -> dict:
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in frozen.items()),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(frozen),
        "global_steps": 7,
        "global_samples": 70,
        "dp_world_size": ranks,
        "ds_version": "0.19.8",
    }


def save_optimizer(folder: Path, rank: int, stage: int, parts: list[torch.Tensor], ranks: int) -> None:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    state = {
        "zero_stage": ZeroStageEnum(stage),
        "loss_scaler": LossScaler(),
        "partition_count": ranks if stage == 3 else [ranks] * len(parts),
        "base_optimizer_state": {"state": {0: {"exp_avg": torch.full((50_000,), float("nan"))}}},
        "param_slice_mappings": [OrderedDict(a=fragment_address())],
        key: parts,
    }
    file = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, file)


def shares(tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Equal shares of a flat tensor, the last of them padded."""
    flat = tensor.reshape(-1)
    each = -(-flat.numel() // ranks)
    return [*torch.cat([flat, torch.full((each * ranks - flat.numel(),), 9.0, dtype=flat.dtype)]).split(each)]


def write_zero3(
    root: Path, groups: list[dict[str, torch.Tensor]], frozen: dict[str, torch.Tensor], ranks: int, **changes
) -> Path:
    folder = root / "global_step7"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    for rank in range(ranks):
        state = model_state(groups, frozen, ranks)
        state["module"] = {name: torch.empty(0) for group in groups for name in group}
        state["frozen_param_fragments"] = OrderedDict((n, shares(t, ranks)[rank].clone()) for n, t in frozen.items())
        torch.save({**state, **changes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        parts = [torch.cat([shares(tensor, ranks)[rank] for tensor in group.values()]) for group in groups]
        save_optimizer(folder, rank, 3, parts, ranks)
    return root


def write_zero2(
    root: Path, groups: list[dict[str, torch.Tensor]], frozen: dict[str, torch.Tensor], ranks: int, stage: int = 2,
    **changes,
) -> Path:  # fmt: skip
    folder = root / "global_step7"
    folder.mkdir(parents=True)
    (root / "latest").write_text("global_step7\n")
    state = model_state(groups, frozen, ranks)
    held = {name: tensor for group in groups for name, tensor in group.items()}
    state["module"] = {name: tensor.bfloat16() for name, tensor in (held | frozen).items()}
    torch.save({**state, **changes}, folder / "mp_rank_00_model_states.pt")
    lines = [torch.cat([tensor.reshape(-1) for tensor in group.values()]) for group in groups]
    parts = [[*line.tensor_split(ranks)] for line in lines]
    for rank in range(ranks):
        save_optimizer(folder, rank, stage, [part[rank].clone() for part in parts], ranks)
    return root


WRITERS = {3: write_zero3, 2: write_zero2}
SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=5)


@pytest.mark.parametrize("stage", [2, 3])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=SHAPES, second=SHAPES, frozen=SHAPES, ranks=st.integers(1, 5))
def test_parameters_in_parts_are_put_together(tmp_path_factory, deepspeed, stage, first, second, frozen, ranks):
    groups = [
        {f"{g}.{i}": torch.randn(shape) for i, shape in enumerate(group)} for g, group in [(0, first), (1, second)]
    ]
    still = {f"frozen.{i}": torch.randn(shape).bfloat16() for i, shape in enumerate(frozen)}
    root = WRITERS[stage](tmp_path_factory.mktemp("zero") / "run", groups, still, ranks)
    assert_same(opened(root), groups[0] | groups[1] | still)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_part_of_a_tensor_in_parts_is_read(tmp_path, deepspeed, stage):
    tensor = torch.randn(7, 11)
    stored = opened(WRITERS[stage](tmp_path / "run", [{"a": torch.randn(3), "b": tensor}], {}, 4))["b"]
    for start in range(0, 77, 5):
        for stop in range(start, 78, 3):
            assert torch.equal(read(stored, start, stop), tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tied_head_is_there_under_both_names(tmp_path, deepspeed, stage):
    tensors, frozen = {"embed": torch.randn(5, 3)}, {"still": torch.randn(2).bfloat16()}
    twins = {"head": "embed", "still.twin": "still"}
    root = WRITERS[stage](tmp_path / "run", [tensors], frozen, 2, shared_params=twins)
    truth = tensors | frozen | {"head": tensors["embed"], "still.twin": frozen["still"]}
    assert_same(opened(root), truth)


def test_padding_between_parameters_is_left_out(tmp_path, deepspeed):
    tensors = {"a": torch.randn(3), "b": torch.randn(5)}
    padded = torch.cat([tensors["a"], torch.zeros(5), tensors["b"], torch.zeros(3)])
    root = write_zero2(tmp_path / "run", [tensors], {}, 2)
    for rank, part in enumerate(padded.split(8)):
        save_optimizer(root / "global_step7", rank, 2, [part.clone()], 2)
        file = root / "global_step7" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = torch.load(file, weights_only=False)
        content["optimizer_state_dict"]["param_alignment_paddings"] = [[5, 3]]
        torch.save(content, file)
    assert_same(opened(root), tensors)


def test_stage_1_saves_frozen_parameters_in_the_model_alone(tmp_path, deepspeed):
    root = write_zero2(tmp_path / "run", [{"a": torch.randn(4)}], {"b": torch.randn(3)}, 2, stage=1,
                       frozen_param_shapes=None, frozen_param_fragments=None)  # fmt: skip
    checkpoint = opened(root)
    assert {name: checkpoint[name].dtype for name in checkpoint.weight_map} == {"a": "F32", "b": "BF16"}
    assert checkpoint.training_metadata == {
        "engine": "DeepSpeed ZeRO-1", "engine_version": "0.19.8", "ranks": 2, "step": 7, "samples": 70,
    }  # fmt: skip


def test_masters_of_other_weights_are_refused(tmp_path, deepspeed):
    tensors = {"a": torch.randn(400), "b": torch.randn(300)}
    root = write_zero2(tmp_path / "run", [tensors], {}, 2) / "global_step7"
    other = write_zero2(tmp_path / "other", [{name: t + 1 for name, t in tensors.items()}], {}, 2) / "global_step7"
    files = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    for damage in ([(root / files[1], root / files[0])], [(other / files[1], root / files[1])]):
        kept = {file: (root / file).read_bytes() for file in files}
        for source, target in damage:
            target.write_bytes(source.read_bytes())
        with pytest.raises(CheckpointError, match="are not the model's weights before rounding"):
            opened(root.parent).weight_map  # noqa: B018
        for file, content in kept.items():
            (root / file).write_bytes(content)
    (root.parent / "latest").unlink()  # the masters are found all the same
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, root.parent / "model.safetensors")
    assert_same(opened(root.parent), tensors)


def test_plain_training_metadata_of_a_file_is_reported(tmp_path, deepspeed):
    for version in ({1, 2}, "x" * 99, "a\nb", "/home/me"):
        root = write_zero2(tmp_path / str(hash(str(version))), [{"a": torch.ones(4)}], {}, 1, ds_version=version)
        assert "engine_version" not in opened(root).training_metadata


def test_deepspeed_without_zero_is_read(tmp_path):
    (tmp_path / "step").mkdir()
    state = {"module": {"a": torch.ones(3)}, "param_shapes": None, "dp_world_size": 2, "global_steps": 1}
    torch.save(state, tmp_path / "step" / "mp_rank_00_model_states.pt")
    assert_same(opened(tmp_path), {"a": torch.ones(3)})
    assert_same(opened(tmp_path / "step"), {"a": torch.ones(3)})


def test_masters_are_preferred_and_the_folder_of_the_engine_can_be_named(tmp_path, deepspeed):
    tensors = {"a": torch.randn(40)}
    root = write_zero3(tmp_path / "checkpoint-7", [tensors], {}, 2)
    save_file({"a": tensors["a"].bfloat16()}, root / "model.safetensors")
    (root / "config.json").write_text('{"model_type": "mine"}')
    for named in (root, root / "global_step7"):
        checkpoint = opened(named)
        assert_same(checkpoint, tensors)
        assert checkpoint.entry == "global_step7/*_states.pt"
        assert checkpoint.document("config.json") == {"model_type": "mine"}
    assert_same(opened(root / "model.safetensors"), {"a": tensors["a"].bfloat16()})


def test_the_moments_of_the_optimizer_are_not_read(tmp_path, deepspeed):
    if not Path("/proc/self/io").exists():
        pytest.skip("nothing here counts the bytes that are read")
    tensors = {"a": torch.randn(40)}
    root = write_zero3(tmp_path / "run", [tensors], {}, 1)
    file = root / "global_step7" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"] = {"exp_avg": torch.zeros(4_000_000)}
    torch.save(content, file)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert_same(opened(root), tensors)
    assert bytes_read() - before < 1_000_000 < file.stat().st_size


# What is wrong with them


def test_files_of_ranks_that_are_missing_or_foreign_are_named(tmp_path, deepspeed):
    tensors = {"a": torch.randn(40)}
    for kind in ("model", "optim"):
        root = write_zero3(tmp_path / kind, [tensors], {}, 3)
        lost = next((root / "global_step7").glob(f"*rank_1_*{kind}_states.pt"))
        lost.unlink()
        with pytest.raises(CheckpointError, match=rf"{lost.name}: missing, as 1 of 3 ranks.*copy it"):
            opened(root).weight_map  # noqa: B018
        torch.save({}, lost.with_name(lost.name.replace("rank_1", "rank_8")))
        with pytest.raises(CheckpointError, match=lost.name.split("rank_1")[0]):
            opened(root).weight_map  # noqa: B018
    root = write_zero2(tmp_path / "two", [tensors], {}, 2)
    save_optimizer(root / "global_step7", 2, 2, [torch.zeros(20)], 2)
    with pytest.raises(CheckpointError, match=r"rank_2_mp_rank_00_optim.*left over from another run.*remove it"):
        opened(root).weight_map  # noqa: B018


def test_files_of_several_runs_are_refused(tmp_path, deepspeed):
    tensors = {"a": torch.randn(40), "b": torch.randn(3)}
    root = write_zero3(tmp_path / "one", [tensors], {}, 2)
    other = write_zero3(tmp_path / "other", [tensors], {}, 2, global_steps=9)
    file = "global_step7/zero_pp_rank_1_mp_rank_00_model_states.pt"
    (root / file).write_bytes((other / file).read_bytes())
    with pytest.raises(CheckpointError, match=r"rank_1_.*its global_steps are not those of rank 0"):
        opened(root).weight_map  # noqa: B018
    for stage in (2, 3):
        root = WRITERS[stage](tmp_path / f"masters-{stage}", [tensors], {}, 2)
        for size in (1, 500):
            save_optimizer(root / "global_step7", 1, stage, [torch.zeros(size)], 2)
            with pytest.raises(CheckpointError, match=r"global_step7.*opy"):
                opened(root).weight_map  # noqa: B018


def test_tensor_parallelism_pipelines_and_lost_masters_are_refused(tmp_path, deepspeed):
    root = write_zero2(tmp_path / "run", [{"a": torch.randn(4)}], {}, 1)
    folder = root / "global_step7"
    (folder / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        opened(root).weight_map  # noqa: B018
    (folder / "mp_rank_01_model_states.pt").unlink()
    next(folder.glob("*optim*")).unlink()
    with pytest.raises(CheckpointError, match=r"no \*_optim_states\.pt, which have the fp32 master weights"):
        opened(root).weight_map  # noqa: B018
    torch.save({"module": None}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="pipelines"):
        opened(root).weight_map  # noqa: B018


@pytest.mark.parametrize("tag", ["../global_step7", "/etc", "global_step8", "..", ".", ""])
def test_latest_does_not_lead_elsewhere(tmp_path, deepspeed, tag):
    root = write_zero3(tmp_path / "run", [{"a": torch.randn(4)}], {}, 1)
    (root / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="`latest` names"):
        find_source(str(root))


def test_of_several_steps_one_has_to_be_named(tmp_path, deepspeed):
    root = write_zero3(tmp_path / "run", [{"a": torch.randn(4)}], {}, 1)
    (root / "global_step7").rename(root / "global_step6")
    write_zero3(tmp_path / "other", [{"a": torch.randn(4)}], {}, 1)
    (tmp_path / "other" / "global_step7").rename(root / "global_step7")
    assert opened(root).entry == "global_step7/*_states.pt"
    (root / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"\(global_step6, global_step7\): name one"):
        find_source(str(root))
    assert opened(root / "global_step6").weight_map
    for step in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / "trained" / step).mkdir(parents=True)
        save_file({"a": torch.ones(2)}, tmp_path / "trained" / step / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"several steps .checkpoint-10, checkpoint-5.: name one"):
        find_source(str(tmp_path / "trained"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_broken_is_one_error_that_names_the_file(tmp_path_factory, deepspeed, data):
    root = write_zero3(tmp_path_factory.mktemp("zero") / "run", [{"a": torch.randn(4)}], {"b": torch.ones(2)}, 2)
    file = data.draw(st.sampled_from(sorted((root / "global_step7").iterdir())))
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[start] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[start:]
    file.write_bytes(content)
    try:
        checkpoint = opened(root)
        for name in checkpoint.weight_map:
            read(checkpoint[name])
    except CheckpointError as error:
        assert str(root) in str(error) and "\n" not in str(error)


# Pickles that want to run code


class Code:
    """What runs `touch opened` where pickles are trusted."""

    def __reduce__(self):
        return os.system, ("touch opened",)


class Hook:
    """What changes a function that the reader gives out, or calls what it should not."""

    def __init__(self, function, state):
        self.function, self.state = function, state

    def __reduce__(self):
        return getattr, (self.function, "__class__"), self.state


def infect(path: Path, code: object) -> None:
    content = torch.load(path, weights_only=False)
    torch.save({**content, "code": code}, path)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_crafted_file_of_deepspeed_is_refused_and_runs_nothing(tmp_path, deepspeed, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tensors = {"a": torch.randn(4)}
    root = write_zero3(tmp_path / "run", [tensors], {}, 2)
    infect(next((root / "global_step7").glob(f"*rank_1_*{kind}_states.pt")), Code())
    with pytest.raises(CheckpointError, match=r"states\.pt: opening it could run code .*system.*--trust-pickle"):
        opened(root).weight_map  # noqa: B018
    assert_same(opened(root, trust=True), tensors)  # what is trusted is passed over, not run
    assert not Path("opened").exists()


@pytest.mark.parametrize("code", [Hook(print, {"__defaults__": (1,)}), Hook(os.system, None), sys.exit, print, type])
def test_no_function_is_reached(tmp_path, deepspeed, code):
    root = write_zero3(tmp_path / "run", [{"a": torch.randn(4)}], {}, 1)
    infect(next((root / "global_step7").glob("*model_states.pt")), code)
    with pytest.raises(CheckpointError, match="could run code"):
        opened(root).weight_map  # noqa: B018


def raw_pickle(path: Path, program: bytes) -> None:
    """A file of torch.save with another program in it."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/byteorder", "little")


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + REBUILD + b"}X\x0c\x00\x00\x00__defaults__K\x01sb.",  # a state for what the reader gives out
        b"\x80\x02" + REBUILD + b"N}X\x09\x00\x00\x00_functionNs\x86b.",
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aNs\x86b.",
        b"\x80\x02ctorch\nSize\n(K\x01K\x02tR.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02" + REBUILD + b")R.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x04\x8c\x05torch\x8c\x13_utils.sys.modules.\x93.",
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02}\x94" + b"\x8c" * 99,
        b"",
    ],
)
def test_crafted_programs_come_to_nothing(tmp_path, program):
    raw_pickle(tmp_path / "mp_rank_00_model_states.pt", program)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt"):
        opened(tmp_path).weight_map  # noqa: B018


class Moved:
    """A tensor with a state, which would put it elsewhere in its file."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __reduce__(self):
        return *self.tensor.__reduce_ex__(2)[:2], {"offset": -400}


def test_a_tensor_is_not_moved_by_what_follows_it(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"a": Moved(torch.arange(6.0))}, "param_shapes": None}, path)
    with pytest.raises(CheckpointError, match="a tensor has no state"):
        opened(tmp_path).weight_map  # noqa: B018


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"a": torch.arange(6.0)}, "param_shapes": None}, path)
    content = path.read_bytes()
    shape = b"K\x06\x85"  # (6,)
    assert content.count(shape) == 1
    path.write_bytes(content.replace(shape, b"K\x07\x85"))
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt"):  # by its length, or by its checksum
        opened(tmp_path).weight_map  # noqa: B018


# Distributed checkpoints


def write_boxes(folder: Path, tensors: dict[str, tuple[torch.Tensor, list[list[int]]]], top: str = "model") -> Path:
    """A distributed checkpoint as several processes write it: tensors cut at the given places of every dimension."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(parents=True)
    described, storage, planned = {}, {}, {}
    for name, (tensor, cuts) in tensors.items():
        fqn, chunks = (f"{top}.{name}" if top else name), []
        for number, spans in enumerate(_spans([*tensor.shape], cuts)):
            offsets, sizes = torch.Size(a for a, _ in spans), torch.Size(b - a for a, b in spans)
            chunks.append(dcp_metadata.ChunkStorageMetadata(offsets, sizes))
            file = f"__{number % 3}_0.distcp"
            with (folder / file).open("ab") as out:
                start = out.tell()
                torch.save(tensor[tuple(slice(a, b) for a, b in spans)].clone(), out)
                storage[dcp_metadata.MetadataIndex(fqn, offsets)] = _StorageInfo(file, start, out.tell() - start)
        described[fqn] = dcp_metadata.TensorStorageMetadata(
            dcp_metadata.TensorProperties.create_from_tensor(tensor), tensor.shape, chunks
        )
        planned[fqn] = (top, name) if top else (name,)
    metadata = dcp_metadata.Metadata(described, planned, storage, dcp_metadata.StorageMeta(checkpoint_id=folder))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def _spans(shape: list[int], cuts: list[list[int]]) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[]]
    for size, places in zip(shape, cuts, strict=True):
        edges = sorted({0, size, *(place % size for place in places)})
        found = [[*spans, span] for spans in found for span in pairwise(edges)]
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_are_put_together_as_torch_does(tmp_path_factory, data):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    cut = {}
    for index in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
        tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64])))
        cut[f"layer.{index}"] = (tensor, [data.draw(st.lists(st.integers(0, 9), max_size=3)) for _ in shape])
    folder = write_boxes(tmp_path_factory.mktemp("dcp") / "run", cut)
    dcp_to_torch_save(folder, folder.parent / "whole.pt")
    checkpoint = opened(folder)
    assert_same(checkpoint, torch.load(folder.parent / "whole.pt")["model"])
    for name, (tensor, _) in cut.items():
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
        assert torch.equal(read(checkpoint[name], start, stop), tensor.reshape(-1)[start:stop])


def test_large_boxes_are_read_in_slabs(tmp_path):
    tensor = torch.randn(3000, 700)
    stored = opened(write_boxes(tmp_path / "run", {"a": (tensor, [[1000, 1001], [300]])}))["a"]
    assert torch.equal(read(stored), tensor) and len([*stored.chunks()]) > 7
    assert torch.equal(read(stored, 699_999, 2_000_001), tensor.reshape(-1)[699_999:2_000_001])


def test_values_are_not_read_where_nothing_recorded_them(tmp_path, deepspeed):
    run = write_zero3(tmp_path / "zero", [{"a": torch.ones(4)}], {}, 1)
    for folder in (write_boxes(tmp_path / "dcp", {"a": (torch.ones(4), [[]])}), run):
        checkpoint = opened(folder)
        tensors = {"a": checkpoint["a"]}
        for file in folder.rglob("*"):
            if file.suffix in (".distcp", ".pt"):
                os.truncate(file, 0)
        check_values(checkpoint, tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_writes_in_one_process_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = {"model": model.state_dict(), "optim": {"state": {"0.weight": {"exp_avg": torch.ones(4, 3)}}}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "nested", no_dist=True)
    dcp.save(model.state_dict() | {"strided": torch.ones(6, 4).t()}, checkpoint_id=tmp_path / "flat", no_dist=True)
    assert_same(opened(tmp_path / "nested"), model.state_dict())
    assert_same(opened(tmp_path / "flat"), model.state_dict() | {"strided": torch.ones(4, 6)})
    dcp.save({"one": {"a": torch.ones(2)}, "two": {"a": torch.ones(2)}}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(CheckpointError, match="none or several of its parts could be the model: one, two"):
        opened(tmp_path / "two").weight_map  # noqa: B018


def change_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def add_empty_shard(metadata, name: str, file: str) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    offsets, sizes = torch.Size([6, 0]), torch.Size([0, 4])
    metadata.state_dict_metadata[name].chunks.append(dcp_metadata.ChunkStorageMetadata(offsets, sizes))
    metadata.storage_data[dcp_metadata.MetadataIndex(name, offsets)] = _StorageInfo(file, 0, 8)


@pytest.mark.parametrize("file", ["../secret.distcp", "/etc/passwd", "a/../../b", "..\\a"])
def test_metadata_that_leave_their_folder_are_refused(tmp_path, file):
    folder = write_boxes(tmp_path / "run", {"a": (torch.randn(4), [[]])})
    change_metadata(folder, lambda m: [setattr(info, "relative_path", file) for info in m.storage_data.values()])
    with pytest.raises(CheckpointError, match="is outside its folder"):
        opened(folder).weight_map  # noqa: B018


def test_crafted_metadata_and_boxes_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_boxes(tmp_path / "run", {"a": (torch.randn(4), [[]])})
    change_metadata(folder, lambda m: setattr(m, "version", Code()))
    with pytest.raises(CheckpointError, match=r"\.metadata: opening it could run code .*system"):
        opened(folder).weight_map  # noqa: B018
    assert opened(folder, trust=True).weight_map and not Path("opened").exists()
    other = write_boxes(tmp_path / "other", {"a": (torch.randn(4), [[]])})
    with (other / "__0_0.distcp").open("wb") as file:
        torch.save(Code(), file)
        length = file.tell()
    change_metadata(other, lambda m: [setattr(info, "length", length) for info in m.storage_data.values()])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: opening it could run code .*system"):
        read(opened(other)["a"])
    assert not Path("opened").exists()


def test_boxes_that_are_missing_overlap_or_are_cut_are_named(tmp_path):
    def folder(name: str) -> Path:
        return write_boxes(tmp_path / name, {"a": (torch.randn(6, 4), [[2, 4], []]), "b": (torch.randn(3), [[]])})

    missing = folder("missing")
    (missing / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: the file is missing"):
        opened(missing).weight_map  # noqa: B018
    bare = folder("bare")
    (bare / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: the file is missing"):
        opened(bare).weight_map  # noqa: B018
    hole, twice = folder("hole"), folder("twice")
    change_metadata(hole, lambda m: m.state_dict_metadata["model.a"].chunks.pop())
    change_metadata(twice, lambda m: m.state_dict_metadata["model.a"].chunks.append(
        dcp_metadata.ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 4]))))  # fmt: skip
    for broken in (hole, twice):
        with pytest.raises(CheckpointError, match=r"model\.a: its shards do not make \[6, 4\]"):
            opened(broken).weight_map  # noqa: B018
    empty = folder("empty")
    change_metadata(empty, lambda m: add_empty_shard(m, "model.a", "__7_0.distcp"))
    assert read(opened(empty)["a"]).shape == (6, 4)  # without the file, which has nothing of it
    cut, foreign = folder("cut"), folder("foreign")
    os.truncate(cut / "__2_0.distcp", 100)
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp"):
        read(opened(cut)["a"])
    other = write_boxes(tmp_path / "else", {"a": (torch.randn(9, 4), [[3, 6], []]), "b": (torch.randn(3), [[]])})
    (foreign / "__1_0.distcp").write_bytes((other / "__1_0.distcp").read_bytes())
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        read(opened(foreign)["a"])


# Bases


def write_base(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vision_config": published_config("sailvit")}))
    return folder


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.module."])
def test_what_a_stage_did_not_save_or_rounded_comes_from_the_base(tmp_path, deepspeed, prefix):
    base = {"vision.a": torch.randn(8, 3), "vision.b": torch.randn(5), "rest": torch.randn(4), "moved": torch.randn(4)}
    folder = write_base(tmp_path / "base", base)
    trained = {prefix + "vision.a": torch.randn(8, 3)}
    frozen = {prefix + "vision.b": base["vision.b"].bfloat16(), prefix + "moved": torch.randn(4).bfloat16()}
    run = write_zero3(tmp_path / "run", [trained], frozen, 2)
    checkpoint = open_checkpoint(str(run), base=str(folder))
    kept = "" if "mod" in prefix and prefix != "model." else prefix
    rest = {kept + "rest": base["rest"]}
    assert_same(checkpoint, trained | frozen | {prefix + "vision.b": base["vision.b"]} | rest)
    facts = checkpoint.training_metadata["base"]
    assert facts == {"name": "base", "revision": None, "exact": 1, "rounded": [prefix + "moved"]}
    assert "1 rounded tensors exact" in " ".join(training_notes(checkpoint))
    assert checkpoint.document("config.json")["vision_config"] and checkpoint.default_dtype() == "float32"
    assert opened(run).default_dtype() == "float32" and opened(run).default_dtype([*trained]) is None


def test_empty_tensors_of_zero_3_come_from_the_base(tmp_path):
    (tmp_path / "run").mkdir()
    save_file({"a": torch.ones(2), "b": torch.empty(0)}, tmp_path / "run" / "model.safetensors")
    base = write_base(tmp_path / "base", {"a": torch.zeros(2), "b": torch.ones(3)})
    assert_same(open_checkpoint(str(tmp_path / "run"), base=str(base)), {"a": torch.ones(2), "b": torch.ones(3)})


def test_only_the_shards_that_are_needed_are_opened(tmp_path):
    for side in ("run", "base"):
        (tmp_path / side).mkdir()
        save_file({"a": torch.ones(2)}, tmp_path / side / "one.safetensors")
        (tmp_path / side / "two.safetensors").write_bytes(b"garbage")
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        (tmp_path / side / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(str(tmp_path / "run"), base=str(tmp_path / "base"))
    assert torch.equal(read(checkpoint["a"]), torch.ones(2)) and [*checkpoint.opened] == ["one.safetensors"]
    with pytest.raises(CheckpointError, match=r"run/two\.safetensors"):
        checkpoint["b"]


def test_a_base_of_other_names_is_refused(tmp_path):
    run, base = write_base(tmp_path / "run", {"a": torch.ones(2)}), write_base(tmp_path / "base", {"b": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"no name of .*run: it cannot be its base"):
        open_checkpoint(str(run), base=str(base)).weight_map  # noqa: B018


def test_a_tower_of_masters_and_frozen_parts_is_converted_and_what_is_nowhere_is_named(tmp_path, deepspeed):
    tensors = tower_tensors()
    base = write_base(tmp_path / "base", tensors)
    still = {name: tensors[name].bfloat16() for name in tensors if "preprocessor" in name}
    moved = {name: tensor + 1 for name, tensor in tensors.items() if name not in still}
    run = write_zero3(tmp_path / "run", [moved], still, 4)
    (run / "config.json").write_text((base / "config.json").read_text())
    convert_checkpoint(run, tmp_path / "out", dtype="float32", verify=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name.split(".", 1)[1]], tensor) for name, tensor in moved.items())
    assert all(torch.equal(written[name.split(".", 1)[1]], tensor.float()) for name, tensor in still.items())
    lost = sorted(still)[0]
    bare = write_zero3(tmp_path / "bare", [moved], {}, 4)
    (bare / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"proj\.weight: missing"):
        convert_checkpoint(bare, tmp_path / "out-2")
    assert_same(open_checkpoint(str(bare), base=str(base)), moved | {name: tensors[name] for name in still})
    assert lost in Overlay(opened(bare), opened(base)).weight_map


def test_inspect_reads_them(tmp_path, deepspeed):
    run = write_zero3(tmp_path / "run", [tower_tensors()], {}, 3)
    (run / "config.json").write_text(json.dumps({"vision_config": published_config("sailvit")}))
    save_file({"a": torch.ones(2)}, run / "model.safetensors")
    report = inspect_checkpoint(run, deep=True)
    assert report.ok and report.layout == "sailvit" and [*report.files] == ["global_step7/*_states.pt"]


def test_nothing_here_imports_torch(tmp_path, deepspeed):
    run = write_zero3(tmp_path / "run", [tower_tensors()], {}, 3)
    (run / "config.json").write_text(json.dumps({"vision_config": published_config("sailvit")}))
    script = f"""
import importlib.util, sys
sys.modules["sailvit"] = importlib.util.module_from_spec(importlib.util.find_spec("sailvit"))
from sailvit.convert import convert_checkpoint
import sailvit.convert.storage.training_run
convert_checkpoint({str(run)!r}, {str(tmp_path / "out")!r}, verify=False)
assert not {{"torch", "transformers", "deepspeed"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert load_file(tmp_path / "out" / "model.safetensors")


# Means


def test_a_mean_is_taken_in_float32(tmp_path):
    tensors = [{"a": torch.randn(400_000), "b": torch.randn(3, 5).bfloat16()} for _ in range(3)]
    folders = [str(write_base(tmp_path / f"step-{index}", each)) for index, each in enumerate(tensors)]
    checkpoint = open_checkpoint(folders[0], average=folders[1:])
    for name in ("a", "b"):
        truth = torch.stack([each[name].double() for each in tensors]).mean(0).float()
        assert checkpoint[name].dtype == "F32" and torch.equal(read(checkpoint[name]), truth)
    assert torch.equal(read(checkpoint["a"], 7, 300_001), read(checkpoint["a"])[7:300_001])
    assert [part["name"] for part in checkpoint.training_metadata["mean_of"]] == ["step-0", "step-1", "step-2"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"b": torch.ones(2)}, r"a is in .*one only"),
        ({"a": torch.ones(3)}, r"two: a is \[3\], \[2\] in .*one"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "two: a is I64: there is no mean"),
    ],
)
def test_there_is_no_mean_of_different_models(tmp_path, other, message):
    one, two = write_base(tmp_path / "one", {"a": torch.ones(2)}), write_base(tmp_path / "two", other)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(one), average=[str(two)])["a"]
    with pytest.raises(CheckpointError, match="one is named twice"):
        open_checkpoint(str(one), average=[str(two), f"{one}/"])


# Adapters


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.model = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6, bias=False)})
        self.patches = nn.Conv2d(3, 4, 2, 2)
        self.point = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.model["down"](self.model["up"](self.embed(x))))


def save_adapter(tmp_path: Path, **options) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter to it that peft saved, and what peft merges of them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = Toy()
    base = write_base(tmp_path / "base", {name: tensor.clone() for name, tensor in model.state_dict().items()})
    targets = options.pop("target_modules", ["up", "down"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(1)
    adapted.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["head"], "rank_pattern": {"up": 2}},
        {"target_modules": ["up"], "bias": "all"},
    ],
    ids=["plain", "rslora", "ranks and saved modules", "biases"],
)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, options):
    base, adapter, truth = save_adapter(tmp_path, **options)
    checkpoint = open_checkpoint(str(adapter), base=str(base))
    assert_same(checkpoint, truth)
    stored = checkpoint["model.up.weight"]
    assert torch.equal(read(stored, 5, 20), truth["model.up.weight"].reshape(-1)[5:20])
    facts = checkpoint.training_metadata
    assert facts["adapter"] == {"peft_type": "LORA", "r": 3, "lora_alpha": 5} and facts["base"]["name"] == "base"
    assert checkpoint.default_dtype() == "float32"


def test_an_encoder_of_doubles_with_an_adapter_stays_one_of_doubles(tmp_path):
    base = write_base(tmp_path / "base", {name: tensor.double() for name, tensor in tower_tensors("").items()})
    (tmp_path / "adapter").mkdir()
    name, width = "base_model.model.trunk.blocks.0.attn.proj.lora_{}.weight", TINY_SHAPE.hidden_size
    matrices = {name.format("A"): torch.ones(2, width), name.format("B"): torch.ones(width, 2)}
    save_file(matrices, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    plan = convert_checkpoint(tmp_path / "adapter", tmp_path / "out", base=base, verify=False)
    assert plan.dtype == "F64"
    with pytest.raises(CheckpointError, match="dtype: expected one of float32, bfloat16, float16, got 'float64'"):
        convert_checkpoint(base, tmp_path / "other", dtype="float64")


@pytest.mark.parametrize(("target", "message"), [("embed", "LoRA on embeddings"), ("patches", "is no linear layer")])
def test_lora_on_other_layers_is_refused(tmp_path, target, message):
    base, adapter, _ = save_adapter(tmp_path, target_modules=["up", target])
    with pytest.raises(CheckpointError, match=rf"{message}.*: merge it with peft \(model\.merge_and_unload\(\)\)"):
        open_checkpoint(str(adapter), base=str(base))[f"{target}.weight"]


def test_nan_in_an_adapter_is_the_adapters(tmp_path):
    base, adapter, _ = save_adapter(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t * float("nan") for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: the adapter holds NaN"):
        read(open_checkpoint(str(adapter), base=str(base))["model.up.weight"])


def test_an_adapter_alone_is_recognised(tmp_path):
    _, adapter, _ = save_adapter(tmp_path)
    (problem,) = inspect_checkpoint(adapter).problems
    assert "an adapter of peft, no model" in problem.message


@pytest.mark.parametrize("entry", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside", ["logits.pt", "model.safetensors", "optimizer.bin"])
def test_an_adapter_is_found_among_other_weights_and_by_its_file(tmp_path, entry, beside):
    base, adapter, truth = save_adapter(tmp_path)
    if entry.endswith(".bin"):
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / entry)
        (adapter / "adapter_model.safetensors").unlink()
    if beside.endswith(".safetensors"):
        save_file({"logits": torch.zeros(2)}, adapter / beside)
    else:
        torch.save({"logits": torch.zeros(2)}, adapter / beside)
    for source in (adapter, adapter / entry):
        assert_same(open_checkpoint(str(source), base=str(base)), truth)
        assert any("an adapter of peft, no model" in problem.message for problem in inspect_checkpoint(source).problems)


def test_the_base_of_an_adapter_is_named_or_asked_for(tmp_path):
    base, adapter, truth = save_adapter(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for said, message in [("owner/model", "an adapter to 'owner/model'.*--base"), (None, "an adapter: .*--base")]:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": said}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(adapter))
    with_base = open_checkpoint(str(adapter), base=str(base))
    assert "the adapter was trained on owner/other, by its own account" not in training_notes(with_base)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/other"}))
    with_base = open_checkpoint(str(adapter), base=str(base))
    assert "the adapter was trained on owner/other, by its own account" in training_notes(with_base)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert_same(open_checkpoint(str(adapter)), truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "kind 'LOHA'"),
        ({"use_dora": True}, "with use_dora"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"lora_alpha": "much"}, "not a number"),
        ({"lora_alpha": 10**400}, "not a number"),
        ({"lora_alpha": float("nan")}, "not a number"),
        ({"alpha_pattern": {"up": 3}}, r"with alpha_pattern: merge it with peft"),
        ({"fan_in_fan_out": True}, r"with fan_in_fan_out: merge it with peft"),
    ],
)
def test_other_adapters_are_refused(tmp_path, change, message):
    base, adapter, _ = save_adapter(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(adapter), base=str(base))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    _, adapter, truth = save_adapter(tmp_path)
    other = write_base(tmp_path / "other", {"up.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"which .*other does not have: is it the base"):
        open_checkpoint(str(adapter), base=str(other)).weight_map  # noqa: B018
    wide = write_base(tmp_path / "wide", {name: torch.ones(9, *tensor.shape[1:]) for name, tensor in truth.items()})
    with pytest.raises(CheckpointError, match=r"is not what .* makes: is .*wide the base"):
        open_checkpoint(str(adapter), base=str(wide))["model.up.weight"]
