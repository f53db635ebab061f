"""
Adapters of peft on a toy SAIL-VL, converted: what is written answers as the model did that was trained, alive, with its
adapter in it. Embeddings and head are tied in the base, and peft trains one name of the two.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import random_pixels, relative_difference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from toy_sailvl import write_release
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import sailvit_cli
from sailvit import SAILVLForConditionalGeneration
from sailvit.convert import CheckpointError, convert_checkpoint, inspect_checkpoint
from sailvit.convert.storage.names import find_ends, is_tied


IMAGE = 309  # <IMG_CONTEXT> in the toy tokenizer
IDS = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 200, 90, 8]])
PIXELS = random_pixels(1, 3, 56, 56)
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("tied") / "base", tied=True)


@pytest.fixture(scope="module")
def tied_and_stored(tmp_path_factory, tied) -> Path:
    """The same base, the head stored too."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    folder.mkdir()
    for file in tied.iterdir():
        if (file.suffix == ".json" and "index" not in file.name) or file.suffix == ".txt":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor for file in tied.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({**tensors, HEAD: tensors[TABLE].clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> SAILVLForConditionalGeneration:
    model, report = SAILVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    model.config.image_token_id = IMAGE
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, pixel_values=PIXELS).logits


@contextmanager
def quiet() -> Iterator[None]:
    """Peft warns of untying, and calls what newer releases of transformers call otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(model: nn.Module, **options) -> nn.Module:
    """A model with a random adapter in it."""
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    torch.manual_seed(0)
    with quiet():
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 20)
    return wrapped


def save(wrapped: nn.Module, folder: Path) -> Path:
    with quiet():
        wrapped.save_pretrained(folder)
    return folder


def convert(source: Path, out: Path, **options):
    return convert_checkpoint(source, out, **{"verify": False, **options})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ties_of(folder: Path) -> tuple[bool, ...]:
    config = json.loads((folder / "config.json").read_text())
    return tuple(part["tie_word_embeddings"] for part in (config, config.get("text_config", config)))


APART = {
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on embeddings, head saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("base", ["tied", "tied_and_stored"])
@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_an_adapter_that_trains_what_the_base_ties_is_refused(tmp_path, request, base, options):
    base = request.getfixturevalue(base)
    adapter = save(wrap(load(base), **options), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"embeddings.*: merge it with peft \(model\.merge_and_unload\(\)\)"):
        convert(adapter, tmp_path / "out", base=base)


def test_ends_of_a_tie_that_the_adapter_leaves_alone_stay_tied(tmp_path, tied):
    wrapped = wrap(load(tied))
    convert(save(wrapped, tmp_path / "adapter"), tmp_path / "out", base=tied)
    assert ties_of(tmp_path / "out") == (True, True) and HEAD not in tensors_of(tmp_path / "out")
    assert relative_difference(logits(load(tmp_path / "out")), logits(wrapped)) < 1e-5


def test_the_mean_of_adapters_is_the_mean_of_what_they_make(tmp_path, tied):
    saved = []
    for seed in (1, 2):
        wrapped = wrap(load(tied), modules_to_save=["mlp1.1"])
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                parameter.add_(seed / 10 if "lora_A" in name or "modules_to_save" in name else 0)
        saved.append(save(wrapped, tmp_path / f"adapter-{seed}"))
        convert(saved[-1], tmp_path / f"out-{seed}", base=tied)
    convert(saved[0], tmp_path / "out", base=tied, average=[saved[1]])
    one, two = (tensors_of(tmp_path / f"out-{seed}") for seed in (1, 2))
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert relative_difference(tensor, (one[name] + two[name]) / 2) < 1e-6
    assert sum(not torch.equal(one[name], two[name]) for name in one) > 2


KINDS = ["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "phi3", "gpt2", "bloom"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_language_models_are_known_and_whether_they_are_tied(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=1))
    model.tie_weights()
    names = {id(parameter): [] for parameter in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append("language_model." + name)
    table, head = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    ends = find_ends(name for both in names.values() for name in both)
    assert ends.embeddings in names[id(table)] and ends.head in names[id(head)]
    fields = {"model_type": kind}
    assert is_tied(fields) == is_tied({"llm_config": fields}) == (table is head)
    assert is_tied({"llm_config": {"tie_word_embeddings": True}})


# What a training saved, over its base


def write_run(folder: Path, tensors: dict[str, torch.Tensor], base: Path, **fields) -> Path:
    """A run that saved some tensors, a norm's among them, and, if there are fields, a config.json of its own."""
    folder.mkdir()
    trained = {"mlp1.0.weight": tensors_of(base)["mlp1.0.weight"], **tensors}
    save_file(trained, folder / "model.safetensors", {"format": "pt"})
    if fields:
        config = json.loads((base / "config.json").read_text())
        config["llm_config"] |= fields
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("base", ["tied", "tied_and_stored"])
def test_a_tied_head_follows_embeddings_that_were_trained(tmp_path, request, tied, base):
    base, model = request.getfixturevalue(base), load(tied)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    run = write_run(tmp_path / "run", {TABLE: model.get_input_embeddings().weight.detach()}, base)
    convert(run, tmp_path / "out", base=base, dtype="float32")
    assert ties_of(tmp_path / "out") == (True, True)
    assert relative_difference(logits(load(tmp_path / "out")), logits(model)) < 1e-5


@pytest.mark.parametrize("end", [TABLE, HEAD])
@pytest.mark.parametrize("base", ["tied", "tied_and_stored"])
def test_a_run_that_untied_them_has_the_other_end_from_the_base(tmp_path, request, base, end):
    base = request.getfixturevalue(base)
    trained = {end: tensors_of(base)[TABLE] + 0.1}
    run = write_run(tmp_path / "run", trained, base, tie_word_embeddings=False)
    convert(run, tmp_path / "out", base=base, dtype="float32")
    found = tensors_of(tmp_path / "out")
    assert ties_of(tmp_path / "out") == (False, False)
    assert torch.equal(found[end], trained[end])
    assert torch.equal(found[HEAD if end == TABLE else TABLE], tensors_of(base)[TABLE])
    load(tmp_path / "out")


def test_a_head_alone_beside_a_configuration_that_ties_it_is_refused(tmp_path, tied):
    run = write_run(tmp_path / "run", {HEAD: tensors_of(tied)[TABLE] + 1}, tied)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from .*correct tie_word_embeddings"):
        convert(run, tmp_path / "out", base=tied)


# An adapter on one part alone


@pytest.mark.parametrize("part", ["language_model", "language_model.model", "vision_model", "mlp1"])
def test_an_adapter_on_one_part_alone_is_put_there(tmp_path, tied, part):
    model = load(tied)
    targets = {"vision_model": ["qkv", "fc1"], "mlp1": ["1", "3"]}.get(part, ["q_proj", "down_proj"])
    parent, _, name = part.rpartition(".")
    wrapped = wrap(model.get_submodule(part), target_modules=targets)
    setattr(model.get_submodule(parent), name, wrapped)
    alive, adapter = logits(model), save(wrapped, tmp_path / "adapter")
    done = convert(adapter, tmp_path / "out", base=tied)
    assert relative_difference(logits(load(tmp_path / "out")), alive) < 1e-5
    assert f"the adapter was trained on {part} alone" in done.notes
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["training"]["adapter"]["of"] == part


def test_an_adapter_that_fits_several_parts_or_none_is_refused(tmp_path, tied):
    layers = {f"layers.0.fc.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in layers.items()}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    two = write_run(tmp_path / "two", {f"{part}.layers.0.fc.weight": torch.ones(2, 2) for part in "ab"}, tied)
    with pytest.raises(CheckpointError, match=r"several parts \(a\., b\.\): merge it with peft"):
        convert(adapter, tmp_path / "out", base=two)
    with pytest.raises(CheckpointError, match=r"which .*base does not have: is it the base\?"):
        convert(adapter, tmp_path / "out", base=tied)


# LoRA inside


def save_wrapped(base: Path, folder: Path, llm: int = 4, backbone: int = 0) -> tuple[Path, torch.Tensor]:
    """What InternVL's training saves with use_llm_lora and use_backbone_lora: parts wrapped by peft, base and all; and
    the logits of the model alive."""
    model = load(base)
    options = {"init_lora_weights": False, "lora_dropout": 0.05}
    if llm:
        targets = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
        config = LoraConfig(r=llm, lora_alpha=2 * llm, target_modules=targets, task_type="CAUSAL_LM", **options)
        with quiet():
            model.language_model = get_peft_model(model.language_model, config)
    if backbone:
        targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        config = LoraConfig(r=backbone, lora_alpha=2 * backbone, target_modules=targets, **options)
        with quiet():
            model.vision_model = get_peft_model(model.vision_model, config)
    alive = logits(model)
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith(HEAD[15:])}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in base.iterdir():
        if file.suffix in (".json", ".txt") and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_llm_lora": llm, "use_backbone_lora": backbone}))
    return folder, alive


@pytest.mark.parametrize(("llm", "backbone"), [(4, 0), (0, 3), (4, 3)])
def test_lora_inside_of_a_model_is_merged_as_internvl_scales_it(tmp_path, tied, llm, backbone):
    wrapped, alive = save_wrapped(tied, tmp_path / "wrapped", llm, backbone)
    assert relative_difference(logits(load(tied)), alive) > 0.05
    done = convert(wrapped, tmp_path / "out")
    assert relative_difference(logits(load(tmp_path / "out")), alive) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.get("use_llm_lora") and not config.get("use_backbone_lora")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tied).keys()
    parts = {"language_model": llm, "vision_model": backbone}
    for part, rank in parts.items():
        note = f"{part} was saved with LoRA in it, merged: rank {rank}, alpha {2 * rank} as InternVL has it"
        assert (note in done.notes) == bool(rank)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["training"]["merged"] == {p: {"r": r, "lora_alpha": 2 * r} for p, r in parts.items() if r}


def test_parts_of_a_model_with_lora_inside_are_taken_out_merged(tmp_path, tied):
    wrapped, _ = save_wrapped(tied, tmp_path / "wrapped", 4, 3)
    convert(wrapped, tmp_path / "out")
    whole = tensors_of(tmp_path / "out")
    for part, prefix in {"vision": "vision_model.", "language": "language_model.", "connector": ""}.items():
        convert(wrapped, tmp_path / part, part=part)
        found = tensors_of(tmp_path / part)
        assert found and all(torch.equal(tensor, whole[prefix + name]) for name, tensor in found.items())


def test_lora_inside_keeps_the_precision_of_what_it_is_in(tmp_path, tied):
    wrapped, _ = save_wrapped(tied, tmp_path / "wrapped")
    tensors = load_file(wrapped / "model.safetensors")
    halves = {name: tensor if "lora_" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, wrapped / "model.safetensors", {"format": "pt"})
    convert(wrapped, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("stated", [0, 8, None])
def test_wrapped_lora_of_unknown_scale_is_refused(tmp_path, tied, capsys, stated):
    wrapped, _ = save_wrapped(tied, tmp_path / "wrapped")
    config = json.loads((wrapped / "config.json").read_text())
    (wrapped / "config.json").write_text(json.dumps({**config, "use_llm_lora": stated}))
    capsys.readouterr()
    assert sailvit_cli.main(["convert", str(wrapped), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"LoRA of rank 4, but use_llm_lora in config.json is {stated}" in said and "merge it with peft" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_two_adapters_in_one_checkpoint_are_refused(tmp_path, tied):
    wrapped, _ = save_wrapped(tied, tmp_path / "wrapped")
    tensors = load_file(wrapped / "model.safetensors")
    more = {name.replace("default", "other"): tensor.clone() for name, tensor in tensors.items()}
    save_file({**more, **tensors}, wrapped / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="change the same tensor: keep one adapter"):
        convert(wrapped, tmp_path / "out")


def test_inspect_reports_wrapped_lora(tmp_path, tied):
    wrapped, _ = save_wrapped(tied, tmp_path / "wrapped")
    (problem,) = [problem for problem in inspect_checkpoint(wrapped).problems if problem.kind != "code"]
    assert "LoRA in it" in problem.message and "sailvit convert" in problem.message
