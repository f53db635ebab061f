# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the SAILViT vision encoder (arXiv 2507.01643)."""

import inspect
from typing import Any

from transformers import PretrainedConfig


try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers < 5.2
    from transformers.utils.backbone_utils import BackboneConfigMixin

# The published sizes of AIMv2, which SAILViT is initialised from (arXiv 2411.14402, table 1).
SIZES = {
    "base": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 6},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8},
    "huge": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 24},
}

# Version of the code copied into a model folder; raised when folders written before need newer code.
CODE_VERSION = 2
# The class that each Auto class of transformers loads from a model folder.
AUTO_MAP = {
    "AutoConfig": "configuration_sailvit.SAILViTConfig",
    "AutoModel": "modeling_sailvit.SAILViTModel",
    "AutoModelForImageClassification": "modeling_sailvit.SAILViTForImageClassification",
    "AutoBackbone": "modeling_sailvit.SAILViTBackbone",
    "AutoImageProcessor": "image_processing_sailvit.SAILViTImageProcessor",
}


class SAILViTConfig(BackboneConfigMixin, PretrainedConfig):
    r"""
    Configuration of a SAILViT vision encoder. The defaults are SAILViT-Large; `SAILViTConfig.from_size("huge")` returns
    another published size. The field names are those of the released checkpoints.

    Args:
        hidden_size: Width D of a token; a multiple of `num_attention_heads`.
        intermediate_size: Width of the SwiGLU.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; the published models have 128 channels per head.
        num_channels: Channels of `pixel_values`.
        image_size: Height and width of a tile in pixels, for which the position embeddings are defined.
        patch_size: Height and width of a patch in pixels; divides `image_size`.
        rms_norm_eps: Epsilon of every RMSNorm.
        attention_dropout: Dropout probability of the attention weights, during training.
        projection_dropout: Dropout probability of the outputs of attention and SwiGLU, during training.
        qkv_bias: Whether the query, key and value projection has a bias.
        use_bias: Whether the output projection of attention and the linear layers of the SwiGLU have a bias.
        hidden_act: Activation of the gate of the SwiGLU.
        initializer_range: Standard deviation of newly initialised weights.
        pos_embed_type: `"absolute"`, learned and interpolated on request, or `"sincos"`, the 2-D sine-cosine embeddings
            of the `native` checkpoints, computed for the grid of the input.
        pixel_shuffle_factor: Side of the square of tokens that `get_image_features` merges into one token.
        out_features: Feature maps that SAILViTBackbone returns: `"stem"` (embeddings), `"stage1"` ... one per block.
        out_indices: The same as indices into `stage_names`; the last block if neither is given.

    Raises:
        ValueError: A field is out of range or contradicts another; the message names it.
    """

    model_type = "sailvit"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 8,
        num_channels: int = 3,
        image_size: int = 448,
        patch_size: int = 14,
        rms_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        qkv_bias: bool = False,
        use_bias: bool = False,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
        pos_embed_type: str = "absolute",
        pixel_shuffle_factor: int = 2,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.qkv_bias = qkv_bias
        self.use_bias = use_bias
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.pos_embed_type = pos_embed_type
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self._check_fields()
        self._set_feature_maps(out_features, out_indices)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "SAILViTConfig":
        """Return the config of a published size ("base", "large", "huge", "1b", "3b"), updated with `overrides`."""
        if str(size).lower() not in SIZES:
            raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
        config = cls(**{**SIZES[size.lower()], **overrides})
        fields = {*dir(cls()), "attn_implementation"}
        unknown = [key for key in overrides if key not in fields]
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {', '.join(unknown)}")
        return config

    @property
    def grid_size(self) -> int:
        """Number of patches along each side of a tile of `image_size` pixels."""
        return self.image_size // self.patch_size

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that SAILViTBackbone can return, in order: the embeddings, then every block."""
        return ["stem", *(f"stage{block}" for block in range(1, self.num_hidden_layers + 1))]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that field overrides are validated together with the other fields."""
        fields = inspect.signature(cls.__init__).parameters
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if key in fields}
        if overrides.keys() & {"out_features", "out_indices"}:  # one override replaces both fields
            config_dict = {
                key: value for key, value in config_dict.items() if key not in ("out_features", "out_indices")
            }
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """
        As in transformers, without `out_features` and `out_indices` where they are the default: a model saved with 24
        blocks and loaded with 12 then returns the feature map of block 12.
        """
        output = super().to_dict()
        if output.get("out_features") == self.stage_names[-1:]:
            del output["out_features"], output["out_indices"]
        return output

    def _check_fields(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
                      "image_size", "patch_size", "pixel_shuffle_factor"):  # fmt: skip
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        for field, low, high in (
            ("attention_dropout", 0.0, 1.0),
            ("projection_dropout", 0.0, 1.0),
            ("rms_norm_eps", 0.0, float("inf")),
            ("initializer_range", 0.0, float("inf")),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ValueError(f"{field} must be in [{low:g}, {high:g}), got {value!r}")
        for field in ("qkv_bias", "use_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.pos_embed_type not in ("absolute", "sincos"):
            raise ValueError(f'pos_embed_type must be "absolute" or "sincos", got {self.pos_embed_type!r}')
        if self.pos_embed_type == "sincos" and self.hidden_size % 4:
            raise ValueError(f'pos_embed_type "sincos" needs a hidden_size divisible by 4, got {self.hidden_size}')

    def _set_feature_maps(self, out_features: list[str] | None, out_indices: list[int] | None) -> None:
        for field, value in (("out_features", out_features), ("out_indices", out_indices)):
            if value is not None and (not isinstance(value, (list, tuple)) or not value):
                raise ValueError(f"{field} must be a non-empty list of stages, got {value!r}")
        if out_indices is None:
            self.out_features = out_features if out_features is None else list(out_features)
            return
        self.out_indices = list(out_indices)
        if out_features is not None and list(out_features) != self.out_features:
            raise ValueError(f"out_features {out_features} and out_indices {out_indices} name different stages")


SAILViTConfig.register_for_auto_class()

__all__ = ["SAILViTConfig"]
