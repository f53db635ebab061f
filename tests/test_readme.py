"""What the README says, held against the repository."""

import re
import subprocess

import pytest
import torch
from conftest import ROOT
from toy_sailvl import write_release, write_tokenizer
from transformers import AutoTokenizer

from sailvit import SAILViTImageProcessor, SAILVLForConditionalGeneration, SAILVLProcessor


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def test_tree_names_what_is_there():
    tree = next(text for kind, text in BLOCKS if not kind and "config.json" in text)
    named, folder = [], ""
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+/|[\w.]+\.\w+", line[:30])
        folder = folder if line.startswith(" ") else ""
        named += [folder + name for name in names]
        folder = folder or (names[0] if names[0].endswith("/") else "")
    assert all((ROOT / name).exists() for name in named) and len(named) > len(tree.splitlines())
    files = tracked_files()
    packages = {f"{file.split('/')[0]}/" for file in files if "/" in file and file.endswith(".py")}
    modules = {file for file in files if "/" not in file and file.endswith(".py")}
    assert packages | modules <= set(named)


def test_usage_runs_as_written(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, card, batches = (text for text in PYTHON if "sail-vl" not in text and "chat" not in text)
    scope = {}
    exec(first.replace("sailvit-demo/sailvit", str(folder)), scope)
    assert scope["tokens"].shape == (7, 4, 256)
    exec(card.replace("448, 448", "56, 56"), scope)
    assert scope["output"].last_hidden_state.shape == (1, 16, 64)
    exec(batches, scope)
    image = scope["images"][0]
    turned, alone = (torch.tensor(features) for features in scope["extractor"]([image.rotate(90), image]))
    one_tile = scope["processor"](image, do_tile=False)["pixel_values"]
    torch.testing.assert_close(alone, scope["model"](one_tile).last_hidden_state.float(), rtol=0.1, atol=0.1)
    assert turned.shape == alone.shape == (1, 16, 64) and not torch.equal(turned, alone)


def test_usage_of_the_multimodal_model_runs_as_written(tmp_path, monkeypatch, capsys):
    model = SAILVLForConditionalGeneration.from_pretrained(write_release(tmp_path / "toy"), image_token_id=309)
    size = model.config.vision_config.image_size
    image_processor = SAILViTImageProcessor(size={"height": size, "width": size})
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "words"))
    model.save_pretrained(tmp_path / "saved")
    SAILVLProcessor(image_processor, tokenizer, model.config.image_seq_length).save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    first, chat = (text for text in PYTHON if "sail-vl" in text or "chat" in text)
    scope = {}
    exec(first.replace('"sail-vl"', repr(str(tmp_path / "saved"))), scope)
    exec(chat, scope)
    assert scope["tiles"].shape == (7, 3, size, size) and len(scope["history"]) == 1
    assert scope["history"][0][1] == capsys.readouterr().out.strip()


def test_ci_runs_the_readmes_test_command():
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/(.*?)/", script)[1].replace(r"\(", "(").replace(r"\)", ")")
    assert len([command for command in commands if re.search(pattern, command)]) == 1
