"""TODO convert/export/image_settings.py."""

from collections.abc import Mapping
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import read_json
from .code_files import PACKAGE


def clip_settings(checkpoint: Checkpoint, image_size: int | list[int]) -> dict[str, Any]:
    """preprocessor_config.json of transformers' CLIPImageProcessor, that resizes pictures to a square."""
    pictures = read_image_settings(checkpoint)
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


def has_normalization(checkpoint: Checkpoint) -> bool:
    """Whether the source says how its pictures are normalised."""
    return "image_mean" in _stored_image_settings(checkpoint)


def center_crops(checkpoint: Checkpoint) -> bool:
    """Whether the source cuts pictures to a square, where SAILViT resizes them to one."""
    crop_mode = _section(checkpoint, "config.json", "pretrained_cfg").get("crop_mode")
    return bool(_stored_image_settings(checkpoint).get("do_center_crop")) or crop_mode in ("center", "border")


def read_image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    What the source says of its pictures: image_mean and image_std at least; SAILViT's where it says nothing.

    Raises:
        CheckpointError: It says what cannot be.
    """
    said = _stored_image_settings(checkpoint)
    for key in {"image_mean", "image_std"} if said.keys() & {"image_mean", "image_std"} else ():
        value, lowest = said.get(key), -1e9 if key == "image_mean" else 1e-9
        numbers = isinstance(value, list) and len(value) > 0 and all(type(number) in (int, float) for number in value)
        if not numbers or not all(lowest < number < 1e9 for number in value):
            raise CheckpointError(f"{checkpoint.source.name}: {key} of its pictures is {value!r}: correct it")
    factor = said.get("rescale_factor", 1)
    if type(factor) not in (int, float) or not 0 < factor < 1e9:
        raise CheckpointError(f"{checkpoint.source.name}: rescale_factor of its pictures is {factor!r}: correct it")
    return {**read_json(PACKAGE / "preprocessor_config.json"), **said}


def _stored_image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
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
