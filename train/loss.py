# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The loss of an optimizer step, over the answer tokens of all of its packs and ranks.

    loss = sum of w * cross entropy / sum of w, over all answer tokens of the step

    token:  w = 1            the mean over answer tokens
    sample: w = 1 / n        the mean over samples of the mean over their n answer tokens
    square: w = 1 / sqrt(n)  between the two, as in the training code of InternVL

Of a sample with independent turns each turn counts as a sample, as it would in a row of its own.

Logits are computed at the positions that predict an answer token only: memory and time of the LM head follow the
answers, not the length of a pack.

Shapes: S tokens of a pack, T answer tokens among them, V entries of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .collate import IGNORED, Pack


WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "token": torch.ones_like,
    "sample": torch.reciprocal,
    "square": torch.rsqrt,
}


def answer_weights(pack: Pack, reduction: str) -> torch.Tensor:
    """
    Return the weight (T,) float64 of every answer token of a pack, before they are divided by their sum in the step.

    Raises:
        ValueError: The reduction is unknown.
    """
    if reduction not in WEIGHTS:
        raise ValueError(f"loss_reduction: expected one of {', '.join(WEIGHTS)}, got {reduction!r}")
    answers = torch.tensor(pack.answers, dtype=torch.int64)
    return WEIGHTS[reduction](answers.double()).repeat_interleave(answers)


def pack_loss(
    model: nn.Module, inputs: dict[str, Any], weights: torch.Tensor, keeps_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the sum of weight * cross entropy over the answer tokens of a pack, and the cross entropies (T,), detached.

    Without answer tokens the sum is 0, and so are the gradients of all trained parameters; none is missing.

    Args:
        model: A SAIL-VL, or its wrapper of an engine.
        inputs: Arguments of the model on its device: input_ids and labels (1, S), ...
        weights: (T,), of the answer tokens in their order.
        keeps_logits: Whether the language model takes `logits_to_keep`; if not, it computes all logits.
    """
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    targets = inputs["labels"][0, 1:]  # position p predicts token p + 1
    positions = (targets != IGNORED).nonzero().flatten()
    if keeps_logits:
        logits = model(**arguments, logits_to_keep=positions).logits[0]
    else:
        logits = model(**arguments).logits[0, positions]
    losses = F.cross_entropy(logits.float(), targets[positions], reduction="none")
    return (losses * weights.to(losses)).sum(), losses.detach()
