"""
Checkpoints written by the training engines themselves. tests/data/engines has a small one for each engine, made by
tests/store_engine_folders.py; nightly, the engines of this environment write larger ones on up to four processes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_engine_folders import PROCESSES, STORED, checkpoint_of, describe, run_engine, store
from test_training_checkpoints import assert_same, opened, read
from toy_sailvl import write_release

from sailvit.convert import convert_checkpoint
from sailvit.convert.storage.training_run import open_checkpoint


TITLES = {
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp": "FSDP",
    "fsdp-full": "transformers Trainer",
    "dcp": "torch.distributed.checkpoint",
    "trainer": "transformers Trainer",
}
BASE = STORED / "base"
HEAD = "language_model.lm_head.weight"  # tied: safetensors stores the embeddings only


def truth_of(engine: str) -> dict[str, list]:
    """Name -> [dtype, shape, sha256] of what was in memory when a stored folder was saved."""
    return json.loads((STORED / engine / "truth.json").read_text())


def described(checkpoint) -> dict[str, list]:
    return {name: describe(read(checkpoint[name])) for name in checkpoint.weight_map}


def test_every_engine_has_a_stored_folder():
    assert {path.name for path in STORED.iterdir()} == {"base", *PROCESSES} == {"base", *TITLES, "peft", "zero2-peft"}


@pytest.mark.parametrize("engine", TITLES)
def test_a_stored_folder_has_the_weights_that_were_in_memory(engine):
    checkpoint, truth = opened(STORED / engine / "checkpoint"), truth_of(engine)
    if engine == "trainer":
        del truth[HEAD]
    assert described(checkpoint) == truth
    metadata = checkpoint.training_metadata
    assert metadata["engine"] == TITLES[engine] and metadata.get("ranks", PROCESSES[engine]) == PROCESSES[engine]
    if engine != "dcp":
        assert metadata["step"] == 2 and metadata["tokens_seen"] == 32 * PROCESSES[engine]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_frozen_parameters_that_deepspeed_rounded_are_taken_from_the_base(engine):
    checkpoint, base = open_checkpoint(str(STORED / engine / "checkpoint"), base=str(BASE)), opened(BASE)
    truth = truth_of(engine)
    frozen = {name for name, (dtype, *_) in truth.items() if dtype == "bfloat16"}
    assert len(frozen) == 16
    assert described(checkpoint) == truth | {name: describe(read(base[name])) for name in frozen}
    assert checkpoint.training_metadata["base"] == {"name": "base", "revision": None, "exact": 16}


@pytest.mark.parametrize("engine", ["peft", "zero2-peft"])
def test_a_stored_adapter_is_merged_into_its_base(engine):
    truth = truth_of(engine)
    del truth[HEAD]
    assert described(open_checkpoint(str(STORED / engine / "checkpoint"), base=str(BASE))) == truth


# What the engines of this environment write


@pytest.fixture(scope="session")
def base_release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("engines") / "base", tied=True)


@pytest.fixture(scope="session")
def trained_in(tmp_path_factory, base_release):
    """(engine, processes) -> what tests/run_engine.py made with it; each is made once."""
    made: dict[tuple[str, int], Path] = {}

    def make(engine: str, processes: int) -> Path:
        if (engine, processes) not in made:
            out = tmp_path_factory.mktemp("engines") / f"{engine}-{processes}"
            made[engine, processes] = run_engine(engine, processes, base_release, out)
        return made[engine, processes]

    return make


def by_engines(test: Callable) -> Callable:
    """Nightly, and in one worker, which runs each engine once."""
    return pytest.mark.nightly(pytest.mark.xdist_group("engines")(test))


@by_engines
@pytest.mark.parametrize("engine", PROCESSES)
def test_engines_still_write_what_is_stored(engine, tmp_path):
    """The same files, and in them tensors of the same names, types and shapes."""
    store(engine, BASE, tmp_path / engine)
    stored, new = STORED / engine / "checkpoint", tmp_path / engine / "checkpoint"
    assert files_in(new) == files_in(stored)
    if engine.endswith("peft"):
        return
    old_tensors, new_tensors = opened(stored), opened(new)
    assert new_tensors.weight_map == old_tensors.weight_map
    for name in old_tensors.weight_map:
        old, new = old_tensors[name], new_tensors[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape), name


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@by_engines
@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("zero1", 2),
        ("zero2", 1),
        ("zero2", 2),
        ("zero3", 1),
        ("zero3", 4),
        ("fsdp", 2),
        ("fsdp-full", 2),
        ("dcp", 4),
        ("trainer", 1),
    ],
)
def test_an_engines_folder_has_the_weights_that_were_in_memory(trained_in, engine, processes):
    out = trained_in(engine, processes)
    truth = load_file(out / "truth.safetensors")
    if engine == "trainer":
        del truth[HEAD]
    checkpoint = opened(checkpoint_of(engine, out))
    assert_same(checkpoint, truth)
    metadata = checkpoint.training_metadata
    assert metadata["engine"] == TITLES[engine] and metadata.get("ranks", processes) == processes
    if engine != "dcp":
        assert metadata["step"] == 2 and metadata["tokens_seen"] == 32 * processes


@by_engines
@pytest.mark.parametrize(("engine", "processes"), [("zero1", 2), ("zero2", 2), ("zero3", 4)])
def test_frozen_parameters_come_from_the_base_exactly(trained_in, base_release, engine, processes):
    out = trained_in(engine, processes)
    checkpoint, base = open_checkpoint(str(out / "checkpoint-2"), base=str(base_release)), opened(base_release)
    truth = load_file(out / "truth.safetensors")
    frozen = {name for name, tensor in truth.items() if tensor.dtype == torch.bfloat16}
    assert len(frozen) == 16
    assert_same(checkpoint, truth | {name: read(base[name]) for name in frozen})


@by_engines
@pytest.mark.parametrize(("engine", "processes"), [("peft", 1), ("zero2-peft", 2)])
def test_an_adapter_is_merged_as_peft_merges_it(trained_in, base_release, engine, processes):
    out = trained_in(engine, processes)
    truth = load_file(out / "truth.safetensors")
    del truth[HEAD]
    assert_same(open_checkpoint(str(out / "checkpoint-2"), base=str(base_release)), truth)


@by_engines
@pytest.mark.parametrize(("engine", "processes"), [("zero3", 4), ("zero2", 2)])
def test_the_vision_encoder_of_a_training_stage_loads(trained_in, tmp_path, engine, processes):
    from transformers import AutoModel

    out = trained_in(engine, processes)
    done = convert_checkpoint(out / "checkpoint-2", tmp_path / "vision", part="vision", dtype="float32")
    assert done.verification["relative_difference"] < 1e-5
    truth = load_file(out / "truth.safetensors")
    vision = AutoModel.from_pretrained(tmp_path / "vision", trust_remote_code=True).state_dict()
    assert vision and all(torch.equal(tensor, truth["vision_model." + name].float()) for name, tensor in vision.items())
