"""Estimates of FLOPs and memory compared with torch: its FLOP counter, and its tensors in a real training step."""

import copy
from itertools import combinations

import pytest
import torch
from conftest import random_pixels
from toy_sailvl import LANGUAGE
from torch.utils.flop_counter import FlopCounterMode

from sailvit import SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.train.flops import MODULES, meta_model, sample_flops


TOKENS, TILES, ANSWERS = 24, 2, 5
VISION = {
    "model_type": "sailvit", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56,
}  # fmt: skip
SUBSETS = [subset for count in (1, 2, 3) for subset in combinations(MODULES, count)]


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


def enable_checkpointing(model: SAILVLForConditionalGeneration, components: tuple[str, ...]) -> None:
    for component in components:
        module = getattr(model, MODULES[component])
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def counted_flops(config: SAILVLConfig, trainable: tuple[str, ...], checkpointed: tuple[str, ...]) -> int:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # torch counts the products of fused attention's backward pass twice
    model = SAILVLForConditionalGeneration(config).train()
    for component, module in MODULES.items():
        getattr(model, module).requires_grad_(component in trainable)
    enable_checkpointing(model, checkpointed)
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
    assert flops.hardware == pytest.approx(counted_flops(config, tuple(MODULES), ("language",)), rel=1e-3)
