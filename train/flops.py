# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
FLOPs of a SAIL-VL from shapes: of a tile, a token, an answer token; forward, backward and recomputation.

A multiplication and an addition are two FLOPs. Linear layers, convolutions and attention count; normalisation,
activations, class tokens and embeddings do not. Attention counts every pair of tokens of a sample, as in MFU's
definition (PaLM, arXiv 2204.02311, appendix B), although a causal kernel skips half of them.

Models are on the meta device: shapes without memory.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configuration_sailvl import SAILVLConfig
from ..modeling_sailvl import SAILVLForConditionalGeneration


# Component -> the module of a SAIL-VL.
COMPONENTS = {"vision": "vision_model", "connector": "mlp1", "language": "language_model"}


def meta_model(config: SAILVLConfig, trainable: Collection[str] = tuple(COMPONENTS)) -> SAILVLForConditionalGeneration:
    """
    Return a model without memory (on the meta device) in which only the components in `trainable` require gradients.

    Raises:
        ValueError: A component is unknown.
    """
    if unknown := [name for name in trainable if name not in COMPONENTS]:
        raise ValueError(f"trainable: expected {', '.join(COMPONENTS)}, got {', '.join(map(repr, unknown))}")
    with torch.device("meta"):
        model = SAILVLForConditionalGeneration(config)
        model.tie_weights()  # transformers 5.0 ties them only when weights are loaded
    for component, module in COMPONENTS.items():
        getattr(model, module).requires_grad_(component in trainable)
    return model


def weights_per_token(model: nn.Module, config: Any, trainable_only: bool = False) -> float:
    """
    Return the number of weights that every token is multiplied with.

    Of the experts of a mixture only the share that a token visits counts.
    """
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    total = 0.0
    for name, module in model.named_modules():
        is_expert = "experts" in name.split(".")
        for weight in _multiplied(module, is_expert):
            if weight.requires_grad or not trainable_only:
                total += weight.numel() * (share if is_expert else 1.0)
    return total


def _multiplied(module: nn.Module, is_expert: bool) -> list[nn.Parameter]:
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim > 1 and not isinstance(module, nn.Embedding):
        return [weight]  # of nn.Linear, of convolutions, of GPT-2's Conv1D
    # transformers >= 5: the experts of a layer are one parameter (experts, in, out)
    return [weight for weight in module.parameters(recurse=False) if weight.ndim == 3] if is_expert else []


def tile_attention(config: SAILVLConfig) -> float:
    """Return the FLOPs of the vision encoder's attention in a tile."""
    rows, columns = config.grid_size
    return _encoder_attention(config.vision_config, rows * columns)


def _encoder_attention(config: Any, patches: int) -> float:
    """Return 4 L N^2 D."""
    return 4 * config.num_hidden_layers * patches**2 * config.hidden_size


def forward_flops_of_tile(model: SAILVLForConditionalGeneration) -> float:
    """Return the FLOPs of vision encoder and connector for a tile, in a forward pass."""
    config = model.config
    vision, (rows, columns) = config.vision_config, config.grid_size
    encoder = 2 * rows * columns * weights_per_token(model.vision_model, vision) + tile_attention(config)
    return encoder + 2 * config.image_seq_length * weights_per_token(model.mlp1, vision)


def forward_flops_of_token(model: SAILVLForConditionalGeneration) -> float:
    """Return the FLOPs of the decoder layers for a token, in a forward pass, without attention and LM head."""
    return 2 * weights_per_token(model.get_decoder(), model.config.text_config)


# Training


@dataclass(frozen=True)
class Flops:
    """
    FLOPs of training.

    Attributes:
        forward: All components.
        backward: Through what needs gradients: gradients of activations where a trained parameter is further up,
            gradients of weights where they are trained.
        recomputation: The second forward pass under gradient checkpointing.
    """

    forward: float
    backward: float
    recomputation: float = 0.0

    @property
    def model(self) -> float:
        """The FLOPs that the MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """The FLOPs that the HFU counts: recomputation included."""
        return self.model + self.recomputation

    def __add__(self, other: "Flops") -> "Flops":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Flops(*(mine + others for mine, others in pairs))

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(value * factor for value in vars(self).values()))


@dataclass(frozen=True)
class SampleFlops:
    """FLOPs of a sample: per tile + per token + per square of its tokens + per answer token."""

    tile: Flops
    token: Flops
    squared_token: Flops
    answer: Flops

    def of(self, tokens: float, tiles: float, answers: float, squared_tokens: float | None = None) -> Flops:
        """
        Return the FLOPs of a sample, or of many if the arguments are sums over them.

        Args:
            tokens: Tokens, visual tokens included.
            squared_tokens: The square of `tokens`; of many samples the sum of their squares, which is not the square
                of the sum.
        """
        squared = tokens**2 if squared_tokens is None else squared_tokens
        return self.tile * tiles + self.token * tokens + self.squared_token * squared + self.answer * answers


def sample_flops(model: SAILVLForConditionalGeneration, checkpointed: Collection[str] = ()) -> SampleFlops:
    """
    Return the FLOPs of training on a sample.

    Args:
        model: On the meta device; `requires_grad` of its parameters decides what the backward pass computes.
        checkpointed: Components under gradient checkpointing: vision, language.
    """
    text = model.config.text_config
    vision_trained, connector_trained = _is_trained(model.vision_model), _is_trained(model.mlp1)
    reaches_language = vision_trained or connector_trained or _is_trained(model.language_model)
    tile = _vision_flops(model, vision_trained, "vision" in checkpointed)
    tile += _linear_flops(
        model.config.image_seq_length, model.mlp1, model.config.vision_config, vision_trained or connector_trained
    )
    decoder = model.get_decoder()
    token = _linear_flops(1, decoder, text, reaches_language)
    pair = 4 * text.num_hidden_layers * text.num_attention_heads * _head_dim(text)
    squared = Flops(pair, 2 * pair * reaches_language)
    if "language" in checkpointed and reaches_language:
        token += Flops(0, 0, token.forward - 2 * _last_products(decoder, text))
        squared += Flops(0, 0, pair)
    head = model.get_output_embeddings()
    return SampleFlops(tile, token, squared, _linear_flops(1, head, text, reaches_language))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear_flops(positions: int, module: nn.Module, config: Any, is_reached: bool) -> Flops:
    """Return the FLOPs of the linear layers of a module; `is_reached`: the backward pass goes through it."""
    forward = 2 * positions * weights_per_token(module, config)
    of_weights = 2 * positions * weights_per_token(module, config, trainable_only=True)
    return Flops(forward, (forward if is_reached else 0.0) + of_weights)


def _vision_flops(model: SAILVLForConditionalGeneration, is_trained: bool, is_checkpointed: bool) -> Flops:
    rows, columns = model.config.grid_size
    return _encoder_flops(model.vision_model, model.config.vision_config, rows * columns, is_trained, is_checkpointed)


def next_patch_flops(model: nn.Module, checkpointed: Collection[str] = ()) -> SampleFlops:
    """Return the FLOPs of training a NextPatchModel; its answers are the predicted patches, which the head computes."""
    config, nothing = model.config, Flops(0.0, 0.0)
    tile = _encoder_flops(model.vision_model, config, config.grid_size**2, True, "vision" in checkpointed)
    return SampleFlops(tile, nothing, nothing, _linear_flops(1, model.head, config, True))


def _encoder_flops(encoder: nn.Module, config: Any, patches: int, is_trained: bool, is_checkpointed: bool) -> Flops:
    """Return the FLOPs of a vision encoder for a tile. Pixels need no gradient: the patch convolution has none."""
    attention = _encoder_attention(config, patches)
    linear = _linear_flops(patches, encoder, config, is_trained)
    embedding = sum(2 * patches * m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Conv2d))
    blocks = linear.forward - embedding - 2 * patches * _last_products(encoder, config) + attention
    return Flops(
        linear.forward + attention,
        linear.backward + (2 * attention - embedding if is_trained else 0.0),
        blocks if is_trained and is_checkpointed else 0.0,
    )


def _last_products(model: nn.Module, config: Any) -> float:
    """
    Return the weights of the last product of every block, the down projection of its MLP.

    torch's checkpoint stops recomputing a block when all that the backward pass needs is there, and the output of the
    last product is not needed (torch.utils.checkpoint.set_checkpoint_early_stop).
    """
    total, inner = 0, getattr(config, "intermediate_size", None)  # Dinov2Config and OPTConfig have none
    for block in blocks_of(model, config):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        inputs = [m for m in linears if (m.in_features == inner if inner else m.in_features > m.out_features)]
        has_experts = any("experts" in name.split(".") for name, _ in block.named_modules())
        total += inputs[-1].weight.numel() if inputs and not has_experts else 0
    return total


def blocks_of(model: nn.Module, config: Any) -> list[nn.Module]:
    """Return the transformer blocks of a vision encoder or language model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(next((blocks for blocks in lists if len(blocks) == config.num_hidden_layers), []))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
