# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Attention of packed rows: which tokens of a pack may attend to which.

    row:     [prefix first] [second] [third] [another sample] ...
    segment:  ----------------------------    --------------

Conversations are kept apart. Those of a sample may share its prefix, the tokens up to its last image: these are in the
row once, and the second and third conversation attend to them as if they were their own. FlashAttention cannot do that;
`can_share_prompt` tells what can.

On a CPU the attention runs segment by segment. The sdpa attention of transformers keeps the samples of a pack apart by
a mask, and computes the whole row under it: time, and the memory of the mask, grow with the square of a pack. Here they
grow with the squares of its samples. Importing this module registers it with transformers, under the name PER_SAMPLE.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import PreTrainedModel

from ..configuration_sailvl import SAILVLConfig
from .flops import meta_model


PER_SAMPLE = "sdpa_per_sample"
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Segment:
    """
    Conversations that follow each other in a row and share a prefix, or one alone.

    Attributes:
        lengths: Tokens of each, in the row; the prefix is a part of the first.
        prefix: Tokens that all attend to; 0 if they share nothing.
    """

    lengths: tuple[int, ...]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, S."""
        return sum(self.lengths)

    def position_ids(self) -> torch.Tensor:
        """Return the position ids (S,): those of conversations in rows of their own."""
        starts = [0, *[self.prefix] * (len(self.lengths) - 1)]
        return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, self.lengths, strict=True)])

    @cached_property
    def mask(self) -> torch.Tensor:
        """(S, S) bool: whether a token (row) attends to another one (column)."""
        positions = self.position_ids()
        conversations = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        is_own = conversations[:, None] == conversations
        is_own[:, : self.prefix] = True
        return is_own & (positions[:, None] >= positions)

    @property
    def squared_tokens(self) -> int:
        """What the FLOPs of attention grow with: the sum over conversations of length^2, the prefix squared once."""
        first, *others = self.lengths
        return first**2 + sum((self.prefix + length) ** 2 - self.prefix**2 for length in others)


def row_mask(segments: Sequence[Segment]) -> torch.Tensor:
    """Return the mask (1, 1, S, S) bool of a row: whether a token (row) attends to another one (column)."""
    return torch.block_diag(*(segment.mask for segment in segments))[None, None]


def can_share_prompt(config: SAILVLConfig, attn_implementation: str | None = None) -> bool:
    """
    Return whether the language model of a SAIL-VL can attend under any mask, as a shared prefix needs.

    It can with sdpa, eager attention and PER_SAMPLE, if all of its layers attend to all tokens before: a mask of one
    row is not combined with a sliding window, and layers without attention have a state instead.

    Args:
        config: Of the SAIL-VL.
        attn_implementation: Default: what transformers chooses.
    """
    language = meta_model(config).language_model
    attention = attn_implementation or language.config._attn_implementation
    types, window = (getattr(language.config, name, None) for name in ("layer_types", "sliding_window"))
    attends_to_all = {*types} == {"full_attention"} if types else window is None
    return attention in ("sdpa", "eager", PER_SAMPLE) and language._supports_attention_backend and attends_to_all


def sdpa_per_sample(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Sequence[Segment] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each conversation of a packed row, and to the prefix that it shares.

    Args:
        query: (1, heads, S, width of a head).
        key, value: (1, key-value heads, S, width of a head).
        attention_mask: None: transformers makes no mask for an attention that it does not know.
        segments: Of the row, with S tokens in all. An argument of the model, which passes it on.
        sliding_window: The number of tokens, itself included, that a token attends to; None for all before it.
        options: As of transformers' sdpa attention: scaling, dropout, ...

    Returns:
        (1, S, heads, width of a head), and None.

    Raises:
        ValueError: There is a mask, or `segments` are missing or do not add up to S; or a prefix is shared under a
            sliding window.
    """
    if attention_mask is not None:
        raise ValueError(f"{PER_SAMPLE}: expected no attention_mask, got one: pass packed rows, or use sdpa")
    tokens = [segment.tokens for segment in segments or ()]
    if len(query) != 1 or sum(tokens) != query.shape[2]:
        raise ValueError(
            f"{PER_SAMPLE}: expected segments that add up to one row of {query.shape[2]} tokens, got {tokens} and "
            f"{len(query)} row(s): use attn_implementation=sdpa if the language model does not pass the argument on"
        )
    parts = zip(*(tensor.split(tokens, 2) for tensor in (query, key, value)), strict=True)
    outputs = [
        output
        for segment, part in zip(segments, parts, strict=True)
        for output in _attend(module, *part, segment, sliding_window, options)
    ]
    return torch.cat(outputs, 1), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    window: int | None,
    options: dict[str, Any],
) -> Iterator[torch.Tensor]:
    """Yield the outputs of a segment: of its first conversation, which needs no mask, then of all others."""
    if segment.prefix and window is not None:
        raise ValueError(f"{PER_SAMPLE}: conversations cannot share a prefix under a sliding window of {window}")
    first = segment.lengths[0]
    own = [tensor[:, :, :first] for tensor in (query, key, value)]
    yield sdpa_attention_forward(module, *own, _window_mask(own[0], window), **options)[0]
    if first < segment.tokens:
        mask = segment.mask[first:].to(query.device)
        yield sdpa_attention_forward(module, query[:, :, first:], key, value, mask[None, None], **options)[0]


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
    """Return whether the language model of a SAIL-VL attends sample by sample, and so needs `segments`."""
    return model.language_model.config._attn_implementation == PER_SAMPLE


def attention_arguments(model: PreTrainedModel, segments: Sequence[Segment]) -> dict[str, Any]:
    """
    Return the arguments that the model needs, besides those of the pack, to keep the segments of a row apart.

    Without a shared prefix position ids suffice, of which transformers makes masks, or boundaries for FlashAttention.
    """
    if is_per_sample(model):
        return {"segments": segments}
    if not any(segment.prefix for segment in segments):
        return {}
    language = model.language_model
    mask = row_mask(segments).to(language.device)
    if language.config._attn_implementation == "eager":  # which adds it
        mask = torch.zeros(mask.shape, dtype=language.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(language.dtype).min
        )
    return {"attention_mask": mask}


AttentionInterface.register(PER_SAMPLE, sdpa_per_sample)
