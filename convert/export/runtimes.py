"""What stands beside the weights: the configuration each runtime expects, code, a card, and where it all came from."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.errors import CheckpointError
from ..storage.files import read_json, write_json
from ..storage.output_folder import final_name
from ..storage.tensors import torch_name
from .code_files import CODE, PACKAGE
from .converted_card import save_card
from .image_settings import _normalisation, clip_settings, read_image_settings


if TYPE_CHECKING:
    from ..models.aimv2 import AIMv2Plan

    pass

# SAILViTConfig's SIZES by their widths; importing those would import torch.
SIZE_NAMES = {768: "base", 1024: "large", 1536: "huge", 2048: "1b", 3072: "3b"}


@dataclass(frozen=True)
class Runtime:
    """
    What loads a layout by itself.

    Attributes:
        title: What to call it.
        reads_shards: Whether it takes weights in several files.
        usage: Python that loads the folder {name}.
        write_configs: Writes what it expects beside the weights.
        unsupported_reason: Why a tower cannot be expressed in it, from the fields of SAILViTConfig; None if it can.
    """

    title: str
    reads_shards: bool
    usage: str
    write_configs: Callable[[Path, "AIMv2Plan"], None]
    unsupported_reason: Callable[[Mapping[str, Any]], str | None] = lambda fields: None


def check_expressible(job: "AIMv2Plan") -> None:
    """
    Raises:
        CheckpointError: The tower has what the runtime cannot express, or its pictures are what none can.
    """
    runtime = RUNTIMES.get(job.layout.name)
    unsupported_reason = runtime.unsupported_reason(job.fields) if runtime else None
    if unsupported_reason:
        raise CheckpointError(f"{job.checkpoint.source.name}: {runtime.title} {unsupported_reason}")
    read_image_settings(job.checkpoint)


def write_folder(folder: Path, job: "AIMv2Plan") -> None:
    """Writes all but the weights and the provenance; a layout without a runtime of its own gets the card alone."""
    runtime = RUNTIMES.get(job.layout.name)
    if runtime:
        runtime.write_configs(folder, job)
    _write_card(folder, job, runtime)


def _write_sailvit(folder: Path, job: "AIMv2Plan") -> None:
    config = read_json(PACKAGE / "config.json")
    config |= {key: value for key, value in job.fields.items() if key in config}
    write_json(folder / "config.json", {**config, "dtype": torch_name(job.dtype)})
    size = {"height": job.fields["image_size"], "width": job.fields["image_size"]}
    processor = read_json(PACKAGE / "preprocessor_config.json")
    processor |= {key: value for key, value in read_image_settings(job.checkpoint).items() if key in processor}
    write_json(folder / "preprocessor_config.json", {**processor, "size": size})
    for file in CODE:
        shutil.copyfile(PACKAGE / file, folder / file)


def _write_transformers(folder: Path, job: "AIMv2Plan") -> None:
    write_json(folder / "config.json", {**transformers_config(job.fields), "dtype": torch_name(job.dtype)})
    write_json(folder / "preprocessor_config.json", clip_settings(job.checkpoint, job.fields["image_size"]))


def transformers_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SAILViTConfig -> those of transformers' Aimv2VisionConfig."""
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "rms_norm_eps", "attention_dropout", "hidden_act", "initializer_range", "qkv_bias",
    )  # fmt: skip
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        **{key: fields[key] for key in kept if key in fields},
        "mlp_bias": fields["use_bias"],
        "is_native": fields["pos_embed_type"] == "sincos",
        "use_head": False,
    }


def _write_timm(folder: Path, job: "AIMv2Plan") -> None:
    mean, std = _normalisation(read_image_settings(job.checkpoint))
    size, channels = job.fields["image_size"], job.fields["num_channels"]
    pretrained = {
        "input_size": [channels, size, size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": mean,
        "std": std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    write_json(folder / "config.json", {**timm_config(job.fields), "pretrained_cfg": pretrained})


def timm_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SAILViTConfig -> the architecture that timm.create_model is given, and its arguments."""
    width, size = fields["hidden_size"], fields["image_size"]
    name = SIZE_NAMES.get(width, "large").replace("base", "large")  # timm has no base
    return {
        "architecture": f"aimv2_{name}_patch14_{size if size in (224, 336, 448) else 448}",
        "num_classes": 0,
        "num_features": width,
        "global_pool": "avg",
        "model_args": {
            "img_size": size,
            "patch_size": fields["patch_size"],
            "in_chans": fields["num_channels"],
            "embed_dim": width,
            "depth": fields["num_hidden_layers"],
            "num_heads": fields["num_attention_heads"],
            "mlp_ratio": (fields["intermediate_size"] + 0.25) / width,  # timm rounds the product down
            "qkv_bias": fields["qkv_bias"],
            "proj_bias": fields["use_bias"],
        },
    }


def _transformers_unsupported(fields: Mapping[str, Any]) -> str | None:
    return None if fields["qkv_bias"] == fields["use_bias"] else "has biases in all of attention or in none of it"


def _timm_unsupported(fields: Mapping[str, Any]) -> str | None:
    if fields.get("rms_norm_eps", 1e-5) != 1e-5 or fields.get("hidden_act", "silu") != "silu":
        return "has rms_norm_eps 1e-5 and silu in aimv2, whatever config.json says"
    return None


LOAD_SAILVIT = """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()"""

LOAD_TRANSFORMERS = """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()"""

LOAD_LANGUAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto").eval()"""

LOAD_TIMM = """import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""

RUNTIMES = {
    "sailvit": Runtime("SAILViT, with remote code", True, LOAD_SAILVIT, _write_sailvit),
    "transformers": Runtime(
        "transformers' Aimv2VisionModel", True, LOAD_TRANSFORMERS, _write_transformers, _transformers_unsupported
    ),
    "timm": Runtime("timm", False, LOAD_TIMM, _write_timm, _timm_unsupported),
}


def _write_card(folder: Path, job: "AIMv2Plan", runtime: Runtime | None) -> None:
    size = SIZE_NAMES.get(job.fields["hidden_size"], f"width {job.fields['hidden_size']}")
    lines = [
        f"A vision tower, {size}, {job.fields['num_hidden_layers']} blocks, {job.fields['image_size']} pixels, "
        f"{torch_name(job.dtype)}, in the layout of {job.layout.title}.",
        "",
    ]
    if runtime:
        lines += ["```python", runtime.usage.format(name=final_name(folder)), "```"]
    else:
        lines += [f"These are tensors for a larger model, under `{job.layout.prefix}`: nothing loads them alone."]
    save_card(
        folder,
        job.checkpoint,
        lines,
        library_name="timm" if job.layout.name == "timm" else "transformers",
        pipeline_tag="image-feature-extraction",
        tags=["vision", "aimv2", *(["sailvit", "custom_code"] if job.layout.name == "sailvit" else [])],
    )
