"""Inspection: what it reports of valid checkpoints, and that it finds each thing that can be wrong with one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_SHAPE, make_checkpoint, randomize
from safetensors.torch import load_file, save_file

import sailvit_cli
from sailvit import SAILViTConfig, SAILViTForImageClassification, SAILViTImageProcessor
from sailvit.convert import LAYOUTS, convert_checkpoint, inspect_checkpoint
from sailvit.convert.storage.safetensors_io import safetensors_header
from sailvit.convert.storage.tensors import NewTensor
from sailvit.convert.synthetic import published_shape


def run(capsys, *arguments: object) -> tuple[int, str]:
    code = sailvit_cli.main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.fixture
def converted(tmp_path) -> Path:
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), tmp_path / "sailvit", max_shard_size="100KB", verify=False)
    return tmp_path / "sailvit"


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Of the shard each lies in; None takes it out."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in changes.items():
        path = folder / weight_map.get(name, "model-00001-of-00006.safetensors")
        tensors = load_file(path)
        tensors.pop(name, None)
        save_file(tensors | ({} if tensor is None else {name: tensor}), path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_checkpoints_are_valid(tmp_path, layout, capsys):
    folder = make_checkpoint(tmp_path / "source", layout)
    code, said = run(capsys, folder)
    assert code == 0 and said.endswith("valid, by its headers\n") and LAYOUTS[layout].title in said
    report = inspect_checkpoint(folder, deep=True)
    assert report.ok and report.layout == layout and report.prefix == LAYOUTS[layout].prefix
    assert (
        report.parameters == 143_680 and set(report.dtypes) == {"float32"} and report.fields["num_attention_heads"] == 2
    )


@pytest.mark.parametrize("size", ["base", "large", "huge", "1b", "3b"])
def test_sizes_are_reported(tmp_path, size):
    shape = published_shape(size)
    folder = tmp_path / "sparse"
    folder.mkdir()
    from sailvit.convert.models.name_tables import tensor_specs

    tensors = [NewTensor(piece.name, "BF16", piece.shape, iter) for piece in tensor_specs(LAYOUTS["timm"], shape)]
    header = safetensors_header(tensors)
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + sum(tensor.nbytes for tensor in tensors))
    report = inspect_checkpoint(folder)
    assert report.ok and report.size == size and report.fields["num_attention_heads"] == shape.hidden_size // 128


def test_a_program_gets_json(converted, capsys):
    code, said = run(capsys, converted, "--json", "--deep")
    report = json.loads(said)
    assert code == 0 and report["whole"] and report["deep"] and report["problems"] == []
    assert report["provenance"]["source"]["name"] == "apple" and report["fields"]["hidden_size"] == 64
    (converted / "modeling_sailvit.py").unlink()
    code, said = run(capsys, converted, "--json")
    assert code == 2 and {problem["kind"] for problem in json.loads(said)["problems"]} == {"code", "missing"}


def test_heads_and_other_components_are_reported(tmp_path, capsys):
    randomize(SAILViTForImageClassification(SAILViTConfig(**TINY))).save_pretrained(tmp_path / "classifier")
    SAILViTImageProcessor(size=56).save_pretrained(tmp_path / "classifier")
    report = inspect_checkpoint(tmp_path / "classifier")
    assert report.ok and report.prefix == "vision_model." and report.others == {"classifier": 4}
    folder = make_checkpoint(tmp_path / "lit", "lit")
    tensors = load_file(folder / "model.safetensors") | {"image_encoder.head.cls_token": torch.ones(1, 1, 64)}
    save_file(tensors, folder / "model.safetensors")
    assert "head         1 tensors, not part of the encoder" in run(capsys, folder)[1]


def damage_config(**changes):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


FC2 = "trunk.blocks.1.mlp.fc2.weight"
SECOND = "model-00002-of-00006.safetensors"


def with_tensor(name: str, tensor: torch.Tensor | None):
    return lambda folder: change_tensors(folder, **{name: tensor})


def with_file(name: str, content: str = ""):
    return lambda folder: (folder / name).write_text(content)


def without(name: str):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "missing tensor": (with_tensor(FC2, None), "shard", f"{FC2}: model.safetensors.index"),
    "unexpected tensor": (with_tensor("cls_token", torch.ones(1)), "shard", "cls_token: in model-00001"),
    "empty tensor": (with_tensor(FC2, torch.empty(0)), "empty", f"{FC2}: empty"),
    "wrong shape": (with_tensor(FC2, torch.ones(64, 95)), "shape", f"{FC2}: expected shape [64, 96], got [64, 95]"),
    "mixed precision": (with_tensor(FC2, torch.ones(64, 96).half()), "mixed", f"{FC2}: expected F32 as in most"),
    "whole numbers": (with_tensor(FC2, torch.ones(64, 96).int()), "dtype", f"{FC2}: expected a floating point dtype"),
    "missing shard": (without(SECOND), "file", f"{SECOND}: the file is missing"),
    "truncated shard": (lambda folder: os.truncate(folder / SECOND, 1000), "file", f"{SECOND}: "),
    "index": (with_file("model.safetensors.index.json", "{}"), "layout", "no index of shards"),
    "config": (damage_config(num_hidden_layers=2), "config", "num_hidden_layers: expected 3 as in the tensors, got 2"),
    "heads": (
        damage_config(num_attention_heads=5),
        "config",
        "num_attention_heads: expected a divisor of the width 64, got 5",
    ),
    "tiles": (
        with_file("preprocessor_config.json", '{"size": 448}'),
        "config",
        "preprocessor_config.json: expected tiles of",
    ),
    "code": (without("configuration_sailvit.py"), "code", "configuration_sailvit.py: missing"),
    "stray weights": (with_file("pytorch_model.bin"), "stray", "pytorch_model.bin: stray"),
    "leftover": (with_file("model.safetensors.part"), "stray", "model.safetensors.part: left over"),
}


def test_all_problems_are_reported_if_one_file_is_unreadable(converted, capsys):
    change_tensors(converted, **{FC2: None})
    (converted / "config.json").write_text("{")
    code, said = run(capsys, converted, "--json")
    problems = {problem["where"] for problem in json.loads(said)["problems"]}
    assert code == 2 and FC2 in problems and any("config.json" in where for where in problems)


def test_a_converted_folder_wants_all_its_files(converted):
    (converted / "config.json").unlink()
    assert ("missing", "config.json") in {
        (problem.kind, problem.location) for problem in inspect_checkpoint(converted).problems
    }


def test_code_that_was_changed_is_found_by_the_provenance(converted):
    with (converted / "modeling_sailvit.py").open("a") as file:
        file.write("print()\n")
    assert inspect_checkpoint(converted).ok
    assert [problem.location for problem in inspect_checkpoint(converted, deep=True).problems] == [
        "modeling_sailvit.py"
    ]


def test_heads_of_a_configuration_are_held_against_the_provenance(converted):
    damage_config(num_attention_heads=4)(converted)
    assert [problem.location for problem in inspect_checkpoint(converted).problems] == ["num_attention_heads"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_folders_are_valid(tmp_path, layout):
    native = make_checkpoint(tmp_path / "native", shape=replace(TINY_SHAPE, grid_size=None))
    for name, source in [("a", make_checkpoint(tmp_path / "apple")), ("n", native)]:
        convert_checkpoint(source, tmp_path / name, to_layout=layout, verify=False)
        report = inspect_checkpoint(tmp_path / name, deep=True)
        assert report.ok and report.layout == layout, report.problems


def test_a_model_saved_without_its_processor_is_valid(tmp_path):
    randomize(SAILViTForImageClassification(SAILViTConfig(**TINY))).save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).ok


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(converted, capsys, kind):
    damage, expected_kind, message = DAMAGE[kind]
    damage(converted)
    code, said = run(capsys, converted)
    assert code == 2 and "INVALID" in said and message in said, said
    assert expected_kind in {problem.kind for problem in inspect_checkpoint(converted).problems}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_deep_finds_what_headers_do_not_show(converted, value):
    path = converted / "model-00003-of-00006.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].view(-1)[7] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert inspect_checkpoint(converted).ok
    kinds = {(problem.kind, problem.location) for problem in inspect_checkpoint(converted, deep=True).problems}
    assert kinds == {("values", name), ("sha256", name)}


def test_deep_finds_a_flipped_bit_by_the_provenance(converted):
    path = converted / "model-00003-of-00006.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert [problem.kind for problem in inspect_checkpoint(converted, deep=True).problems] == ["sha256"]
    (converted / "provenance.json").unlink()
    assert inspect_checkpoint(converted, deep=True).ok


def test_files_of_training_runs_are_no_strays(converted):
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "LICENSE",
        "trainer_state.json",
    ):
        (converted / name).write_bytes(b"{}")
    assert inspect_checkpoint(converted).ok


def test_a_single_file_is_looked_at_alone(tmp_path, converted, capsys):
    shutil.copy(converted / "config.json", tmp_path / "apple" / "config.json")
    assert inspect_checkpoint(tmp_path / "apple" / "model.safetensors").problems[0].kind == "code"
    make_checkpoint(tmp_path / "single", shape=TINY_SHAPE)
    (tmp_path / "single" / "other.bin").write_bytes(b"")
    assert inspect_checkpoint(tmp_path / "single" / "model.safetensors").ok
    code, said = run(capsys, converted / "model-00002-of-00006.safetensors")
    assert code == 2 and "without it the dimensions of the AIMv2 encoder are unknown" in said


def test_a_file_that_is_no_checkpoint_is_reported(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    code, said = run(capsys, tmp_path / "a.safetensors")
    assert code == 2 and "a.safetensors: the file is cut short" in said
    assert sailvit_cli.main(["inspect", str(tmp_path / "nothing")]) == 2


def test_fast_verbs_import_no_torch(converted):
    script = """
import sys, sailvit_cli
try:
    code = sailvit_cli.main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
assert not {"torch", "transformers", "torchvision"} & set(sys.modules), "imported"
sys.exit(code)
"""
    for arguments in (
        ["--help"],
        ["inspect", converted, "--deep"],
        ["convert", converted, f"{converted}-2", "--no-verify"],
    ):
        done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
