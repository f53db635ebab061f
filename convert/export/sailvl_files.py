"""The files next to the weights of a SAIL-VL: config.json and the processor."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import first_line, read_json, write_json
from ..storage.tensors import torch_name
from .code_files import PACKAGE, copy_code, is_old_template
from .image_settings import read_image_settings
from .runtimes import ENCODER_FIELDS
from .tokenizer_files import load_tokenizer


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")

# Field of a release's config.json -> option of the image processor.
TILING = {
    "dynamic_image_size": "do_tile",
    "min_dynamic_patch": "min_tiles",
    "max_dynamic_patch": "max_tiles",
    "use_thumbnail": "use_thumbnail",
}


def portable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a component's config without what belongs to the whole model, as every release of transformers reads it:
    what transformers >= 5 renamed is there under both names.
    """
    from ...configuration_sailvl import GENERATION_FIELDS, NON_MODEL_KEYS

    kept = {key: value for key, value in fields.items() if key not in NON_MODEL_KEYS | GENERATION_FIELDS}
    rope = kept.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        kept.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kept.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return kept


def tower_config(config: "PretrainedConfig", fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a SAILViT, or of an encoder of transformers, as a component."""
    if config.model_type == "sailvit":
        encoder = {key: getattr(config, key) for key in ENCODER_FIELDS}
        return {"architectures": ["SAILViTModel"], "model_type": "sailvit", **encoder}
    return {**portable(fields), "model_type": config.model_type}


def write_sailvl_files(
    folder: Path,
    config: "SAILVLConfig",
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    dtype: str,
    processor: "SAILVLProcessor",
) -> None:
    """
    Write config.json, the code, and PROCESSOR_FILES; not the tokenizer.

    Args:
        text, vision: The configs of the components as the source has them.
        dtype: Of the weights, a key of tensors.ITEM_SIZES.
    """
    config.architectures = ["SAILVLForConditionalGeneration"]
    content = json.loads(config.to_json_string())
    content.pop("_name_or_path", None)
    content |= {
        "dtype": torch_name(dtype),
        "text_config": {**portable(text), "model_type": config.text_config.model_type},
        "vision_config": tower_config(config.vision_config, vision),
    }
    write_json(folder / "config.json", content)
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        for file in PROCESSOR_FILES:
            shutil.copyfile(Path(scratch) / file, folder / file)
    # Again, without the class, which config.json names.
    processor.image_processor.to_json_file(folder / "preprocessor_config.json")
    copy_code(folder)


def sailvl_image_settings(checkpoint: Checkpoint, config: "SAILVLConfig") -> dict[str, Any]:
    """
    Return options of the image processor: its own where the source has them, else those of the release's config.json.

    Raises:
        CheckpointError: The source's settings are invalid, or not supported.
    """
    options, fields = read_json(PACKAGE / "preprocessor_config.json").keys(), checkpoint.document("config.json")
    settings = {key: value for key, value in read_image_settings(checkpoint).items() if key in options}
    if fields.get("pad2square"):
        fix = "images are not padded to a square here: set it to false if none were in training"
        raise CheckpointError(f"{checkpoint.source.name}: config.json: pad2square is not supported: {fix}")
    if "max_tiles" not in checkpoint.document("preprocessor_config.json"):
        settings |= {option: fields[field] for field, option in TILING.items() if fields.get(field) is not None}
    (rows, columns), (height, width) = config.grid_size, config.patch_size
    return {**settings, "size": {"height": rows * height, "width": columns * width}}


def build_processor(checkpoint: Checkpoint, config: "SAILVLConfig") -> "SAILVLProcessor":
    """
    Args:
        checkpoint: With a tokenizer that has the tokens of an image.

    Raises:
        CheckpointError: The tokenizer does not load, or an option of the image processor is out of its range.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
    options, template = sailvl_image_settings(checkpoint, config), _own_template(checkpoint)
    return new_processor(tokenizer, config, options, template, checkpoint.source.name)


def new_processor(
    tokenizer: Any, config: "SAILVLConfig", options: Mapping[str, Any], template: str | None, where: str
) -> "SAILVLProcessor":
    from ...image_processing_sailvit import SAILViTImageProcessor
    from ...processing_sailvl import SAILVLProcessor

    tokens = dict(zip(("image_start_token", "image_token", "image_end_token"), config.special_tokens, strict=True))
    tokens |= {"image_seq_length": config.image_seq_length, "chat_template": template}
    try:
        return SAILVLProcessor(SAILViTImageProcessor(**options), tokenizer, **tokens)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from error


def _own_template(checkpoint: Checkpoint) -> str | None:
    """Return the chat template of a folder with a SAILVLProcessor; a release has at most its tokenizer's, for text."""
    is_ours = checkpoint.document("processor_config.json").get("processor_class") == "SAILVLProcessor"
    if not is_ours or "chat_template.jinja" not in checkpoint.source.files:
        return None
    template = checkpoint.source.path("chat_template.jinja").read_text(encoding="utf-8")
    return None if is_old_template(template) else template
