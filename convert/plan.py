"""A conversion, planned: what every kind of it says and does, and what was asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .storage.checkpoint import Checkpoint
from .storage.errors import CheckpointError
from .storage.output_folder import check_space
from .storage.safetensors_io import split_in_shards, write_weights
from .storage.tensors import TORCH_DTYPES, NewTensor, StoredTensor


DTYPES = ("float32", "bfloat16", "float16")

PARTS = ("vision", "connector", "language", "all")

SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Options:
    """
    What was asked for, besides the source and where to.

    Attributes:
        part: One of PARTS; None for what the source is: all of a multimodal model, else the one part there is.
        to_layout: A key of LAYOUTS; None for what fits.
        from_layout: The layout of the source's tower; recognised if not given.
        prefix: What stands before the names of the part, where several could be meant.
        image_size: Height and width in pixels; learned positions are resampled to it.
        dtype: One of DTYPES; the source's if not given.
        max_shard_size: In bytes, or as "5GB", of files that are written anew; SHARD_SIZE if not given.
        insert_vision: A checkpoint whose tower is to take the place of the source's.
        link: Whether files of weights that stay as they are may be hard links to the source's.
    """

    part: str | None = None
    to_layout: str | None = None
    from_layout: str | None = None
    prefix: str | None = None
    image_size: int | None = None
    dtype: str | None = None
    max_shard_size: int | str | None = None
    insert_vision: str | None = None
    link: bool = False

    def check(self) -> None:
        """
        Raises:
            CheckpointError: A value that cannot be.
        """
        if self.part not in (None, *PARTS):
            raise CheckpointError(f"part {self.part!r}: one of {', '.join(PARTS)} is wanted")
        if self.image_size is not None and (type(self.image_size) is not int or self.image_size < 1):
            raise CheckpointError(f"image size {self.image_size!r}: a whole number of pixels is wanted")
        if self.dtype not in (None, *DTYPES):
            raise CheckpointError(f"dtype {self.dtype!r}: one of {', '.join(DTYPES)} is wanted")
        split_in_shards({}, SHARD_SIZE if self.max_shard_size is None else self.max_shard_size)


@dataclass(kw_only=True)
class ConversionPlan(ABC):
    """
    One conversion, once it is sure that it can be done.

    Attributes:
        checkpoint: The source.
        dtype: Of what is written, a key of readers.ITEM_SIZES.
        notes: What was found, dropped or assumed, line by line.
        verification: The reference, and how far the folder is from it; None if they were not compared.
    """

    checkpoint: Checkpoint
    dtype: str
    notes: list[str] = field(default_factory=list)
    verification: dict[str, Any] | None = None

    @abstractmethod
    def tensors(self) -> list[NewTensor]:
        """What is to be written, in the order in which it shall lie in the files."""

    @abstractmethod
    def inputs(self) -> Iterable[StoredTensor]:
        """The tensors of the source that are read."""

    @abstractmethod
    def write_folder(self, folder: Path) -> None:
        """Writes all but the weights and the provenance."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What provenance.json says of this kind of conversion; under "source", what it says of the source."""

    def write_notes(self) -> list[str]:
        """What there is to say of weights once they are written, line by line."""
        return []

    @property
    def kept(self) -> list[str]:
        """Files of weights of the source that stay as they are."""
        return []

    def verify(self, folder: Path) -> dict[str, Any] | None:
        """Loads the folder and holds it against the source; None where nothing loads it."""
        return None

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """Streams the tensors into the folder; returns name -> sha256."""
        tensors = self.tensors()
        total, done = sum(tensor.nbytes for tensor in tensors), 0

        def count(written: int) -> None:
            nonlocal done
            done += written
            on_progress(done, total)

        check_space(folder, total)
        return write_weights(folder, tensors, max_shard_size, count)


def output_dtype(asked: str | None, tensors: dict[str, StoredTensor], where: str) -> str:
    """
    The dtype to write: what was asked for, or that of all tensors.

    Raises:
        CheckpointError: It is no floating point number that can be written, or there are several.
    """
    if asked:
        return TORCH_DTYPES[asked]
    found = sorted({tensor.dtype for tensor in tensors.values()})
    if len(found) != 1 or found[0] not in map(TORCH_DTYPES.get, DTYPES):
        raise CheckpointError(f"{where}: its tensors are {', '.join(found)}: choose with --dtype")
    return found[0]
