"""The files next to the weights of a SAIL-VL: config.json, the code, the processor and the model card."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError
from ..storage.files import first_line, read_json, write_json
from ..storage.sources import Source
from ..storage.tensors import torch_name
from .card import write_conversion_card
from .code_files import PACKAGE, copy_code, is_old_template
from .image_settings import read_image_settings
from .runtimes import ENCODER_FIELDS


if TYPE_CHECKING:
    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor

Fields = Mapping[str, Any]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")

# Field of a release's config.json -> option of the image processor.
TILING = {
    "dynamic_image_size": "do_tile", "min_dynamic_patch": "min_tiles", "max_dynamic_patch": "max_tiles",
    "use_thumbnail": "use_thumbnail",
}  # fmt: skip


def portable(fields: Fields) -> dict[str, Any]:
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


CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError)  # of transformers' classes, for a configuration


@contextmanager
def transformers_errors(
    message: str, kinds: tuple[type[Exception], ...] = CONFIG_ERRORS, fix: str = ""
) -> Iterator[None]:
    """Turn an exception of these kinds into a CheckpointError in one line; others are bugs of this package."""
    try:
        yield
    except kinds as error:
        raise CheckpointError(f"{message}: {first_line(error)}{fix}") from error


def write_sailvl_files(
    folder: Path, config: "SAILVLConfig", text: Fields, vision: Fields, dtype: str, processor: "SAILVLProcessor"
) -> None:
    """
    Write config.json, the code and PROCESSOR_FILES; not the tokenizer.

    Args:
        text, vision: The configs of the components as the source has them.
        dtype: Of the weights, a key of tensors.ITEM_SIZES.
    """
    config.architectures = ["SAILVLForConditionalGeneration"]
    encoder = config.vision_config
    fields = {**portable(vision), "model_type": encoder.model_type}
    if encoder.model_type == "sailvit":
        own = {key: getattr(encoder, key) for key in ENCODER_FIELDS}
        fields = {"architectures": ["SAILViTModel"], "model_type": "sailvit", **own}
    content = json.loads(config.to_json_string())
    content.pop("_name_or_path", None)
    content |= {
        "dtype": torch_name(dtype),
        "text_config": {**portable(text), "model_type": config.text_config.model_type},
        "vision_config": fields,
    }
    write_json(folder / "config.json", content)
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        for file in PROCESSOR_FILES:
            shutil.copyfile(Path(scratch) / file, folder / file)
    # Again, without the class, which config.json names.
    processor.image_processor.to_json_file(folder / "preprocessor_config.json")
    copy_code(folder)


def write_sailvl_card(
    folder: Path, sources: Sequence[Source], config: "SAILVLConfig", dtype: str, details: str = ""
) -> None:
    """Write README.md; details: more paragraphs."""
    vision, text = config.vision_config, config.text_config
    description = (
        f"A multimodal language model, {torch_name(dtype)}: a vision encoder ({vision.model_type}, width "
        f"{vision.hidden_size}, {vision.num_hidden_layers} blocks), a connector and a language model "
        f"({text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers). A tile becomes "
        f"{config.image_seq_length} visual tokens.{details}"
    )
    write_conversion_card(folder, sources, description, ("sailvl", "custom_code", "conversational"))


def _image_settings(checkpoint: Checkpoint, config: "SAILVLConfig") -> dict[str, Any]:
    """Return options of the image processor: the source's own, else those of a release's config.json."""
    options, fields = read_json(PACKAGE / "preprocessor_config.json").keys(), checkpoint.document("config.json")
    settings = {key: value for key, value in read_image_settings(checkpoint).items() if key in options}
    if fields.get("pad2square"):
        fix = "images are not padded to a square here: set it to false if none were in training"
        raise CheckpointError(f"{checkpoint.source.name}: config.json: pad2square is not supported: {fix}")
    if "max_tiles" not in checkpoint.document("preprocessor_config.json"):
        settings |= {option: fields[field] for field, option in TILING.items() if fields.get(field) is not None}
    (rows, columns), (height, width) = config.grid_size, config.patch_size
    return {**settings, "size": {"height": rows * height, "width": columns * width}}


def build_processor(
    tokenizer: Any, images: Checkpoint, config: "SAILVLConfig", where: str, template: str | None = None, **options: Any
) -> "SAILVLProcessor":
    """
    Args:
        tokenizer: With the tokens of an image.
        images: Its image settings are the processor's; `options` replace them.
        where: Names the model in an error.
        template: The chat template, if it is not SAIL-VL's.

    Raises:
        CheckpointError: The image settings are invalid, not supported, or out of range.
    """
    from ...image_processing_sailvit import SAILViTImageProcessor
    from ...processing_sailvl import SAILVLProcessor

    tokens = dict(zip(("image_start_token", "image_token", "image_end_token"), config.special_tokens, strict=True))
    tokens |= {"image_seq_length": config.image_seq_length, "chat_template": template}
    settings = {**_image_settings(images, config), **options}
    with transformers_errors(where, (TypeError, ValueError)):
        return SAILVLProcessor(SAILViTImageProcessor(**settings), tokenizer, **tokens)


def own_template(checkpoint: Checkpoint) -> str | None:
    """Return the chat template of a folder with a SAILVLProcessor; a release has at most its tokenizer's, for text."""
    is_ours = checkpoint.document("processor_config.json").get("processor_class") == "SAILVLProcessor"
    if not is_ours or "chat_template.jinja" not in checkpoint.source.files:
        return None
    template = checkpoint.source.path("chat_template.jinja").read_text(encoding="utf-8")
    return None if is_old_template(template) else template
