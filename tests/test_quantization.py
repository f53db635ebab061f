"""
Quantized weights: bitsandbytes and torchao through the `quantization_config` of transformers.

bitsandbytes runs on a CPU, too; where it has no kernels for a machine, its tests are skipped. Its 4 bits need widths
that are multiples of 64 there, which a toy model has and the trained miniature has not.
"""

import json
import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random

import peft
import pytest
import torch
from conftest import TINY, random_pixels, randomize, relative_difference
from fork_server import run_forked
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from toy_sailvl import LANGUAGE
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import sailvit_cli
from sailvit import SAILViTConfig, SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.convert import CheckpointError, convert_checkpoint, inspect_checkpoint
from sailvit.examples.miniature.answers import CATEGORIES, Answerer
from sailvit.examples.miniature.draw import draw_picture
from sailvit.examples.miniature.questions import TASKS
from sailvit.examples.miniature.shipped import MULTIMODAL
from sailvit.examples.miniature.vocabulary import SEEN
from sailvit.hub import check_before_publish, write_model_card


TRANSFORMERS = Version(version("transformers"))


@cache
def lacks_bitsandbytes() -> str:
    """Return why bitsandbytes cannot run here, or nothing."""
    if not find_spec("bitsandbytes"):
        return "bitsandbytes is not installed"
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    has_kernels = not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
    return "" if has_kernels else "bitsandbytes has no kernels for this machine"


def bitsandbytes(**options):
    if reason := lacks_bitsandbytes():
        pytest.skip(reason)
    return BitsAndBytesConfig(**options)


METHODS = {
    "fp4": lambda **skip: bitsandbytes(load_in_4bit=True, **skip),
    "nf4": lambda **skip: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **skip
    ),
    "int8": lambda **skip: bitsandbytes(load_in_8bit=True, **skip),
    "torchao-int8": lambda **skip: TorchAoConfig(Int8WeightOnlyConfig(), **skip),
    "torchao-int4": lambda **skip: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)), **skip),
}
SKIP_LIST = {name: "modules_to_not_convert" if "ao" in name else "llm_int8_skip_modules" for name in METHODS}
NIGHTLY = {"fp4": pytest.mark.nightly, "torchao-int4": pytest.mark.nightly}
each_method = pytest.mark.parametrize("method", [pytest.param(name, marks=NIGHTLY.get(name, ())) for name in METHODS])


def load(method: str, folder: Path, **skip) -> SAILVLForConditionalGeneration:
    settings = {"quantization_config": METHODS[method](**skip), "dtype": torch.float32}
    return SAILVLForConditionalGeneration.from_pretrained(folder, **settings).eval()


def quantized_modules(model: nn.Module) -> set[str]:
    """Names of the modules whose weights are no floats of torch's own."""
    return {
        name for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and (not weight.is_floating_point() or type(weight.data) is not torch.Tensor)
    }  # fmt: skip


def matrices(model: nn.Module, prefix: str) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)}


@pytest.fixture(scope="module")
def full() -> SAILVLForConditionalGeneration:
    vision = SAILViTConfig(**TINY | {"intermediate_size": 128, "num_hidden_layers": 2})
    text = {"model_type": "qwen2", "tie_word_embeddings": True, **LANGUAGE, "intermediate_size": 128}
    return randomize(SAILVLForConditionalGeneration(SAILVLConfig(vision, text, image_token_id=383))).eval()


@pytest.fixture(scope="module")
def toy(full, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "sail-vl"
    full.save_pretrained(folder)
    return folder


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """A picture and a few tokens around it."""
    config = model.config
    image = [config.image_token_id] * config.image_seq_length
    size = config.vision_config.image_size
    ids = torch.tensor([[10, 11, *image, 20, 21, 22]])
    return {"input_ids": ids, "pixel_values": random_pixels(1, 3, size, size)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs(model)).logits


# What is quantized


@each_method
def test_only_the_language_model_is_quantized_without_its_head(method, full, toy):
    settings = METHODS[method]()
    model = SAILVLForConditionalGeneration.from_pretrained(toy, dtype=torch.bfloat16, quantization_config=settings)
    assert quantized_modules(model) == matrices(full, "language_model.model.")
    assert {parameter.dtype for parameter in model.vision_model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.mlp1.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert getattr(settings, SKIP_LIST[method]) is None  # the settings may serve for another model


@each_method
def test_a_list_of_modules_that_the_user_gives_is_kept(method, full, toy):
    skipped = ["language_model", "mlp1.3"]
    model = load(method, toy, **{SKIP_LIST[method]: skipped})
    assert quantized_modules(model) == matrices(full, "vision_model.") | {"mlp1.1"}
    assert getattr(model.config.quantization_config, SKIP_LIST[method]) == skipped
    assert relative_difference(logits(model), logits(full)) < 0.5  # and it runs


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
def test_settings_may_be_a_dict_or_an_argument_of_the_releases(option, full, toy):
    bitsandbytes()
    given = [{"quantization_config": {option: True, "quant_method": "bitsandbytes"}}, {option: True}]
    for settings in given:
        model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32, **settings)
        assert quantized_modules(model) == matrices(full, "language_model.model.")


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
def test_two_quantizations_are_refused(option, toy):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(ValueError, match="or a quantization_config, got both: leave one of them out"):
        SAILVLForConditionalGeneration.from_pretrained(toy, quantization_config=settings, **{option: True})


@pytest.mark.nightly
@each_method
def test_remote_code_quantizes_the_same(method, toy, tmp_path):
    """Without the package, through the Auto class, as `transformers serve --quantization` loads it."""
    METHODS[method]()
    settings = {
        "fp4": "BitsAndBytesConfig(load_in_4bit=True)",
        "nf4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)",
        "int8": "BitsAndBytesConfig(load_in_8bit=True)",
        "torchao-int8": "TorchAoConfig(Int8WeightOnlyConfig())",
        "torchao-int4": "TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)))",
    }[method]
    script = f"""
import sys, torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig
options = dict(trust_remote_code=True, dtype=torch.float32, quantization_config={settings})
model = AutoModelForImageTextToText.from_pretrained({str(toy)!r}, **options)
model.save_pretrained({str(tmp_path)!r})
assert type(model).__module__.startswith("transformers_modules") and "sailvit" not in sys.modules
"""
    if TRANSFORMERS.major < 5 and "ao" in method:
        pytest.skip("transformers 4 does not save weights of this torchao")
    done = run_forked(script, folder=tmp_path, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr
    saved = SAILVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(saved), logits(load(method, toy)))


# What it computes


@pytest.mark.parametrize("method", ["int8", "torchao-int8"])
def test_answers_are_those_of_the_unquantized_model(method, answerer, asked, expected):
    """Greedy ones of the trained miniature about new pictures; benchmarks/quantization.py measures more of them."""
    answerer.model = load(method, MULTIMODAL)
    answers = answerer.answer(*asked)
    assert len(answers) >= 60 and sum(map(str.__eq__, answers, expected)) / len(answers) > 0.98


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MULTIMODAL)


@pytest.fixture(scope="module")
def expected(asked) -> list[str]:
    return Answerer(MULTIMODAL).answer(*asked)


@pytest.fixture(scope="module")
def asked() -> tuple[list[str], list[Image.Image]]:
    """Questions, each with its picture."""
    random, asked = Random("quantization"), []
    for _ in range(16):
        scene, questions = TASKS["scenes"].make(random, SEEN, True, 7)
        picture = Image.fromarray(draw_picture(scene, 32, random))
        asked += [(question.user, picture) for question in questions if question.category in CATEGORIES]
    return [user for user, _ in asked], [picture for _, picture in asked]


def test_4_bit_widths_that_a_cpu_computes_wrongly_are_refused():
    """The kernels of bitsandbytes read a scale of another block where rows are no whole blocks."""
    with pytest.raises(ValueError, match=r"self_attn\.\w+: expected an input width that is a multiple of 64, got 96"):
        load("nf4", MULTIMODAL)


# Files


@each_method
def test_what_is_saved_and_loaded_again_computes_the_same(method, toy, tmp_path):
    if TRANSFORMERS.major < 5 and "ao" in method:
        pytest.skip("transformers 4 does not save weights of this torchao")
    model = load(method, toy)
    model.save_pretrained(tmp_path)
    again = SAILVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert quantized_modules(again) == quantized_modules(model)
    assert torch.equal(logits(again), logits(model))
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"][SKIP_LIST[method]]
    assert skipped == ["vision_model", "mlp1", "language_model.lm_head"]


def test_weights_that_bitsandbytes_has_packed_are_not_saved(toy, tmp_path):
    """It rounds the scales and, without double quantization, writes them in another order, which nothing can read."""
    model = load("fp4", toy)
    logits(model)
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 only")
    with pytest.raises(ValueError, match="save it before it runs"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with 8-bit weights, in bfloat16."""
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    options = {"quantization_config": METHODS["int8"](), "dtype": torch.bfloat16}
    SAILVLForConditionalGeneration.from_pretrained(MULTIMODAL, **options).save_pretrained(folder)
    SAILVLProcessor.from_pretrained(MULTIMODAL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", [None, "language"])
def test_convert_refuses_quantized_weights(saved, part, tmp_path, capsys):
    options = ["--part", part] if part else []
    assert sailvit_cli.main(["convert", str(saved), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert "quantized by bitsandbytes: convert what they were made from" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_quantized_vision_encoder(tmp_path):
    """Whose 8-bit matrices have the shapes of the encoder's, and would be taken for them."""
    load("int8", MULTIMODAL, llm_int8_skip_modules=["language_model"]).save_pretrained(tmp_path / "all")
    with pytest.raises(CheckpointError, match=r"AIMv2: expected weights that are not quantized.*bitsandbytes"):
        convert_checkpoint(tmp_path / "all", tmp_path / "out", part="vision")


def test_parts_that_are_not_quantized_are_converted(saved, tmp_path):
    convert_checkpoint(saved, tmp_path / "vision", part="vision", verify=False)
    tensors, source = (load_file(path / "model.safetensors") for path in (tmp_path / "vision", MULTIMODAL))
    assert all(torch.equal(tensor, source[f"vision_model.{name}"].bfloat16()) for name, tensor in tensors.items())


def test_inspect_names_the_method(saved, capsys):
    report = inspect_checkpoint(saved, deep=True)
    assert report.ok and report.parts["language"]["quantized by"] == "bitsandbytes"
    assert "quantized by" not in report.parts["connector"] and report.layout == "sailvit"
    assert sailvit_cli.main(["inspect", str(saved)]) == 0
    assert "quantized by bitsandbytes" in capsys.readouterr().out


def test_the_card_says_that_it_is_quantized(saved):
    write_model_card(saved, "owner/name")
    assert "base_model_relation: quantized\n" in (saved / "README.md").read_text()


@pytest.mark.nightly
def test_push_accepts_it(saved):
    write_model_card(saved, "owner/name")
    assert check_before_publish(saved, "owner/name") == []


# LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
@each_method
def test_lora_on_quantized_weights_trains(method, toy, tmp_path):
    """And is merged, by peft, whose sum is quantized again."""
    model = load(method, toy)
    settings = peft.LoraConfig(target_modules=r"language_model.*\.(q_proj|v_proj)", r=4, lora_alpha=8)
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = peft.get_peft_model(prepared, settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    adapted.train()
    for _ in range(3):
        batch = inputs(model)
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again, unmerged = (peft.PeftModel.from_pretrained(load(method, toy), tmp_path).eval() for _ in range(2))
    expected = logits(again)
    assert relative_difference(logits(adapted.eval()), expected) < 1e-2
    merged = unmerged.merge_and_unload()  # before it runs: then bitsandbytes may have packed its weights
    assert quantized_modules(merged) == quantized_modules(load(method, toy))
    assert relative_difference(logits(merged), expected) < 0.2
