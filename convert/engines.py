"""Folders that training engines leave, in which the weights lie in pieces."""

from typing import Any

from .distributed import read_distributed
from .pickles import explained
from .readers import StoredTensor
from .sources import STATES, Source
from .zero import ZeroFolder


def read_engine(source: Source, entry: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """
    The tensors of an engine's folder, and what it says of the training.

    Args:
        source: What the folder lies in.
        entry: As sources.find_engine names it.
        trust: Whether pickles may name what is no object of the engine.

    Raises:
        CheckpointError: A file is missing, broken, of another run, or names what could run code.
    """
    with explained(f"{source.name}/{entry}"):
        if entry.endswith(STATES):
            return ZeroFolder(source, entry.removesuffix(STATES), trust).read()
        return read_distributed(source, entry.removesuffix(".metadata"), trust)
