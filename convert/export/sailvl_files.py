"""What stands beside the weights of a SAIL-VL or of its language model: configuration, tokenizer, processor, code."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.aimv2_config import FIELDS
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import first_line, read_json, write_json
from ..storage.tensors import torch_name
from .code_files import PACKAGE, is_old_template
from .image_settings import read_image_settings
from .tokenizer_files import copy_tokenizer


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")

# What the fields of a release are called in the image processor.
TILING = {
    "dynamic_image_size": "do_tile",
    "min_dynamic_patch": "min_tiles",
    "max_dynamic_patch": "max_tiles",
    "use_thumbnail": "use_thumbnail",
}

# The last lines of the usage of a SAIL-VL, for str.format.
ASK = """content = [{{"type": "image", "image": "picture.jpg"}}, {{"type": "text", "text": "Describe the image."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
written = model.generate(**inputs, max_new_tokens=256)
print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""

LOAD_ALL = (
    """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto").eval()
"""
    + ASK
)


def portable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    A part's configuration as it was written, which every release of transformers reads, without what is not the part's
    to say; what transformers >= 5 calls otherwise stands there under both names.
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
    """config.json of a tower that transformers has, or of a SAILViT, as part of another."""
    if config.model_type == "sailvit":
        said = {key: getattr(config, key) for key in FIELDS}
        return {"architectures": ["SAILViTModel"], "model_type": "sailvit", **said}
    return {**portable(fields), "model_type": config.model_type}


def write_config(
    folder: Path, config: "SAILVLConfig", text: Mapping[str, Any], vision: Mapping[str, Any], dtype: str
) -> None:
    """
    Args:
        text, vision: The fields of the parts, as they were written.
        dtype: Of the weights, a key of readers.ITEM_SIZES.
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


def sailvl_image_settings(checkpoint: Checkpoint, config: "SAILVLConfig") -> dict[str, Any]:
    """
    The options of the image processor: its own where the source has them, else those of the release's config.json.

    Raises:
        CheckpointError: The source says of its pictures what cannot be.
    """
    options, fields = read_json(PACKAGE / "preprocessor_config.json").keys(), checkpoint.document("config.json")
    settings = {key: value for key, value in read_image_settings(checkpoint).items() if key in options}
    if fields.get("pad2square"):
        what = (
            "config.json: pad2square pads pictures to a square, which nothing here does: set it to false if none were"
        )
        raise CheckpointError(f"{checkpoint.source.name}: {what}")
    if "max_tiles" not in checkpoint.document("preprocessor_config.json"):
        settings |= {option: fields[field] for field, option in TILING.items() if fields.get(field) is not None}
    (rows, columns), (height, width) = config.grid_size, config.patch_size
    return {**settings, "size": {"height": rows * height, "width": columns * width}}


def build_processor(checkpoint: Checkpoint, config: "SAILVLConfig", **settings: Any) -> "SAILVLProcessor":
    """
    Args:
        checkpoint: With a tokenizer that has the tokens of an image.
        settings: Options of the image processor that go before the source's.

    Raises:
        CheckpointError: The tokenizer does not load, or an option is out of its range.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:  # without the source's config.json, and so without its code
        copy_tokenizer(checkpoint, Path(scratch))
        try:
            tokenizer = AutoTokenizer.from_pretrained(scratch)
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.source.name}: the tokenizer does not load: {first_line(error)}"
            ) from error
    options = {**sailvl_image_settings(checkpoint, config), **settings}
    return new_processor(tokenizer, config, options, _own_template(checkpoint), checkpoint.source.name)


def new_processor(
    tokenizer: Any, config: "SAILVLConfig", options: Mapping[str, Any], template: str | None, where: str
) -> "SAILVLProcessor":
    from ...image_processing_sailvit import SAILViTImageProcessor
    from ...processing_sailvl import SAILVLProcessor

    tokens = dict(zip(("image_start_token", "image_token", "image_end_token"), config.special_tokens, strict=True))
    try:
        pictures = SAILViTImageProcessor(**options)
        return SAILVLProcessor(
            pictures, tokenizer, image_seq_length=config.image_seq_length, chat_template=template, **tokens
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from error


def _own_template(checkpoint: Checkpoint) -> str | None:
    """The prompt of a folder that has a processor of ours; a release has its tokenizer's at most, without images."""
    is_ours = checkpoint.document("processor_config.json").get("processor_class") == "SAILVLProcessor"
    if not is_ours or "chat_template.jinja" not in checkpoint.source.files:
        return None
    template = checkpoint.source.path("chat_template.jinja").read_text(encoding="utf-8")
    return None if is_old_template(template) else template


def write_processor(processor: "SAILVLProcessor", folder: Path) -> None:
    """Its own files, without the tokenizer's."""
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        for file in PROCESSOR_FILES:
            shutil.copyfile(Path(scratch) / file, folder / file)
    processor.image_processor.to_json_file(
        folder / "preprocessor_config.json"
    )  # beside config.json, which names the class
