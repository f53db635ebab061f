# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Untrained models of small size, as folders: a vision encoder, and a language model with a tokenizer of its own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ...chat_sailvl import SYSTEM_MESSAGE
from ...configuration_sailvit import SAILViTConfig
from ...image_processing_sailvit import SAILViTImageProcessor
from ...modeling_sailvit import SAILViTModel


# 209,000 and 370,000 parameters.
ENCODER = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip
LANGUAGE = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML, as Qwen2's.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("system", "user", "assistant")
# What Qwen2's tokenizer merges within; AutoTokenizer sets it for every tokenizer of a Qwen2.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_encoder(folder: str | Path, seed: int = 0, max_tiles: int = 1, **config: Any) -> Path:
    """
    Write a SAILViT with random weights to a folder: weights, config, code, image processor.

    Args:
        folder: A new folder.
        seed: Of the weights.
        max_tiles: The most tiles of an image.
        config: Fields of SAILViTConfig, over ENCODER.

    Returns:
        The folder.

    Raises:
        ValueError: A field is out of range.
    """
    fields = SAILViTConfig(**_with_initializer_range({**ENCODER, **config}))
    with _seeded(seed):
        model = SAILViTModel(fields)
    model.save_pretrained(folder)
    SAILViTImageProcessor(size=fields.image_size, max_tiles=max_tiles).save_pretrained(folder)
    return Path(folder)


def random_language(
    folder: str | Path, texts: Iterable[str], vocabulary: int = 640, seed: int = 0, **config: Any
) -> Path:
    """
    Write a Qwen2 with random weights to a folder, and a byte-level BPE tokenizer that is trained on texts.

    Args:
        folder: A new folder.
        texts: What the tokenizer is trained on; it can write any text.
        vocabulary: The most entries of the tokenizer, special tokens included; the bytes alone are 256.
        seed: Of the weights.
        config: Fields of Qwen2Config, over LANGUAGE.

    Returns:
        The folder.
    """
    tokenizer = train_tokenizer(texts, vocabulary)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, END_OF_TEXT))
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    fields = Qwen2Config(**_with_initializer_range({**LANGUAGE, **ids, **config}), vocab_size=len(tokenizer))
    with _seeded(seed):
        model = Qwen2ForCausalLM(fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """
    Return a byte-level BPE tokenizer with the special tokens and the chat template of Qwen2.

    It learns SAIL-VL's system message together with the texts: it begins every prompt, and is 124 bytes.

    Raises:
        ValueError: The vocabulary has no room for the bytes and the special tokens.
    """
    special = [END_OF_TEXT, TURN, END_OF_TURN]
    if vocabulary < (least := 256 + len(special)):
        raise ValueError(f"vocabulary: expected at least {least}, the bytes and special tokens, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    lines = [*texts]
    every_turn = [*ROLES, SYSTEM_MESSAGE] * max(len(lines), 2)  # so that they are a few tokens
    tokenizer.train_from_iterator([*lines, *every_turn], trainers.BpeTrainer(vocab_size=vocabulary, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def _with_initializer_range(config: dict[str, Any]) -> dict[str, Any]:
    """Set the standard deviation of new weights by the width: with the 0.02 of large models small ones learn slowly."""
    return {"initializer_range": config["hidden_size"] ** -0.5, **config}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw random weights from a seed, and leave the generator of torch as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
