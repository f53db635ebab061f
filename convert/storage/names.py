"""TODO convert/storage/names.py."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import CheckpointError


if TYPE_CHECKING:
    pass

# Segments that other tools put into names: DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def strip_wrapper_prefixes(name: str) -> str:
    """A name without the segments that tools have put into it."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def without_wrapper_prefixes(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """
    Name without wrappers -> name, and the wrappers there are.

    Raises:
        CheckpointError: Two names are one without them.
    """
    cleaned: dict[str, str] = {}
    wrappers = set()
    for name in names:
        wrappers |= WRAPPERS.intersection(name.split("."))
        short = strip_wrapper_prefixes(name)
        if cleaned.setdefault(short, name) != name:
            raise CheckpointError(f"{name} and {cleaned[short]} are both {short}: one of them has to go")
    return cleaned, sorted(wrappers)
