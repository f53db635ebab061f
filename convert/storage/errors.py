"""Errors about checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass


class CheckpointError(ValueError):
    """A checkpoint or an option that cannot be used; the message names the file, tensor or field, and the fix."""


class VerificationError(RuntimeError):
    """The written folder does not compute what its source computes: a bug in this package."""


@dataclass(frozen=True)
class Problem:
    """
    One problem of a checkpoint or folder.

    Attributes:
        kind: One of "missing", "unexpected", "empty", "shape", "dtype", "mixed", "values", "sha256" (tensors),
            "file", "shard", "stray", "code" (files), "config", "layout"; before publishing also "load", "tokens",
            "version", "secret", "path", "user", "card", "licence".
        location: The tensor, file or field.
        message: What is wrong with it, and the fix.
    """

    kind: str
    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


def raise_if_any(problems: Sequence[Problem], source: str = "") -> None:
    """
    Raises:
        CheckpointError: There are problems; its message is the first one and the number of others.
    """
    if problems:
        more = f" (and {len(problems) - 1} more; `sailvit inspect` lists them)" if len(problems) > 1 else ""
        raise CheckpointError(f"{source + ': ' if source else ''}{problems[0]}{more}")
