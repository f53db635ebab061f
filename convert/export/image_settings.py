"""The source's image settings, and preprocessor_config.json for CLIP image processors."""

from collections.abc import Mapping
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import read_json
from .code_files import PACKAGE


def clip_settings(checkpoint: Checkpoint, image_size: int | list[int]) -> dict[str, Any]:
    """Return preprocessor_config.json of transformers' CLIPImageProcessor, which resizes images to a square."""
    settings = read_image_settings(checkpoint)
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_center_crop": False,
        **{key: settings[key] for key in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")},
    }


def has_normalization(checkpoint: Checkpoint) -> bool:
    """Return whether the source has a mean for its images."""
    return "image_mean" in _stored_image_settings(checkpoint)


def center_crops(checkpoint: Checkpoint) -> bool:
    """Return whether the source crops images to a square, where SAILViT resizes them to one."""
    crop_mode = _section(checkpoint, "config.json", "pretrained_cfg").get("crop_mode")
    return bool(_stored_image_settings(checkpoint).get("do_center_crop")) or crop_mode in ("center", "border")


def read_image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Return the source's image settings, completed by SAILViT's; image_mean and image_std at least.

    Raises:
        CheckpointError: A value is invalid.
    """
    stored, name = _stored_image_settings(checkpoint), checkpoint.source.name
    has_any = bool(stored.keys() & {"image_mean", "image_std"})
    for key, lowest, expected in (("image_mean", -1e9, "numbers"), ("image_std", 1e-9, "positive numbers")):
        value = stored.get(key)
        numbers = value if isinstance(value, list) else []
        is_valid = numbers and all(type(number) in (int, float) and lowest < number < 1e9 for number in numbers)
        if has_any and not is_valid:
            raise CheckpointError(f"{name}: {key}: expected a list of {expected}, got {value!r}: correct it")
    factor = stored.get("rescale_factor", 1)
    if type(factor) not in (int, float) or not 0 < factor < 1e9:
        raise CheckpointError(f"{name}: rescale_factor: expected a positive number, got {factor!r}: correct it")
    return {**read_json(PACKAGE / "preprocessor_config.json"), **stored}


def _stored_image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of preprocessor_config.json, or processor_config.json as of transformers 5, or config.json of timm."""
    settings = checkpoint.document("preprocessor_config.json")
    settings = settings or _section(checkpoint, "processor_config.json", "image_processor")
    timm = _section(checkpoint, "config.json", "pretrained_cfg")
    return {"image_mean": timm["mean"], "image_std": timm.get("std")} if not settings and "mean" in timm else settings


def _section(checkpoint: Checkpoint, file: str, key: str) -> dict[str, Any]:
    section = checkpoint.document(file).get(key) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{checkpoint.source.name}: {key} in {file}: expected an object, got {section!r}")
    return section


def normalization(settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and std for a runtime that divides by 255 first, whatever the source divides by."""
    scale = 255 * (settings["rescale_factor"] if settings.get("do_rescale", True) else 1)
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1 / scale] * 3
    return [mean / scale for mean in settings["image_mean"]], [std / scale for std in settings["image_std"]]
