# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model is trained for: the loss of a pack, its FLOPs, and what a model needs before it."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .attention import Segment, attend_per_sample, attention_arguments
from .flops import SampleFlops, next_patch_flops, sample_flops
from .loss import pack_loss
from .next_patch import NextPatchModel, next_patch_loss


class NextToken:
    """Next-token prediction: a SAIL-VL learns the answers of conversations."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.keeps_logits = model._supports_logits_to_keep()

    def flops(self, checkpointed: Collection[str]) -> SampleFlops:
        return sample_flops(self.model, checkpointed)

    def prepare(self, processes: int) -> None:
        """Let all ranks run the vision encoder in the same packs."""
        parts = (self.model.vision_model, self.model.mlp1)
        trains_vision = any(parameter.requires_grad for part in parts for parameter in part.parameters())
        self.model.always_run_vision = trains_vision or processes > 1

    def cpu_attention(self) -> AbstractContextManager:
        """The attention that is fastest on a CPU."""
        return attend_per_sample(self.model)

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], segments: list[Segment], weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the weighted loss of a pack, and the losses (T,) of its answer tokens, detached.

        Args:
            model: The model in its wrapper of an engine.
            inputs: Of the pack, on the device.
            segments: Of the pack.
            weights: (T,), of the answer tokens.
        """
        segments = segments or [Segment((1,))]  # a pack without samples is one token
        inputs = {**inputs, **attention_arguments(self.model, segments)}
        return pack_loss(model, inputs, weights, self.keeps_logits)


class NextPatch:
    """Next-patch prediction: a vision encoder learns to predict pixels; see next_patch.py."""

    def __init__(self, model: NextPatchModel):
        self.model = model

    def flops(self, checkpointed: Collection[str]) -> SampleFlops:
        return next_patch_flops(self.model, checkpointed)

    def prepare(self, processes: int) -> None:
        """Nothing: every pack has tiles."""

    def cpu_attention(self) -> AbstractContextManager:
        return nullcontext()

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], segments: list[Segment], weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of NextToken, of the predicted patches."""
        return next_patch_loss(model, inputs, weights, self.model.config.patch_size)


def objective_of(model: PreTrainedModel) -> NextToken | NextPatch:
    """Return what a model is trained for."""
    return NextPatch(model) if isinstance(model, NextPatchModel) else NextToken(model)
