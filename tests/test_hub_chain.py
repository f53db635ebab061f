"""End to end: compose two components, train a step, convert, publish, and load in a clean process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH
from fake_hub import OWNER, TOKEN, serve_writable
from safetensors.torch import load_file
from toy_sailvl import write_release


TRAIN = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
path, out, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "a cub"}]}]
example = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
example["labels"] = example["input_ids"]
settings = {"max_steps": 1, "learning_rate": 1e-2, "save_steps": 1, "include_num_input_tokens_seen": "all"}
settings |= {"remove_unused_columns": False, "report_to": [], "use_cpu": True, "disable_tqdm": True}
arguments = TrainingArguments(out, per_device_train_batch_size=1, **settings)
collate = lambda examples: dict(examples[0])
Trainer(model, arguments, collate, [example], processing_class=processor).train()
"""
LOAD = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
picture, out, tower, tower_commit, whole, whole_commit = sys.argv[1:]
for name, commit in ((tower, tower_commit), (whole, whole_commit)):
    snapshot_download(name, revision=commit, local_dir=f"{out}/{name}")
remote = {"revision": tower_commit, "trust_remote_code": True}
pixels = AutoImageProcessor.from_pretrained(tower, **remote)(picture, return_tensors="pt")["pixel_values"]
remote_whole = {"revision": whole_commit, "trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32, **remote_whole).eval()
processor = AutoProcessor.from_pretrained(whole, **remote_whole)
with torch.inference_mode():
    tokens = AutoModel.from_pretrained(tower, **remote).eval()(pixels).last_hidden_state
    within = model.vision_model(pixels).last_hidden_state
    answer = model.chat(processor.tokenizer, pixels, "What is it?", {"max_new_tokens": 4, "do_sample": False})
assert torch.equal(tokens, within), "the tower alone and within the whole differ"
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
torch.save((pixels, tokens, answer), f"{out}/seen.pt")
"""


def run(*command: object, folder: Path, **settings: str) -> str:
    quiet = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=os.environ | quiet | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
def test_from_two_components_to_a_published_model_that_loads_elsewhere(tmp_path):
    """In a clean process and cache every file is byte-identical and every token bit-identical."""
    sailvit = [sys.executable, "-m", "sailvit_cli"]
    write_release(tmp_path / "release")
    for part in ("vision", "language"):
        run(*sailvit, "convert", "release", part, "--part", part, "--dtype", "float32", folder=tmp_path)
    run(*sailvit, "compose", "--vision", "vision", "--language", "language", "composed", folder=tmp_path)
    run(sys.executable, "-c", TRAIN, "composed", "run", PHOTOGRAPH, folder=tmp_path)
    for part, out in (("vision", "tower"), ("all", "whole")):
        run(*sailvit, "convert", "run/checkpoint-1", out, "--part", part, "--base", "composed", folder=tmp_path)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("vision", "tower"))
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("qkv.weight"))
    with serve_writable() as hub:
        address, names = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}, (f"{OWNER}/tower", f"{OWNER}/whole")
        for name in names:
            folder = name.partition("/")[2]
            said = run(*sailvit, "push", folder, name, "--tag", "v1", folder=tmp_path, HF_TOKEN=TOKEN, **address)
            assert "all checks before publishing passed" in said and said.rstrip().endswith("revision v1")
        commits = [hub.repositories[name].tags["v1"] for name in names]
        (tmp_path / "elsewhere").mkdir()
        both = [text for pair in zip(names, commits, strict=True) for text in pair]
        run(
            sys.executable,
            "-c",
            LOAD,
            PHOTOGRAPH,
            tmp_path / "elsewhere",
            *both,
            folder=tmp_path / "elsewhere",
            **address,
        )
    for name in names:
        folder = tmp_path / name.partition("/")[2]
        assert all(
            (tmp_path / "elsewhere" / name / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir()
        )
    card = (tmp_path / "tower" / "README.md").read_text()
    assert "base_model_relation: finetune" not in card and "## Training" in card and "step: 1" in card
    pixels, tokens, _ = torch.load(tmp_path / "elsewhere" / "seen.pt")
    from sailvit import SAILViTModel

    with torch.inference_mode():
        assert torch.equal(tokens, SAILViTModel.from_pretrained(tmp_path / "tower").eval()(pixels).last_hidden_state)
