"""Tensor names without the segments that wrappers add."""

from collections.abc import Iterable

from .errors import CheckpointError


# DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def strip_wrapper_prefixes(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def without_wrapper_prefixes(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """
    Map names without wrapper segments to stored names, and list the wrapper segments that occur.

    Raises:
        CheckpointError: Two names become equal.
    """
    cleaned: dict[str, str] = {}
    wrappers = set()
    for name in names:
        wrappers |= WRAPPERS.intersection(name.split("."))
        short = strip_wrapper_prefixes(name)
        if cleaned.setdefault(short, name) != name:
            raise CheckpointError(f"{name} and {cleaned[short]} are both {short} without wrappers: remove one of them")
    return cleaned, sorted(wrappers)
