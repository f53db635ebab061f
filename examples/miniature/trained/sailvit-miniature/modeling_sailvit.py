# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
SAILViT vision encoder (vision tower, arXiv 2507.01643): a pre-norm ViT with the AIMv2 architecture (arXiv 2411.14402).

    pixels -> patches (convolution, RMSNorm) -> + positions -> blocks x L -> RMSNorm -> tokens
    block:  x + attention(norm_1(x));  x + swiglu(norm_2(x))

No class token, fused query-key-value projection, no biases except in the patch convolution, position embeddings learned
(interpolated on request) or sine-cosine. Parameter names are those of the released SAILViT checkpoints.

Shapes: B tiles, H and W their height and width in pixels, R x C patch grid (rows, columns), N = R * C tokens, D width,
h heads, f pixel shuffle factor.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration_sailvit import SAILViTConfig


try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers < 5.2
    from transformers.utils.backbone_utils import BackboneMixin


def pixel_shuffle(tokens: torch.Tensor, grid: tuple[int, int], factor: int = 2) -> torch.Tensor:
    """
    Merge every `factor` x `factor` square of tokens into one token (`ps_version` "v2" of the SAIL-VL releases).

    Args:
        tokens: (B, R * C, D), row by row.
        grid: (R, C), rows and columns of the patch grid.
        factor: Side f of the square.

    Returns:
        (B, R/f * C/f, f * f * D), row by row; channels are ordered by row in the square, column in the square, then D.

    Raises:
        ValueError: The number of tokens is not R * C, or the factor does not divide the grid.
    """
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise ValueError(f"expected {rows * columns} tokens for a grid of {rows} x {columns}, got {tokens.shape[1]}")
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(f"factor {factor} does not divide a grid of {rows} x {columns} tokens")
    return rearrange(
        tokens, "b (r p c q) d -> b (r c) (p q d)", r=rows // factor, c=columns // factor, p=factor, q=factor
    )


def resample_position_embeddings(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Resample learned position embeddings to another grid: bicubic, antialiased, in float32, like timm.

    Args:
        positions: (1, N, D) of a square grid, row by row.
        grid: Target grid (R, C).

    Returns:
        (1, R * C, D) in the dtype of `positions`; `positions` itself if the grid does not change.
    """
    side = round(int(positions.shape[1]) ** 0.5)
    if grid == (side, side):
        return positions
    image = rearrange(positions.float(), "1 (r c) d -> 1 d r c", r=side)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return rearrange(image, "1 d r c -> 1 (r c) d").to(positions.dtype)


def sincos_position_embeddings(grid: tuple[int, int], width: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Return the 2-D sine-cosine position embeddings of the `native` AIMv2 checkpoints, (1, R * C, `width`), float32.

    The first half of the channels encodes the column, the second half the row; each half is the sines, then the
    cosines, of `width / 4` frequencies from 1 towards 1e-4.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4))
    rows, columns = (torch.arange(count, dtype=torch.float32, device=device) for count in grid)
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).flatten(1)  # (2: column, row; N)
    angles = angles[..., None] * frequencies
    return rearrange(torch.stack([angles.sin(), angles.cos()]), "trig side n d -> 1 n (side trig d)")


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention: query, key and value (B, h, N, D/h) -> output (B, N, h, D/h), weights (B, h, N, N)."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SAILViTRMSNorm(nn.RMSNorm):
    """Fused RMSNorm of torch, in the dtype of its weight: under autocast float32, like LayerNorm."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class SAILViTPatchifier(nn.Module):
    """Patch embedding: pixels (B, channels, H, W) -> normalized patches (B, N, D)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.norm = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixel_values.to(self.proj.weight.dtype))
        return self.norm(patches.flatten(2).transpose(1, 2))


class SAILViTPreprocessor(nn.Module):
    """Input embeddings: pixels (B, channels, H, W) -> patches plus position embeddings (B, N, D)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.config = config
        self.patchifier = SAILViTPatchifier(config)
        if config.pos_embed_type == "absolute":
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid_size**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        grid = self.patch_grid(pixel_values, interpolate_pos_encoding)
        patches = self.patchifier(pixel_values)
        if self.config.pos_embed_type == "sincos":
            positions = sincos_position_embeddings(grid, patches.shape[-1], patches.device).to(patches.dtype)
        else:
            positions = resample_position_embeddings(self.pos_embed, grid)
        return patches + positions

    def patch_grid(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """Return the patch grid (R, C) of a batch of tiles after checking their shape, dtype and size."""
        channels, patch, size = self.config.num_channels, self.config.patch_size, self.config.image_size
        has_shape = pixel_values.ndim == 4 and 0 not in pixel_values.shape and pixel_values.shape[1] == channels
        if not has_shape or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floats of shape (tiles, {channels}, height, width), normalized by the image "
                f"processor; got {pixel_values.dtype} of shape {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        if height % patch or width % patch:
            nearest = " x ".join(str(max(round(side / patch), 1) * patch) for side in (height, width))
            raise ValueError(
                f"pixel_values of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}: resize "
                f"to {nearest}, or to the {size} x {size} of this model"
            )
        is_fixed = self.config.pos_embed_type == "absolute" and not interpolate_pos_encoding
        if is_fixed and (height, width) != (size, size):
            raise ValueError(
                f"expected pixel_values of {size} x {size} pixels, got {height} x {width}: resize them, or pass "
                "interpolate_pos_encoding=True"
            )
        return height // patch, width // patch


class SAILViTAttention(nn.Module):
    """Full self-attention of (B, N, D) tokens, dispatched to the configured attention implementation."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = rearrange(self.qkv(hidden_states), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        attention = eager_attention_forward if output_attentions else self._attention_function()
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, None, scaling=self.scaling, dropout=dropout, is_causal=False
        )
        output = F.dropout(self.proj(output.flatten(2)), self.config.projection_dropout, self.training)
        return output, weights if output_attentions else None

    def _attention_function(self) -> Callable:
        if self.config._attn_implementation == "eager":
            return eager_attention_forward
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):  # transformers >= 5
            return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]


class SAILViTMLP(nn.Module):
    """SwiGLU MLP: fc1 is the gate projection, fc3 the up projection, fc2 the down projection."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        if config.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act {config.hidden_act!r} is not an activation of transformers: use a key of ACT2FN"
            )
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.fc2(self.act(self.fc1(hidden_states)) * self.fc3(hidden_states))
        return F.dropout(output, self.config.projection_dropout, self.training)


class SAILViTBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then SwiGLU, each with a residual connection."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.norm_1 = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = SAILViTAttention(config)
        self.norm_2 = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SAILViTMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention, weights = self.attn(self.norm_1(hidden_states), output_attentions)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.norm_2(hidden_states)), weights


class SAILViTTransformer(nn.Module):
    """The transformer blocks and the final norm."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(SAILViTBlock(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """(B, N, D) -> tokens after the final norm, hidden states and attention weights; the last two on request."""
        states, attentions = [hidden_states] if output_hidden_states else [], []
        for block in self.blocks:
            hidden_states, weights = block(hidden_states, output_attentions)
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions:
                attentions.append(weights)
        return (
            self.post_trunk_norm(hidden_states),
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


class SAILViTPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving, weight initialization and supported features; see transformers' PreTrainedModel."""

    config_class = SAILViTConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SAILViTPreprocessor", "SAILViTBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, SAILViTPreprocessor) and hasattr(module, "pos_embed"):
            nn.init.trunc_normal_(module.pos_embed, std=self.config.initializer_range)

    def _resolve_output_flags(
        self, output_hidden_states: bool | None, output_attentions: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool, bool]:
        """Return the flags of the call, with the defaults from the config."""
        config = self.config
        return (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            config.output_attentions if output_attentions is None else output_attentions,
            config.return_dict if return_dict is None else return_dict,
        )


class SAILViTModel(SAILViTPreTrainedModel):
    """The SAILViT vision encoder: tiles in, tokens out."""

    def __init__(self, config: SAILViTConfig):
        super().__init__(config)
        self.preprocessor = SAILViTPreprocessor(config)
        self.trunk = SAILViTTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.preprocessor.patchifier

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.preprocessor.patchifier = value

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_tiles: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """
        Args:
            pixel_values: (B, channels, H, W) floats, cast to the dtype of the weights.
            interpolate_pos_encoding: Resample learned position embeddings to the grid of the input, whose height and
                width may be any multiples of the patch size. Sine-cosine embeddings do not need it.
            output_hidden_states: Return the embeddings and the output of every block, before the final norm.
            output_attentions: Return the attention weights; uses eager attention, whichever is configured.
            return_dict: Return an object with named fields (the default) or a tuple.
            num_tiles, tile_grids: Outputs of the image processor; unused, accepted so that its whole output can be
                passed. Every tile is encoded independently.

        Returns:
            last_hidden_state (B, N, D) after the final norm; pooler_output (B, D), its mean over the tokens (the
            recognition feature of the paper); hidden_states, num_hidden_layers + 1 of (B, N, D); attentions,
            num_hidden_layers of (B, h, N, N).

        Raises:
            ValueError: pixel_values have a wrong shape, size or dtype; the message names the expected one.
        """
        hidden, attentions, as_dict = self._resolve_output_flags(output_hidden_states, output_attentions, return_dict)
        embeddings = self.preprocessor(pixel_values, interpolate_pos_encoding)
        tokens, states, weights = self.trunk(embeddings, hidden, attentions)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=states, attentions=weights
        )
        return output if as_dict else output.to_tuple()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> torch.Tensor | BaseModelOutputWithPooling:
        """
        Return the input of a connector: `last_hidden_state` after `pixel_shuffle` by `config.pixel_shuffle_factor` f.

        Args:
            pixel_values: (B, channels, H, W), as in `forward`.
            interpolate_pos_encoding: As in `forward`.
            return_dict: Return the output of `forward` with these tokens as pooler_output, like the models of
                transformers.
            output_hidden_states, output_attentions: Also return those, in that object.

        Returns:
            (B, N / f^2, f^2 * D), or that object.

        Raises:
            ValueError: As in `forward` and `pixel_shuffle`.
        """
        output = self(pixel_values, interpolate_pos_encoding, output_hidden_states, output_attentions, return_dict=True)
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        tokens = pixel_shuffle(output.last_hidden_state, grid, self.config.pixel_shuffle_factor)
        if not (return_dict or output_hidden_states or output_attentions):
            return tokens
        output.pooler_output = tokens
        return output


class SAILViTBackbone(BackboneMixin, SAILViTPreTrainedModel):
    """SAILViT as a transformers backbone: feature maps of the blocks in `config.out_features`."""

    def __init__(self, config: SAILViTConfig):
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers < 5.2
            self._init_backbone(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.preprocessor = SAILViTPreprocessor(config)
        self.trunk = SAILViTTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.preprocessor.patchifier

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.preprocessor.patchifier = value

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_tiles: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
    ) -> BackboneOutput | tuple[torch.Tensor, ...]:
        """
        The arguments are those of `SAILViTModel.forward`.

        Returns:
            feature_maps, one (B, D, R, C) per stage in out_features ("stem" is the embeddings), each after the final
            norm, as in transformers' DINOv2 backbone; hidden_states and attentions as in SAILViTModel.
        """
        hidden, attentions, as_dict = self._resolve_output_flags(output_hidden_states, output_attentions, return_dict)
        embeddings = self.preprocessor(pixel_values, interpolate_pos_encoding)
        _, states, weights = self.trunk(embeddings, True, attentions)
        rows = pixel_values.shape[-2] // self.config.patch_size
        chosen = [self.trunk.post_trunk_norm(states[index]) for index in self.out_indices]
        maps = tuple(rearrange(tokens, "b (r c) d -> b d r c", r=rows).contiguous() for tokens in chosen)
        output = BackboneOutput(feature_maps=maps, hidden_states=states if hidden else None, attentions=weights)
        return output if as_dict else output.to_tuple()


class SAILViTClassificationHead(nn.Module):
    """Recognition head of the paper, a 2-layer MLP: pooled features (images, D) -> logits (images, labels)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(pooled)))


class SAILViTForImageClassification(SAILViTPreTrainedModel):
    """SAILViT with a classification head on the mean of its tokens (visual recognition in the paper)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = SAILViTModel(config)
        self.classifier = SAILViTClassificationHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        tile_grids: torch.Tensor | None = None,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """
        The other arguments are those of `SAILViTModel.forward`.

        Args:
            labels: (images,) class indices, or targets for `config.problem_type`; with labels a loss is returned.
            num_tiles: (images,) number of tiles of each image, from the image processor: the mean is taken over all
                tokens of an image, its tiles and thumbnail. Without it every tile is an image.

        Returns:
            loss, logits (images, num_labels), hidden_states, attentions.

        Raises:
            ValueError: num_tiles does not add up to the tiles in pixel_values, or an entry is below 1.
        """
        hidden, attentions, as_dict = self._resolve_output_flags(output_hidden_states, output_attentions, return_dict)
        encoded = self.vision_model(pixel_values, interpolate_pos_encoding, hidden, attentions, return_dict=True)
        logits = self.classifier(self._pool_images(encoded.pooler_output, num_tiles))
        output = ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if as_dict else output.to_tuple()

    @staticmethod
    def _pool_images(pooled_tiles: torch.Tensor, num_tiles: torch.Tensor | None) -> torch.Tensor:
        """Average the pooled tiles (B, D) of each image: (images, D)."""
        if num_tiles is None:
            return pooled_tiles
        counts = torch.as_tensor(num_tiles).reshape(-1).tolist()
        if sum(counts) != len(pooled_tiles) or min(counts) < 1:
            raise ValueError(
                f"num_tiles must be at least 1 per image and add up to the {len(pooled_tiles)} tiles in pixel_values, "
                f"got {counts}"
            )
        return torch.stack([tiles.mean(0) for tiles in pooled_tiles.split(counts)])


SAILViTModel.register_for_auto_class("AutoModel")
SAILViTBackbone.register_for_auto_class("AutoBackbone")
SAILViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "SAILViTBackbone",
    "SAILViTForImageClassification",
    "SAILViTModel",
    "SAILViTPreTrainedModel",
    "pixel_shuffle",
    "resample_position_embeddings",
    "sincos_position_embeddings",
]
