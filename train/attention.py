# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Attention of packed rows: torch's sdpa, sample by sample.

The sdpa attention of transformers keeps the samples of a pack apart by a mask, and computes the whole row under it:
time, and the memory of the mask, grow with the square of a pack. Here they grow with the squares of its samples.

Importing this module registers the attention with transformers, under the name PER_SAMPLE.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import PreTrainedModel


PER_SAMPLE = "sdpa_per_sample"
LAYER_TYPES = {"full_attention", "sliding_attention"}


def sdpa_per_sample(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each sample of a packed row.

    Args:
        query: (1, heads, S, width of a head).
        key, value: (1, key-value heads, S, width of a head).
        attention_mask: None: transformers makes no mask for an attention that it does not know.
        sample_lengths: Tokens of each sample; their sum is S. An argument of the model, which passes it on.
        sliding_window: The number of tokens, itself included, that a token attends to; None for all before it.
        options: As of transformers' sdpa attention: scaling, dropout, ...

    Returns:
        (1, S, heads, width of a head), and None.

    Raises:
        ValueError: There is a mask, or `sample_lengths` are missing or do not add up to S.
    """
    if attention_mask is not None:
        raise ValueError(f"{PER_SAMPLE}: expected no attention_mask, got one: pass packed rows, or use sdpa")
    if sample_lengths is None or len(query) != 1 or sum(sample_lengths) != query.shape[2]:
        raise ValueError(
            f"{PER_SAMPLE}: expected sample_lengths that add up to one row of {query.shape[2]} tokens, got "
            f"{sample_lengths} and {len(query)} row(s): use attn_implementation=sdpa if the language model "
            "does not pass the argument on"
        )
    parts = (tensor.split(list(sample_lengths), 2) for tensor in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, *part, _window_mask(part[0], sliding_window), **options)[0]
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, 1), None


def _window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return the mask (1, 1, S, S) of a causal sliding window; None where the window is no limit."""
    length = query.shape[2]
    if window is None or window >= length:
        return None
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    return causal.triu(1 - window)


@contextmanager
def attend_per_sample(model: PreTrainedModel) -> Iterator[bool]:
    """
    Replace the sdpa attention of the language model of a SAIL-VL by PER_SAMPLE; yield whether that is possible.

    It is if the language model takes the arguments of FlashAttention, which needs the same ones: boundaries of samples
    and the sliding window of a layer. Other language models keep the mask.
    """
    language = model.language_model
    before = language.config._attn_implementation
    types = set(getattr(language.config, "layer_types", None) or LAYER_TYPES)
    if before == "sdpa" and language._supports_flash_attn and types <= LAYER_TYPES:
        language.set_attn_implementation(PER_SAMPLE)
    try:
        yield is_per_sample(model)
    finally:
        language.set_attn_implementation(before)


def is_per_sample(model: PreTrainedModel) -> bool:
    """Return whether the language model of a SAIL-VL attends sample by sample, and so needs `sample_lengths`."""
    return model.language_model.config._attn_implementation == PER_SAMPLE


AttentionInterface.register(PER_SAMPLE, sdpa_per_sample)
