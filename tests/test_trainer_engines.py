"""
Training in engines on CPU processes: one and two processes, DDP, ZeRO-2, ZeRO-3 and FSDP2, packed or one sample a pack,
compute the same steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, relative_difference
from safetensors.torch import load_file


pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("engines")]

COMPONENTS = {"vision": "vision_model.", "connector": "mlp1.", "language": "language_model."}
# Adam divides by the root of the second moment: with a small epsilon, noise in a tiny gradient becomes a full step.
RECIPE = {"adam_epsilon": 1e-2, "peak_tflops": 1}
RUNS = {
    "single": (1, "single", {}),
    "single, one sample a pack": (1, "single", {"packing": False}),
    "ddp": (2, "ddp", {}),
    "ddp, one sample a pack": (2, "ddp", {"packing": False}),
    "ddp, 4 processes": (4, "ddp", {}),
    "zero2": (2, "zero2", {}),
    "zero3": (2, "zero3", {}),
    "zero3, one sample a pack": (2, "zero3", {"packing": False}),
    "fsdp2": (2, "fsdp2", {}),
}


def launch(out: Path, processes: int, engine: str, options: dict, **recipe) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if engine != "single":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [json.dumps({"engine": engine, **RECIPE, **recipe}), json.dumps(options), str(out)]
    script = str(ROOT / "tests" / "run_trainer.py")
    path = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [*command, script, *arguments], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):
    """Train once per name and recipe, and return the folder."""
    done: dict[str, Path] = {}

    def run(name: str, **recipe) -> Path:
        key = name + json.dumps(recipe)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("run") / "out"
            result = launch(done[key], *RUNS[name], **recipe)
            assert (done[key] / "weights.safetensors").exists(), result.stdout[-2000:] + result.stderr[-4000:]
        return done[key]

    return run


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_same(folder: Path, expected: Path) -> None:
    logs = [read_log(each) for each in (folder, expected)]
    assert len(logs[0]) == len(logs[1]) == 5
    for entry, other in zip(*logs, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert entry["loss_by_kind"] == pytest.approx(other["loss_by_kind"], rel=1e-5)
        for name in ("samples", "tokens", "answer_tokens", "tiles", "skipped", "learning_rate", "epoch"):
            assert entry[name] == other[name]
    weights = [load_file(each / "weights.safetensors") for each in (folder, expected)]
    assert {*weights[0]} == {*weights[1]}
    for name, tensor in weights[1].items():
        assert relative_difference(weights[0][name], tensor) < 1e-5, name


@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_all_engines_compute_the_same_steps(train, name):
    check_same(train(name), train("single"))


def test_figures_of_several_ranks_are_those_of_all(train):
    """One sample in five is of another kind, which a rank often lacks; `check_same` compares the losses by kind."""
    log, single = read_log(train("ddp")), read_log(train("single"))
    assert {len(entry["loss_by_kind"]) for entry in log} == {1, 2}
    for entry, other in zip(log, single, strict=True):
        for name in ("mfu", "hfu"):
            work, expected = entry[name] * entry["seconds"] * RUNS["ddp"][0], other[name] * other["seconds"]
            assert work == pytest.approx(expected)
        assert entry["tokens_per_second"] == pytest.approx(other["tokens"] / entry["seconds"])
        assert 0 < entry["fill"] <= other["fill"] <= 1 <= entry["balance"]


@pytest.mark.parametrize("name", ["single, one sample a pack", "ddp", "ddp, one sample a pack", "ddp, 4 processes"])
def test_gradients_of_each_component_are_the_same(train, name):
    gradients = [load_file(train(each) / "gradients.safetensors") for each in (name, "single")]
    assert {*gradients[0]} == {*gradients[1]}
    for prefix in COMPONENTS.values():
        flat = [torch.cat([g.flatten() for key, g in each.items() if key.startswith(prefix)]) for each in gradients]
        assert relative_difference(*flat) < 1e-5


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_engines_train_the_connector_alone(train, name):
    """The frozen components are bit-equal in every engine; one sample in three has no image."""
    recipe = {"trainable": ["connector"], "loss_reduction": "square"}
    check_same(train(name, **recipe), train("single", **recipe))
    start = load_file(train("single", **recipe, max_steps=1) / "weights.safetensors")  # warm-up: a learning rate of 0
    for key, tensor in load_file(train(name, **recipe) / "weights.safetensors").items():
        assert torch.equal(tensor, start[key]) != key.startswith("mlp1."), key


@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_a_resumed_run_is_bit_equal(train, name, tmp_path, monkeypatch):
    recipe = {"save_steps": 3, "save_total_limit": 9}
    whole = train(name, **recipe)
    monkeypatch.setenv("RESUME", str(whole / "checkpoint-3"))
    result = launch(tmp_path / "out", *RUNS[name], **recipe)
    assert (tmp_path / "out" / "weights.safetensors").exists(), result.stderr[-4000:]
    log, expected = read_log(tmp_path / "out"), read_log(whole)[3:]
    assert [(e["step"], e["loss"], e["grad_norm"]) for e in log] == [
        (e["step"], e["loss"], e["grad_norm"]) for e in expected
    ]
    weights = load_file(whole / "weights.safetensors")
    for key, tensor in load_file(tmp_path / "out" / "weights.safetensors").items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_engines_train_adapters_with_checkpointing(train, name):
    lora = {"language": {"r": 4, "alpha": 8, "dropout": 0.0}}
    recipe = {"trainable": ["vision", "language"], "lora": lora, "gradient_checkpointing": True}
    check_same(train(name, **recipe), train("single", **recipe))


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_engines_train_rows_of_added_tokens(train, name):
    recipe = {"trainable": ["connector"], "train_added_tokens": True}
    check_same(train(name, **recipe), train("single", **recipe))
    table = "language_model.model.embed_tokens.weight"
    tables = [load_file(train(name, **recipe) / f"{file}.safetensors")[table] for file in ("weights", "start")]
    assert len((tables[0] != tables[1]).any(1).nonzero()) == 2


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_float32_weights_of_zero_are_those_of_the_source(train, name, monkeypatch):
    """The learning rate of the first step is 0; without the reader the weights would be rounded to bfloat16."""
    monkeypatch.setenv("READ_WEIGHTS", "1")
    folder = train(name, precision="bfloat16", max_steps=1, trainable=["vision", "connector"])
    weights, start = (load_file(folder / f"{file}.safetensors") for file in ("weights", "start"))
    for key, tensor in start.items():
        is_frozen = key.startswith("language_model.")
        assert torch.equal(weights[key].float(), tensor.bfloat16().float() if is_frozen else tensor), key
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in start.values())


@pytest.mark.parametrize("name", ["single", "ddp", "zero2", "zero3", "fsdp2"])
def test_losses_in_bfloat16_agree(train, name):
    losses, expected = ([entry["loss"] for entry in read_log(train(*each))] for each in ((name,), ("single",)))
    low = [entry["loss"] for entry in read_log(train(name, precision="bfloat16"))]
    assert low != losses and low == pytest.approx(expected, rel=0.02)


def test_fsdp_that_falls_back_to_ddp_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_SHIM", "1")
    result = launch(tmp_path / "out", 2, "fsdp2", {})
    assert "TrainingError: engine: expected fsdp2, but accelerate runs MULTI_CPU on 2 process(es)" in result.stderr
