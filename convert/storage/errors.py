"""What can be wrong with a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or the tensor, and the mend where there is one."""


class VerificationError(RuntimeError):
    """A written folder does not load, or its outputs differ from the source's: a failure of this package."""


@dataclass(frozen=True)
class Problem:
    """
    One thing that is wrong.

    Attributes:
        kind: One of "missing", "unexpected", "empty", "shape", "dtype", "mixed", "values", "sha256" (of tensors),
            "file", "shard", "stray", "code" (of files), "config", "layout"; of what is to be
            published also "load", "tokens", "version", "secret", "path", "user", "card", "licence".
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
        CheckpointError: There are problems; the first is told, the others are counted.
    """
    if problems:
        more = f" (and {len(problems) - 1} more; `sailvit inspect` lists them)" if len(problems) > 1 else ""
        raise CheckpointError(f"{source + ': ' if source else ''}{problems[0]}{more}")
