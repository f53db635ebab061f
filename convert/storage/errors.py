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
    What is wrong with a checkpoint. Its kind is one of "missing", "unexpected", "empty", "shape", "dtype", "mixed",
    "values", "sha256" (tensors), "file", "shard", "stray", "code" (files), "config", "layout"; before publishing also
    "load", "tokens", "version", "secret", "path", "user", "card", "licence".
    """

    kind: str
    location: str  # the tensor, file or field
    message: str  # what is wrong with it, and the fix

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


def raise_if_any(problems: Sequence[Problem], source: str = "") -> None:
    """Raise a CheckpointError with the first problem and the number of others."""
    if problems:
        more = f" (and {len(problems) - 1} more; `sailvit inspect` lists them)" if len(problems) > 1 else ""
        raise CheckpointError(f"{source + ': ' if source else ''}{problems[0]}{more}")
