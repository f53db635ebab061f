"""The code and the example files of README and docs/, and the toy models that they name."""

import re
from pathlib import Path

import datasets
import pytest
from conftest import PHOTOGRAPH, ROOT
from toy_sailvl import released_config, write_release, write_tokenizer
from transformers import AutoTokenizer

from sailvit import SAILViTImageProcessor, SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor


TRAINING = ROOT / "docs" / "training.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# An example file: its name in backticks and a colon, right before the block.
EXAMPLE = re.compile(r"`([\w.-]+)`:\n\n```(?:json|yaml)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# A command and what it prints.
OUTPUT = re.compile(r"^```bash\n(sailvit [^\n]+)\n```\n\n```text\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def code_blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def block_with(page: Path, word: str) -> str:
    """Return the first Python block of a page that contains a word."""
    return next(block for block in code_blocks(page, "python") if word in block)


def outputs(page: Path) -> list[tuple[str, str]]:
    """The commands of a page whose output is shown, with that output."""
    return OUTPUT.findall(page.read_text())


def write_examples(page: Path, folder: Path) -> None:
    for name, text in EXAMPLE.findall(page.read_text()):
        (folder / name).write_text(text)


def write_training_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the data that docs/training.md names, make the folder current, and keep the cache of datasets in it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    monkeypatch.chdir(folder)
    (folder / "examples").symlink_to(PHOTOGRAPH.parent)
    write_examples(TRAINING, folder)
    exec(block_with(TRAINING, "to_parquet"), {})


def write_model(folder: Path, parts: Path) -> Path:
    """Write a toy SAIL-VL, and its parts as released; a tile is 56 pixels and 4 visual tokens."""
    model = SAILVLForConditionalGeneration.from_pretrained(write_release(parts / "release"), image_token_id=309)
    model.save_pretrained(folder)
    _write_processor(folder, parts, model.config)
    return folder


def write_large_tiles(folder: Path, parts: Path) -> Path:
    """Write config and processor, without weights, of a toy SAIL-VL whose tiles have the 256 tokens of real ones."""
    released = released_config()
    released["force_image_size"] = released["vision_config"]["image_size"] = 448
    config = SAILVLConfig.from_dict(released, image_token_id=309)
    config.save_pretrained(folder)
    _write_processor(folder, parts, config)
    return folder


def _write_processor(folder: Path, parts: Path, config: SAILVLConfig) -> None:
    size = config.vision_config.image_size
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(parts / "tokenizer"))
    image_processor = SAILViTImageProcessor(size={"height": size, "width": size})
    SAILVLProcessor(image_processor, tokenizer, config.image_seq_length).save_pretrained(folder)
