# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The SAILViT vision tower (arXiv 2507.01643): a pre-norm ViT with the architecture of AIMv2 (arXiv 2411.14402).

    pixels -> patches (convolution, RMSNorm) -> + positions -> blocks x L -> RMSNorm -> tokens
    block:  x + attention(norm_1(x));  x + swiglu(norm_2(x))

No class token, one fused query-key-value product, no biases besides the patch convolution's, positions learned (and
interpolated on request) or sine-cosine. Parameter names are those of the released SAILViT checkpoints.

Shapes: B tiles, H and W pixels, R x C the patch grid (rows, columns), N = R * C tokens, D width, h heads, f the pixel
shuffle factor.
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
    Folds every `factor` x `factor` square of tokens into the channels of one ("v2" of the SAIL-VL releases).

    Args:
        tokens: (B, R * C, D), row by row.
        grid: (R, C), the rows and columns the tokens stand in.
        factor: Side f of the square.

    Returns:
        (B, R/f * C/f, f * f * D), row by row; the channels run over the row in the square, its column, then D.

    Raises:
        ValueError: The tokens do not fill the grid, or the factor does not divide it.
    """
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {rows} x {columns} = {rows * columns}")
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(f"a grid of {rows} x {columns} tokens cannot be folded in squares of {factor} x {factor}")
    return rearrange(
        tokens, "b (r p c q) d -> b (r c) (p q d)", r=rows // factor, c=columns // factor, p=factor, q=factor
    )


def resample_position_embeddings(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Resamples learned positions to another grid: bicubic, antialiased, in float32, as timm does for the same towers.

    Args:
        positions: (1, N, D) of a square grid, row by row.
        grid: (R, C) wanted.

    Returns:
        (1, R * C, D) in the dtype of `positions`; `positions` itself where the grid is the one they have.
    """
    side = round(positions.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    image = rearrange(positions.float(), "1 (r c) d -> 1 d r c", r=side)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return rearrange(image, "1 d r c -> 1 (r c) d").to(positions.dtype)


def sincos_position_embeddings(grid: tuple[int, int], width: int, device: torch.device | None = None) -> torch.Tensor:
    """
    2-D sine-cosine positions of the `native` AIMv2 checkpoints: (1, R * C, `width`), float32.

    The first half of the channels stands for the column, the second for the row; each is sines, then cosines, of
    `width / 4` frequencies from 1 down towards 1e-4.
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
    """Attention written out: query, key and value (B, h, N, D/h) -> output (B, N, h, D/h), weights (B, h, N, N)."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SAILViTRMSNorm(nn.RMSNorm):
    """torch's fused RMSNorm, in the dtype of its weight: float32 under autocast, as autocast runs LayerNorm."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class SAILViTPatchifier(nn.Module):
    """Pixels (B, channels, H, W) -> normed patches (B, N, D)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.norm = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixel_values.to(self.proj.weight.dtype))
        return self.norm(patches.flatten(2).transpose(1, 2))


class SAILViTPreprocessor(nn.Module):
    """Pixels (B, channels, H, W) -> embeddings (B, N, D): patches and their positions."""

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
        """The grid (R, C) of a batch of tiles, or a ValueError that says what would fit."""
        channels, patch, size = self.config.num_channels, self.config.patch_size, self.config.image_size
        shaped = pixel_values.ndim == 4 and 0 not in pixel_values.shape and pixel_values.shape[1] == channels
        if not shaped or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floats of shape (tiles, {channels}, height, width), normalized by the image "
                f"processor; got {pixel_values.dtype} of shape {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        if height % patch or width % patch:
            nearest = " x ".join(str(max(round(side / patch), 1) * patch) for side in (height, width))
            raise ValueError(
                f"pixel_values of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}: resize "
                f"to {nearest}, or to the {size} x {size} of this tower"
            )
        fixed = self.config.pos_embed_type == "absolute" and not interpolate_pos_encoding
        if fixed and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values of {height} x {width} pixels do not fit this tower's {size} x {size}: resize them, or "
                "pass interpolate_pos_encoding=True"
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
    """SwiGLU: fc1 is the gate, fc3 the branch it gates, fc2 the way back to the width D."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is none of transformers' activations")
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.fc2(self.act(self.fc1(hidden_states)) * self.fc3(hidden_states))
        return F.dropout(output, self.config.projection_dropout, self.training)


class SAILViTBlock(GradientCheckpointingLayer):
    """One pre-norm block: attention, then SwiGLU, each added to what came in."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.norm_1 = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = SAILViTAttention(config)
        self.norm_2 = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SAILViTMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attn(self.norm_1(hidden_states), output_attentions)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm_2(hidden_states)), weights


class SAILViTTransformer(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(SAILViTBlock(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = SAILViTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """(B, N, D) -> tokens after the final norm; on request the embeddings and every block's output; the weights."""
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
    """Loading, saving, initialization and what the tower supports; see transformers' PreTrainedModel."""

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

    def _outputs_wanted(
        self, output_hidden_states: bool | None, output_attentions: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool, bool]:
        """Each flag as the call gives it, else as the configuration does."""
        config = self.config
        return (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            config.output_attentions if output_attentions is None else output_attentions,
            config.return_dict if return_dict is None else return_dict,
        )


class SAILViTModel(SAILViTPreTrainedModel):
    """The tower: pixels in, tokens out."""

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
            interpolate_pos_encoding: Resample learned positions to the grid at hand, so that any multiples of the patch
                size fit. Sine-cosine positions fit any grid without it.
            output_hidden_states: Return the embeddings and the output of every block, before the final norm.
            output_attentions: Return the attention weights; computed by the eager attention, whichever is set.
            return_dict: Return an object with named fields (the default) or a tuple.
            num_tiles, tile_grids: What the image processor says beside the pixels; accepted so that its whole output
                can be passed, and not used: every tile is encoded by itself.

        Returns:
            last_hidden_state (B, N, D) after the final norm; pooler_output (B, D), its mean over the tokens (the
            recognition feature of the paper); hidden_states, num_hidden_layers + 1 of (B, N, D); attentions,
            num_hidden_layers of (B, h, N, N).

        Raises:
            ValueError: Pixels of a shape, size or type that does not fit; the message says what would.
        """
        hidden, attentions, as_dict = self._outputs_wanted(output_hidden_states, output_attentions, return_dict)
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
        Tokens ready for a connector: `last_hidden_state` after `pixel_shuffle` by `config.pixel_shuffle_factor` f.

        Args:
            pixel_values: (B, channels, H, W), as `forward` takes them.
            interpolate_pos_encoding: As `forward` takes it.
            return_dict: Return what `forward` returns, these tokens as its pooler_output, as transformers' own models
                do.
            output_hidden_states, output_attentions: Return those too, in that object.

        Returns:
            (B, N / f^2, f^2 * D), or that object.

        Raises:
            ValueError: As `forward` and `pixel_shuffle` do.
        """
        output = self(pixel_values, interpolate_pos_encoding, output_hidden_states, output_attentions, return_dict=True)
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        tokens = pixel_shuffle(output.last_hidden_state, grid, self.config.pixel_shuffle_factor)
        if not (return_dict or output_hidden_states or output_attentions):
            return tokens
        output.pooler_output = tokens
        return output


class SAILViTBackbone(BackboneMixin, SAILViTPreTrainedModel):
    """The tower as a backbone of transformers: feature maps of the blocks that `config.out_features` names."""

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
        Takes what `SAILViTModel.forward` takes.

        Returns:
            feature_maps, one (B, D, R, C) for every stage of out_features ("stem" is the embeddings), each after the
            final norm, as in transformers' DINOv2 backbone; hidden_states and attentions as SAILViTModel returns them.
        """
        hidden, attentions, as_dict = self._outputs_wanted(output_hidden_states, output_attentions, return_dict)
        embeddings = self.preprocessor(pixel_values, interpolate_pos_encoding)
        _, states, weights = self.trunk(embeddings, True, attentions)
        rows = pixel_values.shape[-2] // self.config.patch_size
        chosen = [self.trunk.post_trunk_norm(states[index]) for index in self.out_indices]
        maps = tuple(rearrange(tokens, "b (r c) d -> b d r c", r=rows).contiguous() for tokens in chosen)
        output = BackboneOutput(feature_maps=maps, hidden_states=states if hidden else None, attentions=weights)
        return output if as_dict else output.to_tuple()


class SAILViTClassificationHead(nn.Module):
    """The paper's recognition head, a 2-layer MLP: pooled features (images, D) -> logits (images, labels)."""

    def __init__(self, config: SAILViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(pooled)))


class SAILViTForImageClassification(SAILViTPreTrainedModel):
    """The tower with a classification head on the mean of its tokens (the paper's visual recognition setting)."""

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
        Takes what `SAILViTModel.forward` takes, and:

        Args:
            labels: (images,) class indices, or what `config.problem_type` calls for; a loss is returned with them.
            num_tiles: (images,) tiles of each image, as the image processor returns them: the mean runs over all the
                tokens of an image, its tiles and its thumbnail. Without it every tile is an image.

        Returns:
            loss, logits (images, num_labels), hidden_states, attentions.

        Raises:
            ValueError: num_tiles does not add up to the tiles in pixel_values, or leaves an image without any.
        """
        hidden, attentions, as_dict = self._outputs_wanted(output_hidden_states, output_attentions, return_dict)
        tower = self.vision_model(pixel_values, interpolate_pos_encoding, hidden, attentions, return_dict=True)
        logits = self.classifier(self._pool_images(tower.pooler_output, num_tiles))
        output = ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=tower.hidden_states,
            attentions=tower.attentions,
        )
        return output if as_dict else output.to_tuple()

    @staticmethod
    def _pool_images(pooled_tiles: torch.Tensor, num_tiles: torch.Tensor | None) -> torch.Tensor:
        if num_tiles is None:
            return pooled_tiles
        counts = torch.as_tensor(num_tiles).reshape(-1).tolist()
        if sum(counts) != len(pooled_tiles) or min(counts) < 1:
            raise ValueError(
                f"num_tiles must be at least 1 for each image and add up to the {len(pooled_tiles)} tiles in "
                f"pixel_values, got {counts}"
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
