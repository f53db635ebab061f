"""InternViT, as published with remote code, to transformers' InternVLVisionModel."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from ..export.image_settings import clip_settings
from ..plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from .checks import config_problems, contradictions, head_problems, invalid_values
from .mapped_plan import InternVLPlan, check_source, image_notes, match_notes, read_source
from .name_tables import Dimensions, Match, ModelFamily, NamingScheme


TRANSFORMERS = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.layers.{}.norm1": "encoder.layer.{}.layernorm_before",
    "encoder.layers.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.{part}_proj" for part in "qkv"),
    "encoder.layers.{}.attn.q_norm": "encoder.layer.{}.attention.q_norm",
    "encoder.layers.{}.attn.k_norm": "encoder.layer.{}.attention.k_norm",
    "encoder.layers.{}.attn.proj": "encoder.layer.{}.attention.projection_layer",
    "encoder.layers.{}.ls1": "encoder.layer.{}.lambda_1",
    "encoder.layers.{}.norm2": "encoder.layer.{}.layernorm_after",
    "encoder.layers.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
    "encoder.layers.{}.ls2": "encoder.layer.{}.lambda_2",
}

PUBLISHED_HEADS = {1024: 16, 3200: 25}  # by width, of InternViT-300M and -6B

# Field of InternVLVisionConfig -> what InternViT calls it, and its default there.
INTERNVIT_FIELDS = {
    "layer_norm_eps": ("layer_norm_eps", 1e-6), "hidden_act": ("hidden_act", "gelu"),
    "attention_dropout": ("attention_dropout", 0.0), "projection_dropout": ("dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02), "layer_scale_init_value": ("initializer_factor", 0.1),
}  # fmt: skip

# Pooling by the mean leaves out a final norm: an InternViT has none.
FIXED_FIELDS = {
    "hidden_dropout_prob": 0.0, "use_absolute_position_embeddings": True, "use_mask_token": False,
    "use_mean_pooling": True,
}  # fmt: skip

FRACTIONS = ("layer_norm_eps", "attention_dropout", "dropout", "initializer_range")

QK_NORM_EPS = 1e-6  # of InternVLVisionModel, whatever its configuration says


@dataclass(frozen=True)
class InternViTDimensions(Dimensions):
    """The dimensions of an InternViT; grid_size is the side of the square of position embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_channels: int
    patch_size: int
    grid_size: int
    qkv_bias: bool
    norm_bias: bool
    qk_norm: bool

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        width, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        block = {
            ("norm1", ".weight"): (width,), ("norm1", ".bias"): (width,) if self.norm_bias else None,
            ("attn.qkv", ".weight"): (3 * width, width), ("attn.qkv", ".bias"): (3 * width,) if self.qkv_bias else None,
            ("attn.q_norm", ".weight"): (width,) if self.qk_norm else None,
            ("attn.k_norm", ".weight"): (width,) if self.qk_norm else None,
            ("attn.proj", ".weight"): (width, width), ("attn.proj", ".bias"): (width,),
            ("ls1", ""): (width,),
            ("norm2", ".weight"): (width,), ("norm2", ".bias"): (width,) if self.norm_bias else None,
            ("mlp.fc1", ".weight"): (mlp, width), ("mlp.fc1", ".bias"): (mlp,),
            ("mlp.fc2", ".weight"): (width, mlp), ("mlp.fc2", ".bias"): (width,),
            ("ls2", ""): (width,),
        }  # fmt: skip
        return {
            ("embeddings.class_embedding", ""): (1, 1, width),
            ("embeddings.position_embedding", ""): (1, self.grid_size**2 + 1, width),
            ("embeddings.patch_embedding", ".weight"): (width, self.num_channels, patch, patch),
            ("embeddings.patch_embedding", ".bias"): (width,),
            **{(f"encoder.layers.{{}}.{part}", end): shape for (part, end), shape in block.items() if shape},
        }


ORIGINAL = NamingScheme("InternViT", "InternViT", {name: name for name in TRANSFORMERS})
CONVERTED = NamingScheme("InternVLVisionModel", "transformers' InternVLVisionModel", TRANSFORMERS)
ANCHORS = ("encoder.layers.{}.ls1", "encoder.layers.{}.ls2")
LARGEST = InternViTDimensions(1, 1, 1, 1, 1, 1, qkv_bias=True, norm_bias=True, qk_norm=True)
INTERNVIT = ModelFamily("InternViT", "vision", {ORIGINAL.name: ORIGINAL}, ANCHORS, LARGEST)
is_internvit = INTERNVIT.is_in


def _infer_dimensions(match: Match) -> InternViTDimensions:
    prefix, layer = match.prefix, "encoder.layers.{}."
    width, channels, patch = match.patch_shape("embeddings.patch_embedding.weight")
    positions = match.required_shape("embeddings.position_embedding", 3)[1] - 1
    if positions < 1 or isqrt(positions) ** 2 != positions:
        what = f"expected a class token and a square grid, got {positions} positions besides the class token"
        raise CheckpointError(f"{prefix}embeddings.position_embedding: {what}")
    return InternViTDimensions(
        hidden_size=width, num_channels=channels, patch_size=patch, grid_size=isqrt(positions),
        intermediate_size=match.common_rows(layer + "mlp.fc1") or 1,
        num_hidden_layers=match.count_blocks(layer + "norm1"),
        qkv_bias=match.has(".bias", layer + "attn.qkv"),
        norm_bias=match.has(".bias", layer + "norm1", layer + "norm2"),
        qk_norm=match.has(".weight", layer + "attn.q_norm", layer + "attn.k_norm"),
    )  # fmt: skip


def internvit_config(
    dimensions: InternViTDimensions, original: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """
    Return config.json of an InternVLVisionModel, and values of the original one that contradict the tensors, or are
    impossible or not supported.
    """
    side, patch, width = dimensions.grid_size * dimensions.patch_size, dimensions.patch_size, dimensions.hidden_size
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels")
    known = {key: getattr(dimensions, key) for key in shared}
    known["norm_type"] = "layer_norm" if dimensions.norm_bias else "rms_norm"
    config = {
        "architectures": [CONVERTED.name],
        "model_type": "internvl_vision",
        **known,
        "image_size": [side, side],
        "patch_size": [patch, patch],
        "attention_bias": dimensions.qkv_bias,
        "use_qk_norm": dimensions.qk_norm,
        "num_attention_heads": original.get("num_attention_heads", PUBLISHED_HEADS.get(width)),
        **{name: original.get(key, default) for name, (key, default) in INTERNVIT_FIELDS.items()},
        **FIXED_FIELDS,
    }
    known |= {"image_size": side, "patch_size": patch}
    known |= {"qkv_bias": dimensions.qkv_bias, "qk_normalization": dimensions.qk_norm}
    eps, is_fixed = config["layer_norm_eps"], dimensions.qk_norm
    expected = f"{QK_NORM_EPS}, which transformers' InternVLVisionModel uses with qk_normalization"
    problems = [
        *contradictions(known, original),
        *invalid_values(original, FRACTIONS),
        *head_problems(config["num_attention_heads"], width),
        *config_problems("layer_norm_eps", not is_fixed or eps == QK_NORM_EPS, expected, eps, "no other is supported"),
    ]
    return config, problems


def plan_internvit(checkpoint: Checkpoint, options: Options) -> InternVLPlan:
    """
    Return the conversion of an InternViT. Raises CheckpointError if there is no whole one, or config.json contradicts
    it or is not supported.
    """
    match, original = read_source(checkpoint, INTERNVIT, options.prefix)
    dimensions = _infer_dimensions(match)
    config, problems = internvit_config(dimensions, original)
    dtype = check_source(checkpoint, match, dimensions, problems, options)
    notes, rate = [*match_notes(match, "buffers"), *image_notes(checkpoint)], original.get("drop_path_rate")
    if rate:
        notes.append(f"drop_path_rate {rate}: not supported by InternVLVisionModel, matters for training only")
    return InternVLPlan(
        checkpoint=checkpoint, dtype=dtype, match=match, dimensions=dimensions, layout=CONVERTED, config=config,
        files={"preprocessor_config.json": clip_settings(checkpoint, config["image_size"])}, notes=notes,
    )  # fmt: skip
