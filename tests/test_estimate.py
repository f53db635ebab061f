"""Estimates of FLOPs and memory compared with torch: its FLOP counter, and its tensors in a real training step."""

import copy
import json
import re
from itertools import combinations
from types import SimpleNamespace

import memory_estimate
import numpy as np
import pytest
import torch
from conftest import random_pixels
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode
from toy_corpus import make_processor
from toy_sailvl import LANGUAGE

from sailvit import SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.train import Corpus
from sailvit.train.components import enable_checkpointing, set_trainable, trainable_table
from sailvit.train.estimate import CARDS, GIB, SampleShape, TrainingSettings, index_bytes, make_plan, oom_hint
from sailvit.train.flops import COMPONENTS, meta_model, sample_flops
from sailvit.train.memory import LiveBytes, PackShape, memory_of_states, peak_of_pack
from sailvit.train.order import permutation
from sailvit.train.recipe import LoRA, Recipe


TOKENS, TILES, ANSWERS = 24, 2, 5
VISION = {
    "model_type": "sailvit", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56,
}  # fmt: skip
SUBSETS = [subset for count in (1, 2, 3) for subset in combinations(COMPONENTS, count)]


def toy_config(language: str = "qwen2", **options) -> SAILVLConfig:
    head_dim = {"head_dim": 24} if language == "qwen3" else {}
    text = {"model_type": language, **LANGUAGE, **head_dim, **options}
    return SAILVLConfig(vision_config=VISION, text_config=text, image_token_id=3)


def train_on(model: SAILVLForConditionalGeneration) -> None:
    """Forward and backward pass of one sample: its tiles first, its answers last."""
    visual = TILES * model.config.image_seq_length
    ids = torch.full((1, TOKENS), 7)
    ids[:, :visual] = model.config.image_token_id
    output = model(ids, random_pixels(TILES, 3, 56, 56), logits_to_keep=ANSWERS, use_cache=False)
    output.logits.sum().backward()


def real_model(config: SAILVLConfig, trainable: tuple[str, ...], checkpointed: tuple[str, ...] = ()):
    model = SAILVLForConditionalGeneration(config).train()
    for component, module in COMPONENTS.items():
        getattr(model, module).requires_grad_(component in trainable)
    enable_checkpointing(model, checkpointed)
    return model


def counted_flops(config: SAILVLConfig, trainable: tuple[str, ...], checkpointed: tuple[str, ...]) -> int:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # fused attention computes some products a second time
    model = real_model(config, trainable, checkpointed)
    with FlopCounterMode(display=False) as counter:
        train_on(model)
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointed", [(), ("vision",), ("language",), ("vision", "language")], ids="+".join)
@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_training_flops_are_those_that_torch_counts(trainable, checkpointed):
    config = toy_config()
    flops = sample_flops(meta_model(config, trainable), checkpointed).of(TOKENS, TILES, ANSWERS)
    assert flops.hardware == pytest.approx(counted_flops(config, trainable, checkpointed), rel=1e-3)
    assert flops.recomputation == 0 or checkpointed


@pytest.mark.parametrize("language", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_other_language_models_are_those_that_torch_counts(language, tied):
    config = toy_config(language, tie_word_embeddings=tied)
    flops = sample_flops(meta_model(config), ("language",)).of(TOKENS, TILES, ANSWERS)
    assert flops.hardware == pytest.approx(counted_flops(config, tuple(COMPONENTS), ("language",)), rel=1e-3)


@pytest.mark.parametrize(
    "part",
    [
        {"vision_config": {"model_type": "dinov2", "hidden_size": 32, "image_size": 56, "patch_size": 14}},
        {"text_config": {"model_type": "bloom", "hidden_size": 64, "vocab_size": 300}},
    ],
    ids=["dinov2", "bloom"],
)
def test_flops_of_models_without_an_intermediate_size(part):
    """DINOv2's class token and layer scales are not counted."""
    config = toy_config()
    ((name, options),) = part.items()
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 2}
    parts = {"vision_config": VISION, "text_config": config.text_config.to_dict(), name: options | blocks}
    config = SAILVLConfig(**parts, image_token_id=3)
    flops = sample_flops(meta_model(config), ("vision", "language")).of(TOKENS, TILES, ANSWERS)
    assert flops.hardware == pytest.approx(counted_flops(config, tuple(COMPONENTS), ("vision", "language")), rel=0.05)


def add_lora(model: SAILVLForConditionalGeneration) -> SAILVLForConditionalGeneration:
    """Train the language model by adapters of all its linear layers, and nothing else."""
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model.language_model)
    return model


def test_flops_of_adapters_are_those_that_torch_counts():
    config = toy_config()
    config._attn_implementation = "eager"
    model = add_lora(SAILVLForConditionalGeneration(config).train())
    with FlopCounterMode(display=False) as counter:
        train_on(model)
    flops = sample_flops(add_lora(meta_model(config))).of(TOKENS, TILES, ANSWERS)
    first = 2 * TOKENS * 64 * (64 + 2 * 32)  # gradients of the first layer's input, which nothing upstream needs
    assert flops.hardware - first == pytest.approx(counter.get_total_flops(), rel=1e-2)


# Memory


@pytest.mark.parametrize("trainable", SUBSETS, ids="+".join)
def test_states_of_a_single_process_are_the_tensors_of_weights_gradients_and_adamw(trainable):
    config = toy_config(tie_word_embeddings=True)
    model = real_model(config, trainable)
    train_on(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in ([*model.parameters()], gradients, moments)]
    states = memory_of_states(meta_model(config, trainable), "single", 1, "float32")
    assert [*states.values()] == [*sizes, 0]


@pytest.mark.parametrize("checkpointed", [(), ("vision",), ("vision", "language")], ids="+".join)
@pytest.mark.parametrize("trainable", [("connector",), ("vision", "connector"), tuple(COMPONENTS)], ids="+".join)
def test_peak_on_fake_tensors_is_that_of_a_packed_step_on_real_ones(trainable, checkpointed):
    config = SAILVLConfig(vision_config=VISION, text_config={"model_type": "qwen2", **LANGUAGE}, image_token_id=3)
    pack, model = PackShape(256, 4, 32), real_model(config, trainable, checkpointed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live = LiveBytes([*model.parameters(), *model.buffers(), *gradients], LANGUAGE["vocab_size"])
    with live:
        memory_estimate.train_on_pack(model, pack, "float32")
    estimate = peak_of_pack(meta_model(config, trainable), pack, "float32", checkpointed)
    assert live.peak == pytest.approx(estimate.activations + estimate.logits, rel=0.05)
    assert live.peak_without_logits == pytest.approx(estimate.activations, rel=0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("checkpointed", memory_estimate.CHECKPOINTED)
@pytest.mark.parametrize("precision", memory_estimate.PRECISIONS)
@pytest.mark.parametrize("name", memory_estimate.SHAPES)
def test_estimate_is_within_15_percent_of_a_process(name, precision, checkpointed):
    """Libraries take up to 41 MB for themselves: more than 15% of the smallest case."""
    case = (name, precision, checkpointed)
    measured = pytest.approx(memory_estimate.measured_bytes(*case), rel=0.15, abs=45e6)
    assert memory_estimate.estimated_bytes(*case) == measured


def test_logits_take_memory_at_supervised_positions_only():
    """At least 4 bytes each for the logits, their logarithms and their gradients."""
    model = meta_model(toy_config(vocab_size=65536), ["connector"])
    few, many = (peak_of_pack(model, PackShape(512, 8, answers), "float32") for answers in (16, 512))
    assert few.activations == pytest.approx(many.activations, rel=0.01)
    assert few.logits < 0.1 * many.logits and many.logits >= 0.9 * 3 * 4 * 65536 * 512


ADAPTERS = {
    "lora": {"lora": {"language": LoRA(r=4, alpha=8)}},
    "lora of two components": {"lora": {"language": LoRA(r=4), "vision": LoRA(r=2)}},
    "added tokens": {"trainable": ["connector"], "train_added_tokens": True},
    "frozen vision": {"trainable": ["language"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_plan_counts_the_parameters_that_training_reports(name):
    """The table of a run; its adapters are on top of the weights, which they leave frozen."""
    recipe = Recipe(learning_rate=1e-3, samples_per_step=8, **{"trainable": [*COMPONENTS], **ADAPTERS[name]})
    config = toy_config(tie_word_embeddings=True)
    plan = make_plan(config, recipe, samples=64)
    model = SAILVLForConditionalGeneration(toy_config(tie_word_embeddings=True))
    set_trainable(model, recipe, (5, 6))
    table = [line.replace(",", "").split() for line in trainable_table(model, recipe).splitlines()[1:]]
    assert {part: (int(total), int(trained)) for part, total, trained, _ in table} == plan.parameters
    assert not hasattr(config, "use_llm_lora")  # the plan leaves the config of its caller alone
    states = memory_of_states(model, "single", 1)
    assert {key: vars(plan.memory["single"])[key] for key in states} == states


def test_lora_saves_gradients_and_optimizer_states_but_not_weights():
    full, lora = (
        make_plan(toy_config(), TrainingSettings(max_tokens_per_pack=64, lora=adapters)).memory["single"]
        for adapters in ({}, {"language": LoRA(r=1), "vision": LoRA(r=1)})
    )
    assert lora.gradients < 0.5 * full.gradients and lora.optimizer == 2 * lora.gradients
    assert lora.weights > full.weights


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_more_ranks_leave_less_on_each(engine):
    model = meta_model(toy_config())
    one, two, many = (memory_of_states(model, engine, ranks) for ranks in (1, 2, 1000))
    assert one["optimizer"] == 2 * two["optimizer"] == 1000 * many["optimizer"]
    assert one["weights"] == two["weights"] * (1 if engine == "zero2" else 2)


def test_ddp_keeps_everything_on_each_rank():
    model = meta_model(toy_config(), ("connector",))
    alone, each = memory_of_states(model, "single", 1), memory_of_states(model, "ddp", 8)
    assert each == alone | {"gathered": alone["gradients"]}


# Plans


def make_corpus(count: int, seed: int = 0) -> SimpleNamespace:
    class Lengths(SimpleNamespace):
        def __len__(self) -> int:
            return count

    tiles = np.random.default_rng(seed).integers(0, 9, count)
    return Lengths(tokens=tiles * 4 + 20, tiles=tiles, answers=np.full(count, 5))


def test_flops_of_a_corpus_are_the_sum_over_its_samples():
    corpus, config = make_corpus(50), toy_config()
    plan = make_plan(config, TrainingSettings(samples_per_step=8, epochs=2, max_tokens_per_pack=128), corpus=corpus)
    flops = sample_flops(meta_model(config), ("vision", "language"))
    lengths = zip(corpus.tokens, corpus.tiles, corpus.answers, strict=True)
    total = sum(flops.of(*map(int, sample)).hardware for sample in lengths)
    assert plan.stage_flops.hardware == pytest.approx(2 * total)
    assert plan.steps == 13 and plan.samples == 50


def test_a_plan_states_hours_of_a_card_and_of_the_paper():
    settings = TrainingSettings(samples_per_step=1920, trainable=("connector",), max_tokens_per_pack=128)
    plan = make_plan(toy_config(), settings, samples=8_000_000, ranks=8, card="h100", mfu=0.4, stage="stage1")
    seconds = plan.stage_flops.model / (8 * 0.4 * CARDS["h100"].bfloat16_flops)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.steps == 4167 and plan.paper.npu_hours == 1664
    assert json.loads(json.dumps(plan.to_dict()))["steps"] == 4167
    text = plan.describe()
    assert not re.search(r" 0\.0+[ M]", text)  # of a toy
    assert "1,664 NPU hours" in text and "4,167 of 1,920 samples" in text and "zero3 (chosen)" in text


def test_the_settings_of_an_out_of_memory_hint_fit():
    settings = TrainingSettings(max_tokens_per_pack=1024, gradient_checkpointing=False, samples_per_step=8)
    sample = SampleShape(tokens=40, tiles=2, answers=10, squared_tokens=1700, longest=60)
    plan = make_plan(toy_config(), settings, sample=sample)
    half = make_plan(
        toy_config(), TrainingSettings(max_tokens_per_pack=512, gradient_checkpointing=True), sample=sample
    )
    available = half.memory["single"].total
    assert available < plan.memory["single"].total
    hint = oom_hint(plan, available)
    assert hint.startswith("max_tokens_per_pack=512 gradient_checkpointing=true would fit:")
    assert f"of {available / GIB:.2f} GiB" in hint


def test_an_out_of_memory_hint_names_the_ranks_that_are_needed():
    config = toy_config(hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    sample = SampleShape(tokens=40, tiles=2, answers=10, squared_tokens=1700, longest=60)
    plan = make_plan(config, TrainingSettings(max_tokens_per_pack=64), sample=sample)
    memory = plan.memory["single"]
    assert "engine=zero3 on 8 ranks would fit" in oom_hint(plan, 0.55 * memory.states)
    assert "train fewer components" in oom_hint(plan, 1000)


def test_a_plan_on_other_ranks_has_the_memory_of_a_new_plan():
    settings = TrainingSettings(max_tokens_per_pack=64)
    plan = make_plan(toy_config(), settings, samples=10_000, ranks=2, card="a100")
    other = make_plan(toy_config(), settings, samples=10_000, ranks=16, card="a100")
    assert plan.on_ranks(16).to_dict() == other.to_dict()


def test_a_rank_receives_the_weights_twice_a_pack_under_zero3():
    plan = make_plan(toy_config(), TrainingSettings(trainable=("connector",), max_tokens_per_pack=64), ranks=2)
    total, trained = (sum(sizes) for sizes in zip(*plan.parameters.values(), strict=True))
    assert plan.received_per_step == plan.packs_per_rank * (2 * total + trained)
    assert plan.on_ranks(2, "zero2").received_per_step == (plan.packs_per_rank + 1) * trained
    assert plan.on_ranks(2, "ddp").received_per_step == 4 * trained  # float32, once a step


def test_bytes_of_an_index_are_those_of_a_corpus_and_its_order(tmp_path):
    record = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "42."}]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(record) + "\n") * 50)
    (tmp_path / "corpus.yaml").write_text("sources: [{name: chat, path: chat.jsonl}]")
    corpus = Corpus.from_yaml(tmp_path / "corpus.yaml", make_processor(tmp_path / "toy"), tmp_path / "cache")
    sizes = index_bytes(len(corpus))
    assert sizes["arrays"] == sum(array.nbytes for array in corpus.arrays._arrays.values())
    assert sizes["order"] == permutation(len(corpus), 0).nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card": "h1000"}, "card: expected one of a100, "),
        ({"mfu": 40}, "mfu: expected above 0, at most 1, got 40"),
        ({"ranks": 0}, "ranks: expected at least 1, got 0"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(toy_config(), TrainingSettings(), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "zero1"}, "engine: expected one of single, ddp, zero2, zero3, fsdp2, got 'zero1'"),
        ({"engine": "single"}, "ranks: expected 1 with engine single, got 2: use ddp, zero2, zero3, fsdp2"),
        ({"trainable": ("vit",)}, "trainable: expected components of vision, connector, language, got 'vit'"),
        ({"precision": "fp8"}, "precision: expected bfloat16 or float32, got 'fp8'"),
    ],
)
def test_settings_that_no_engine_has_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_plan(toy_config(), TrainingSettings(**settings), ranks=2)
