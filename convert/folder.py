"""What stands beside the weights: the configuration each runtime expects, code, a card, and where it all came from."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .problems import CheckpointError
from .readers import PROVENANCE, Checkpoint, hash_file, read_json
from .sources import licence_of, plain_name
from .tower import SIZE_NAMES
from .trained import training_facts
from .values import torch_name
from .writer import write_json


if TYPE_CHECKING:
    from .aimv2 import TowerJob
    from .job import Job

PACKAGE = Path(__file__).parents[1]
CODE = ("configuration_sailvit.py", "modeling_sailvit.py", "image_processing_sailvit.py")
CODE_OF_ALL = (
    *CODE, "configuration_sailvl.py", "modeling_sailvl.py", "processing_sailvl.py", "video_sailvl.py",
    "chat_sailvl.py",
)  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """
    What loads a layout by itself.

    Attributes:
        title: What to call it.
        reads_shards: Whether it takes weights in several files.
        usage: Python that loads the folder {name}.
        write_configs: Writes what it expects beside the weights.
        objection: Why a tower cannot be expressed in it, from the fields of SAILViTConfig; None if it can.
    """

    title: str
    reads_shards: bool
    usage: str
    write_configs: Callable[[Path, "TowerJob"], None]
    objection: Callable[[Mapping[str, Any]], str | None] = lambda fields: None


def check_expressible(job: "TowerJob") -> None:
    """
    Raises:
        CheckpointError: The tower has what the runtime cannot express, or its pictures are what none can.
    """
    runtime = RUNTIMES.get(job.layout.name)
    objection = runtime.objection(job.fields) if runtime else None
    if objection:
        raise CheckpointError(f"{job.checkpoint.source.name}: {runtime.title} {objection}")
    read_pictures(job.checkpoint)


def write_folder(folder: Path, job: "TowerJob") -> None:
    """Writes all but the weights and the provenance; a layout without a runtime of its own gets the card alone."""
    runtime = RUNTIMES.get(job.layout.name)
    if runtime:
        runtime.write_configs(folder, job)
    _write_card(folder, job, runtime)


def _write_sailvit(folder: Path, job: "TowerJob") -> None:
    config = read_json(PACKAGE / "config.json")
    config |= {key: value for key, value in job.fields.items() if key in config}
    write_json(folder / "config.json", {**config, "dtype": torch_name(job.dtype)})
    size = {"height": job.fields["image_size"], "width": job.fields["image_size"]}
    processor = read_json(PACKAGE / "preprocessor_config.json")
    processor |= {key: value for key, value in read_pictures(job.checkpoint).items() if key in processor}
    write_json(folder / "preprocessor_config.json", {**processor, "size": size})
    for file in CODE:
        shutil.copyfile(PACKAGE / file, folder / file)


def _write_transformers(folder: Path, job: "TowerJob") -> None:
    write_json(folder / "config.json", {**transformers_config(job.fields), "dtype": torch_name(job.dtype)})
    write_json(folder / "preprocessor_config.json", clip_settings(job.checkpoint, job.fields["image_size"]))


def clip_settings(checkpoint: Checkpoint, image_size: int | list[int]) -> dict[str, Any]:
    """preprocessor_config.json of transformers' CLIPImageProcessor, that resizes pictures to a square."""
    pictures = read_pictures(checkpoint)
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_center_crop": False,
        **{key: pictures[key] for key in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")},
    }


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


def _write_timm(folder: Path, job: "TowerJob") -> None:
    mean, std = _normalisation(read_pictures(job.checkpoint))
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


def _transformers_objection(fields: Mapping[str, Any]) -> str | None:
    return None if fields["qkv_bias"] == fields["use_bias"] else "has biases in all of attention or in none of it"


def _timm_objection(fields: Mapping[str, Any]) -> str | None:
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
        "transformers' Aimv2VisionModel", True, LOAD_TRANSFORMERS, _write_transformers, _transformers_objection
    ),
    "timm": Runtime("timm", False, LOAD_TIMM, _write_timm, _timm_objection),
}


def says_pictures(checkpoint: Checkpoint) -> bool:
    """Whether the source says how its pictures are normalised."""
    return "image_mean" in _said_of_pictures(checkpoint)


def crops_pictures(checkpoint: Checkpoint) -> bool:
    """Whether the source cuts pictures to a square, where SAILViT resizes them to one."""
    crop_mode = _section(checkpoint, "config.json", "pretrained_cfg").get("crop_mode")
    return bool(_said_of_pictures(checkpoint).get("do_center_crop")) or crop_mode in ("center", "border")


def read_pictures(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    What the source says of its pictures: image_mean and image_std at least; SAILViT's where it says nothing.

    Raises:
        CheckpointError: It says what cannot be.
    """
    said = _said_of_pictures(checkpoint)
    for key in {"image_mean", "image_std"} if said.keys() & {"image_mean", "image_std"} else ():
        value, lowest = said.get(key), -1e9 if key == "image_mean" else 1e-9
        numbers = isinstance(value, list) and len(value) > 0 and all(type(number) in (int, float) for number in value)
        if not numbers or not all(lowest < number < 1e9 for number in value):
            raise CheckpointError(f"{checkpoint.source.name}: {key} of its pictures is {value!r}: correct it")
    factor = said.get("rescale_factor", 1)
    if type(factor) not in (int, float) or not 0 < factor < 1e9:
        raise CheckpointError(f"{checkpoint.source.name}: rescale_factor of its pictures is {factor!r}: correct it")
    return {**read_json(PACKAGE / "preprocessor_config.json"), **said}


def _said_of_pictures(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of preprocessor_config.json, or processor_config.json, where transformers >= 5 puts it, or timm's config.json."""
    said = checkpoint.document("preprocessor_config.json")
    said = said or _section(checkpoint, "processor_config.json", "image_processor")
    timms = _section(checkpoint, "config.json", "pretrained_cfg")
    if not said and "mean" in timms:
        return {"image_mean": timms["mean"], "image_std": timms.get("std")}
    return said


def _section(checkpoint: Checkpoint, file: str, key: str) -> dict[str, Any]:
    section = checkpoint.document(file).get(key) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{checkpoint.source.name}: {key} in {file} is {section!r}, not a map")
    return section


def _normalisation(pictures: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and std for a runtime that divides by 255 first, whatever the source divides by."""
    scale = 255 * (pictures["rescale_factor"] if pictures.get("do_rescale", True) else 1)
    if not pictures.get("do_normalize", True):
        return [0.0] * 3, [1 / scale] * 3
    return [mean / scale for mean in pictures["image_mean"]], [std / scale for std in pictures["image_std"]]


def _write_card(folder: Path, job: "TowerJob", runtime: Runtime | None) -> None:
    size = SIZE_NAMES.get(job.fields["hidden_size"], f"width {job.fields['hidden_size']}")
    lines = [
        f"A vision tower, {size}, {job.fields['num_hidden_layers']} blocks, {job.fields['image_size']} pixels, "
        f"{torch_name(job.dtype)}, in the layout of {job.layout.title}.",
        "",
    ]
    if runtime:
        lines += ["```python", runtime.usage.format(name=name_of(folder)), "```"]
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


def name_of(folder: Path) -> str:
    """What a folder will be called once it is in its place."""
    return folder.name.removeprefix(".").removesuffix(".part")


def save_card(folder: Path, checkpoint: Checkpoint, lines: list[str], **data: Any) -> None:
    """
    Writes README.md of what was converted.

    Args:
        lines: Of its text, between the title and where it came from.
        data: What the Hub is told, besides the licence and the name of the source.
    """
    source = checkpoint.source
    record = f"`{PROVENANCE}` says how, with the hashes of what was read and written."
    origin = source.name if source.revision else None
    lines = [*lines, "", f"Converted from {plain_name(source)}; {record}"]
    write_card(folder, lines, base_model=origin, **data, **licence_of(source))


def write_card(folder: Path, lines: list[str], **data: Any) -> None:
    """README.md: what the Hub is told, a title, and text."""
    from huggingface_hub import ModelCard, ModelCardData

    text = ["---", ModelCardData(**data).to_yaml(), "---", f"# {name_of(folder)}", "", *lines]
    ModelCard("\n".join(text) + "\n").save(folder / "README.md")


def write_provenance(
    folder: Path,
    job: "Job",
    asked: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
) -> None:
    """
    Args:
        asked: The options of the conversion.
        files: Name -> sha256 and bytes of every file that was read.
        digests: Name -> sha256 of every tensor that was written.
    """
    source, record = job.checkpoint.source, job.record()
    before, training = job.checkpoint.document(PROVENANCE).get("source"), training_facts(job.checkpoint)
    said = {
        "name": plain_name(source),
        "revision": source.revision,
        **record.pop("source", {}),
        **licence_of(source),
        "files": files,
        **({"source": before} if before else {}),
    }
    kept = {name: {"sha256": files[original]["sha256"]} for name, original in record.pop("kept", {}).items()}
    content = {
        "source": said,
        **({"training": training} if training else {}),
        "options": asked,
        "dtype": torch_name(job.dtype),
        **record,
        "verification": job.verification,
    }
    save_record(folder, content, kept, digests)


def save_record(folder: Path, content: Mapping[str, Any], kept: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """
    Writes provenance.json: what is given, versions, and the hashes of what lies in the folder.

    Args:
        kept: Name -> {"sha256": ...} of files whose hashes are known.
        digests: Name -> sha256 of every tensor that was written.
    """
    others = [path for path in sorted(folder.glob("*")) if _is_recorded(path)]
    provenance = {
        **content,
        "versions": {"python": platform.python_version(), **versions()},
        "files": {**{path.name: {"sha256": hash_file(path)} for path in others}, **kept},
        "tensors": {name: {"sha256": digest} for name, digest in digests.items()},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def _is_recorded(path: Path) -> bool:
    return path.suffix in (".py", ".json", ".jinja", ".txt", ".model") and path.name != PROVENANCE


def versions() -> dict[str, str]:
    """Of the packages that what is written depends on."""
    found = {}
    for package in ("sailvit", "torch", "transformers", "timm", "huggingface_hub", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
