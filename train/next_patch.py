# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Next-patch prediction, which AIM pretrains vision encoders by (arXiv 2401.08541; the pixel loss of AIMv2, 2411.14402).

    tile -> encoder under prefix attention -> token i -> head -> the pixels of patch i + 1

The first S patches of a tile, its prefix, see each other; every later patch sees the patches before it. S is random, so
that the encoder also learns to attend in both directions, as it does afterwards. The loss is the mean squared error of
the patches after the prefix; each patch is normalised to mean 0 and variance 1.

Importing this module registers the attention with transformers, under the name PREFIX_CAUSAL.

Shapes: B tiles, N patches of a tile in row order, S their prefix lengths (B,), T predicted patches of all tiles, P
channels * patch_size^2 values of a patch, D width, h heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..configuration_sailvit import SAILViTConfig
from ..modeling_sailvit import SAILViTMLP, SAILViTModel, SAILViTPreTrainedModel, SAILViTRMSNorm


PREFIX_CAUSAL = "sdpa_prefix_causal"
EPSILON = 1e-6  # added to the variance of a patch, as in MAE (arXiv 2111.06377)


def prefix_mask(prefix_lengths: torch.Tensor, patches: int) -> torch.Tensor:
    """Return the mask (B, 1, N, N) bool: whether a patch (row) attends to another, itself included (column)."""
    positions = torch.arange(patches, device=prefix_lengths.device)
    causal = positions <= positions[:, None]
    return (causal | (positions < prefix_lengths[:, None, None]))[:, None]


def sdpa_prefix_causal(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention under `prefix_mask`, which NextPatchModel sets as `module.prefix_mask`: the encoder passes no mask on.

    Args:
        query, key, value: (B, h, N, D / h).
        attention_mask: None.
        options: As of transformers' sdpa attention: scaling, dropout, ...

    Returns:
        (B, N, h, D / h), and None.
    """
    return sdpa_attention_forward(module, query, key, value, module.prefix_mask, **options)


class PatchHead(nn.Module):
    """Prediction head: tokens (T, D) -> normalised patches (T, P); residual MLPs on each token alone, as in AIM."""

    def __init__(self, config: SAILViTConfig, blocks: int):
        super().__init__()
        self.norms = nn.ModuleList(SAILViTRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(blocks))
        self.mlps = nn.ModuleList(SAILViTMLP(config) for _ in range(blocks))
        self.proj = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            tokens = tokens + mlp(norm(tokens))
        return self.proj(tokens)


class NextPatchModel(SAILViTPreTrainedModel):
    """
    A vision encoder under prefix attention, and a head that predicts the next patch.

    Args:
        encoder: Loaded with `attn_implementation=PREFIX_CAUSAL`.
        head_blocks: MLPs of the head.
        seed: Of the weights of the head.

    Raises:
        ValueError: The encoder has another attention.
    """

    components = {"vision": "vision_model", "head": "head"}  # read by components_of

    def __init__(self, encoder: SAILViTModel, head_blocks: int, seed: int = 0):
        if encoder.config._attn_implementation != PREFIX_CAUSAL:
            got = encoder.config._attn_implementation
            raise ValueError(f"encoder: expected attn_implementation {PREFIX_CAUSAL}, got {got}: load it with that")
        super().__init__(encoder.config)
        self.vision_model = encoder
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = PatchHead(encoder.config, head_blocks).apply(self._init_weights)

    def forward(self, pixel_values: torch.Tensor, prefix_lengths: torch.Tensor) -> torch.Tensor:
        """
        Return the predicted patches (T, P) of all tiles: of each those after its prefix, in order.

        Args:
            pixel_values: (B, channels, H, W).
            prefix_lengths: (B,), 1 to N; N predicts nothing.
        """
        mask = prefix_mask(prefix_lengths, self.config.grid_size**2)
        for block in self.vision_model.trunk.blocks:
            block.attn.prefix_mask = mask  # stays until the backward pass, which may recompute the block
        tokens = self.vision_model(pixel_values).last_hidden_state
        return self.head(tokens[:, :-1][is_predicted(prefix_lengths, tokens.shape[1])])


def is_predicted(prefix_lengths: torch.Tensor, patches: int) -> torch.Tensor:
    """Return whether patch i + 1 is predicted (B, N - 1): whether it is after the prefix."""
    return torch.arange(1, patches, device=prefix_lengths.device) >= prefix_lengths[:, None]


def normalized_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return the patches of tiles (B, channels, H, W), each with mean 0 and variance 1: (B, N, P) float32."""
    patches = rearrange(pixel_values.float(), "b c (r p) (k q) -> b (r k) (p q c)", p=patch_size, q=patch_size)
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) * (variance + EPSILON).rsqrt()


def next_patch_loss(
    model: nn.Module, inputs: dict[str, Any], weights: torch.Tensor, patch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the sum of weight * mean squared error over the predicted patches, and the errors (T,), detached.

    Args:
        model: A NextPatchModel, or its wrapper of an engine.
        inputs: Arguments of the model on its device.
        weights: (T,), of the predicted patches in their order.
    """
    pixels, prefix_lengths = inputs["pixel_values"], inputs["prefix_lengths"]
    predicted = model(pixels, prefix_lengths)
    targets = normalized_patches(pixels, patch_size)
    targets = targets[:, 1:][is_predicted(prefix_lengths, targets.shape[1])]
    errors = F.mse_loss(predicted.float(), targets, reduction="none").mean(-1)
    return (errors * weights.to(errors)).sum(), errors.detach()


AttentionInterface.register(PREFIX_CAUSAL, sdpa_prefix_causal)
