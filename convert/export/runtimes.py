"""The files that each runtime of an AIMv2 encoder expects next to the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import read_json, write_json
from ..storage.tensors import torch_name
from .code_files import PACKAGE, copy_code
from .image_settings import clip_settings, normalization, read_image_settings


# SAILViTConfig's SIZES by their widths; importing those would import torch.
SIZE_NAMES = {768: "base", 1024: "large", 1536: "huge", 2048: "1b", 3072: "3b"}

# Fields of SAILViTConfig that describe an encoder, besides its task.
ENCODER_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "rms_norm_eps", "attention_dropout", "projection_dropout", "qkv_bias", "use_bias", "hidden_act",
    "initializer_range", "pos_embed_type", "pixel_shuffle_factor",
)  # fmt: skip

# Those that transformers' Aimv2VisionConfig does not have.
OTHER_FIELDS = ("projection_dropout", "use_bias", "pos_embed_type", "pixel_shuffle_factor")

# Argument of timm's model -> field of SAILViTConfig.
TIMM_ARGUMENTS = {
    "img_size": "image_size", "patch_size": "patch_size", "in_chans": "num_channels", "embed_dim": "hidden_size",
    "depth": "num_hidden_layers", "num_heads": "num_attention_heads", "qkv_bias": "qkv_bias", "proj_bias": "use_bias",
}  # fmt: skip

# "pretrained_cfg" in timm's config.json, besides the images' size and normalization.
TIMM_PRETRAINED = {
    "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash", "num_classes": 0,
    "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """What loads the weights under one naming scheme without this package. Fields are those of SAILViTConfig."""

    title: str
    # Write config.json and what goes with it into a folder, from the source, the fields and the dtype of the weights.
    write_configs: Callable[[Path, Checkpoint, Mapping[str, Any], str], None]
    # Return why an encoder with these fields cannot be expressed in it; None if it can.
    unsupported_reason: Callable[[Mapping[str, Any]], str | None] = lambda fields: None
    reads_shards: bool = True  # whether the weights may be in several files


def check_expressible(checkpoint: Checkpoint, scheme: str, fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a naming scheme's runtime cannot express an encoder, or image settings are invalid."""
    runtime = RUNTIMES.get(scheme)
    if runtime and (reason := runtime.unsupported_reason(fields)):
        raise CheckpointError(f"{checkpoint.source.name}: {runtime.title} {reason}")
    read_image_settings(checkpoint)


def _write_sailvit(folder: Path, checkpoint: Checkpoint, fields: Mapping[str, Any], dtype: str) -> None:
    config, processor = read_json(PACKAGE / "config.json"), read_json(PACKAGE / "preprocessor_config.json")
    config |= {key: value for key, value in fields.items() if key in config}
    processor |= {key: value for key, value in read_image_settings(checkpoint).items() if key in processor}
    size = {"height": fields["image_size"], "width": fields["image_size"]}
    write_json(folder / "config.json", {**config, "dtype": torch_name(dtype)})
    write_json(folder / "preprocessor_config.json", {**processor, "size": size})
    copy_code(folder, "sailvit")


def _write_transformers(folder: Path, checkpoint: Checkpoint, fields: Mapping[str, Any], dtype: str) -> None:
    write_json(folder / "config.json", {**transformers_config(fields), "dtype": torch_name(dtype)})
    write_json(folder / "preprocessor_config.json", clip_settings(checkpoint, fields["image_size"]))


def transformers_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of transformers' Aimv2VisionModel, from fields of SAILViTConfig."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        **{key: fields[key] for key in ENCODER_FIELDS if key in fields and key not in OTHER_FIELDS},
        "mlp_bias": fields["use_bias"],
        "is_native": fields["pos_embed_type"] == "sincos",
        "use_head": False,
    }


def _transformers_unsupported(fields: Mapping[str, Any]) -> str | None:
    return None if fields["qkv_bias"] == fields["use_bias"] else "has biases in all of attention or in none of it"


def _write_timm(folder: Path, checkpoint: Checkpoint, fields: Mapping[str, Any], dtype: str) -> None:
    mean, std = normalization(read_image_settings(checkpoint))
    size = [fields["num_channels"], fields["image_size"], fields["image_size"]]
    pretrained = {"input_size": size, **TIMM_PRETRAINED, "mean": mean, "std": std}
    write_json(folder / "config.json", {**timm_config(fields), "pretrained_cfg": pretrained})


def timm_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture for timm.create_model and its arguments, from fields of SAILViTConfig."""
    width, size = fields["hidden_size"], fields["image_size"]
    name = SIZE_NAMES.get(width, "large").replace("base", "large")  # timm has no base
    arguments = {argument: fields[field] for argument, field in TIMM_ARGUMENTS.items()}
    arguments["mlp_ratio"] = (fields["intermediate_size"] + 0.25) / width  # timm rounds the product down
    return {
        "architecture": f"aimv2_{name}_patch14_{size if size in (224, 336, 448) else 448}",
        "num_classes": 0,
        "num_features": width,
        "global_pool": "avg",
        "model_args": arguments,
    }


def _timm_unsupported(fields: Mapping[str, Any]) -> str | None:
    if fields.get("rms_norm_eps", 1e-5) != 1e-5 or fields.get("hidden_act", "silu") != "silu":
        return "has rms_norm_eps 1e-5 and silu in aimv2, whatever config.json says"
    return None


RUNTIMES = {
    "sailvit": Runtime("SAILViT, with remote code", _write_sailvit),
    "transformers": Runtime("transformers' Aimv2VisionModel", _write_transformers, _transformers_unsupported),
    "timm": Runtime("timm", _write_timm, _timm_unsupported, reads_shards=False),
}
