"""TODO convert/export/converted_card.py."""

from pathlib import Path
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.output_folder import final_name
from ..storage.sources import PROVENANCE, licence_of, public_name


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
    lines = [*lines, "", f"Converted from {public_name(source)}; {record}"]
    write_card(folder, lines, base_model=origin, **data, **licence_of(source))


def write_card(folder: Path, lines: list[str], **data: Any) -> None:
    """README.md: what the Hub is told, a title, and text."""
    from huggingface_hub import ModelCard, ModelCardData

    text = ["---", ModelCardData(**data).to_yaml(), "---", f"# {final_name(folder)}", "", *lines]
    ModelCard("\n".join(text) + "\n").save(folder / "README.md")
