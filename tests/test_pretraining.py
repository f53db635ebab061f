"""Pretraining of the miniature's models: a vision encoder on pixels, as AIM, and a language model on text."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from sailvit import SAILViTConfig, SAILViTModel
from sailvit.convert import compose_model, convert_checkpoint
from sailvit.examples.miniature.models import random_encoder, random_language
from sailvit.train import load_processor, load_recipe
from sailvit.train.next_patch import PREFIX_CAUSAL, NextPatchModel, next_patch_loss
from sailvit.train.run import run
from sailvit.train.tile_batches import random_prefixes


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY = ["head_blocks=1", "samples_per_step=8", "learning_rate=3e-3", "workers=0", "report_to=[]", "precision=float32"]
LANGUAGE = ["trainable=language", "learning_rate=1e-2", "samples_per_step=8", "min_learning_rate_ratio=0"]
PICTURES, PATCHES = 16, 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current directory with an untrained encoder and language model, pictures, and texts without pictures."""
    folder = tmp_path_factory.mktemp("pretraining")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))  # of other processes
        write_corpus(folder)
        random_encoder("encoder", **SMALL)
        random_language("language", ["What is 3 + 4?", "The sum is 7."] * 9, 270, **{**SMALL, "num_key_value_heads": 1})
        yield folder


def write_corpus(folder: Path) -> None:
    """Write pictures that get brighter to the right, a sample with each, and as many samples without pictures."""
    generator, records = np.random.default_rng(0), []
    for number in range(PICTURES):
        ramp = np.linspace(0, 1, 32)[None, :, None] * generator.integers(100, 256, (32, 1, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "kind": "caption", "messages": turns("Describe it.", "A ramp.")})
        records.append({"kind": "text", "messages": turns(f"What is {number} + 4?", f"The sum is {number + 4}.")})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(record) for record in records if "image" not in record))
    for name in ("records", "texts"):
        source = {"name": name, "path": f"{name}.jsonl"}
        (folder / f"{name}.yaml").write_text(json.dumps({"sources": [source]}))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def recipe_for(output: str, *overrides: str):
    return load_recipe(
        "aim-pretrain", [*TOY, "model=encoder", "data=records.yaml", f"output={output}", "epochs=8", *overrides]
    )


def read_log(output: str) -> list[dict]:
    return [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(place) -> list[dict]:
    """The log of a run to runs/aim."""
    assert run(recipe_for("runs/aim"), lambda line: None) == 0
    return read_log("runs/aim")


@pytest.fixture
def model() -> NextPatchModel:
    config = SAILViTConfig(**SMALL, image_size=32, patch_size=8, attn_implementation=PREFIX_CAUSAL)
    return randomize(NextPatchModel(SAILViTModel(config), head_blocks=2)).eval()


# The model


def changed_predictions(model: NextPatchModel, prefix: int, patch: int) -> list[int]:
    """Return the patches whose predictions change with the pixels of a patch."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    row, column = divmod(patch, 4)
    other[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    with torch.no_grad():
        before, after = (model(image, torch.tensor([prefix])) for image in (pixels, other))
    changed = (before != after).any(-1).nonzero().flatten()
    return [prefix + index for index in changed.tolist()]


@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_a_prediction_depends_on_the_prefix_and_on_earlier_patches_alone(model, prefix):
    for patch in range(16):
        first = max(prefix, patch + 1)  # all patches of the prefix are seen by all predictions
        assert changed_predictions(model, prefix, patch) == [*range(first, 16)]


def test_patches_of_the_prefix_see_each_other(model):
    def first_token(pixels: torch.Tensor, prefix: int) -> torch.Tensor:
        model(pixels, torch.tensor([prefix]))
        return model.vision_model(pixels).last_hidden_state[0, 0]

    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    other[..., 8:16, :8] += 1  # patch 4
    with torch.no_grad():
        assert not torch.equal(first_token(pixels, 5), first_token(other, 5))
        assert torch.equal(first_token(pixels, 4), first_token(other, 4))


def test_the_loss_is_that_of_aim_written_out(model):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prefixes = [3, 14]
    errors = []
    for image, prefix in zip(pixels, prefixes, strict=True):
        patches = [
            image[:, y : y + 8, x : x + 8].permute(1, 2, 0).flatten() for y in (0, 8, 16, 24) for x in (0, 8, 16, 24)
        ]
        for target, predicted in zip(patches[prefix:], model(image[None], torch.tensor([prefix])), strict=True):
            normalized = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append(((predicted - normalized) ** 2).mean())
    weights = torch.full((13 + 2,), 1 / 15)
    inputs = {"pixel_values": pixels, "prefix_lengths": torch.tensor(prefixes)}
    loss, own = next_patch_loss(model, inputs, weights, 8)
    torch.testing.assert_close(own, torch.stack(errors).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_another_attention_is_refused():
    encoder = SAILViTModel(SAILViTConfig(**SMALL, image_size=32, patch_size=8))
    with pytest.raises(ValueError, match="expected attn_implementation sdpa_prefix_causal, got sdpa"):
        NextPatchModel(encoder, head_blocks=1)


def test_prefixes_are_uniform_and_repeatable():
    prefixes = random_prefixes(5, 4000, (0, 7, 3))
    assert torch.equal(prefixes, random_prefixes(5, 4000, (0, 7, 3)))
    counts = prefixes.bincount(minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 900 and len(counts) == 5
    assert not torch.equal(prefixes, random_prefixes(5, 4000, (0, 8, 3)))


# Runs


def test_the_loss_falls(pretrained):
    losses = [entry["loss"] for entry in pretrained]
    assert len(losses) == 16 and np.mean(losses[-4:]) < 0.8 * losses[0]


def test_samples_are_the_pictures_and_tokens_their_patches(pretrained):
    for entry in pretrained:
        assert (entry["samples"], entry["tiles"], entry["tokens"]) == (8, 8, 8 * PATCHES)
        assert 8 <= entry["answer_tokens"] <= 8 * (PATCHES - 1) and {*entry["loss_by_kind"]} == {"caption"}
    (stage,) = json.loads(Path("runs/aim/training.json").read_text())["training"]["stages"]
    assert stage["objective"] == "next_patch" and stage["data_samples"] == PICTURES and stage["samples_seen"] == 128


def test_the_result_is_a_sailvit_without_the_head(pretrained):
    model, report = AutoModel.from_pretrained("runs/aim", output_loading_info=True)
    assert type(model) is SAILViTModel and not any(map(len, report.values()))
    before, after = load_file("encoder/model.safetensors"), load_file("runs/aim/model.safetensors")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert (
        AutoImageProcessor.from_pretrained("runs/aim").to_dict()
        == AutoImageProcessor.from_pretrained("encoder").to_dict()
    )


def test_what_an_encoder_lacks_is_refused():
    for override, message in (
        ("trainable=vision,language", r"trainable: expected \[vision\] with objective next_patch"),
        ("lora.vision.r=4", "lora: not supported with objective next_patch"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_for("runs/x", override)


def test_a_sail_vl_is_no_encoder(place):
    with pytest.raises(ValueError, match="language: expected a SAILViT, got model_type 'qwen2': make one with"):
        run(recipe_for("runs/x", "model=language"), lambda line: None)


@pytest.fixture(scope="module")
def composed(pretrained) -> Path:
    compose_model("runs/aim", "language", "composed", verify=False)
    return Path("composed")


def test_a_language_model_is_trained_on_text_alone(composed):
    """And goes on to another SAIL-VL, as the encoder does."""
    overrides = [*TOY[1:], *LANGUAGE, f"model={composed}", "data=texts.yaml", "output=runs/language", "epochs=6"]
    assert run(load_recipe("stage1", overrides), lambda line: None) == 0
    losses = [entry["loss"] for entry in read_log("runs/language")]
    assert math.isfinite(losses[0]) and losses[-1] < 0.7 * losses[0]
    convert_checkpoint("runs/language", "trained-language", part="language", verify=False)
    trained = load_file("runs/language/model.safetensors")
    own = AutoModelForCausalLM.from_pretrained("trained-language").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(own[name], trained[f"language_model.{name}"])
    compose_model("encoder", "trained-language", "again", verify=False)
    assert torch.equal(load_file("again/model.safetensors")[f"language_model.{name}"], own[name])


def test_the_language_model_has_a_chat_template(place):
    tokenizer = AutoTokenizer.from_pretrained("language")
    text = tokenizer.apply_chat_template(turns("What is 3 + 4?", "7"), tokenize=False)
    assert text == "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    assert tokenizer.decode(tokenizer("Ça va?").input_ids) == "Ça va?"


def figures(output: str) -> list[tuple]:
    return [(entry["step"], entry["loss"], entry["grad_norm"], entry["answer_tokens"]) for entry in read_log(output)]


def run_command(*command: str) -> int:
    """Run Python on one thread, as this process."""
    return subprocess.run([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


@pytest.mark.nightly
def test_a_killed_run_goes_on_with_equal_losses(pretrained):
    overrides = [*TOY, "model=encoder", "data=records.yaml", "epochs=8", "output=runs/killed", "save_steps=2"]
    script = str(ROOT / "tests" / "run_stage.py")
    assert run_command(script, "step 5", "aim-pretrain", *overrides) == -signal.SIGKILL
    assert run_command(script, "never", "aim-pretrain", *overrides) == 0
    assert figures("runs/killed") == figures("runs/aim")
    first, second = (load_file(f"runs/{name}/model.safetensors") for name in ("aim", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.nightly
def test_two_processes_train_as_one(pretrained):
    overrides = [*TOY, "model=encoder", "data=records.yaml", "epochs=8", "output=runs/ddp", "engine=ddp"]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sailvit.train", "aim-pretrain")
    assert run_command(*launcher, *overrides) == 0
    for ours, single in zip(figures("runs/ddp"), figures("runs/aim"), strict=True):
        assert ours == pytest.approx(single, rel=1e-3)


def test_the_language_models_tokenizer_is_that_of_every_loader(place):
    texts = ["What is 12 + 4?", "The sum is 16.", "top left a red 3, 10 bars\nand more"]
    compose_model(place / "encoder", place / "language", composed := place / "composed-words", verify=False)
    written = PreTrainedTokenizerFast.from_pretrained(place / "language")
    for other in (AutoTokenizer.from_pretrained(place / "language"), load_processor(str(composed))[0].tokenizer):
        for text in texts:
            assert other(text).input_ids == written(text).input_ids and other.decode(written(text).input_ids) == text
