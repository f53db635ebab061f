"""ConversionPlan: the interface that every conversion implements; Options: the options of a conversion."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .storage.checkpoint import Checkpoint
from .storage.errors import CheckpointError
from .storage.files import count_bytes
from .storage.output_folder import check_space
from .storage.safetensors_io import split_in_shards, write_weights
from .storage.sources import without_local_path
from .storage.tensors import TORCH_DTYPES, NewTensor, StoredTensor


DTYPES = ("float32", "bfloat16", "float16")
COMPONENTS = ("vision", "connector", "language")
PARTS = (*COMPONENTS, "all")
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Options:
    """Options of a conversion; None means the default."""

    part: str | None = None  # one of PARTS; by default all of a multimodal model, else the component that the source is
    to_layout: str | None = None  # of the written vision encoder, a key of LAYOUTS; "sailvit" by default
    from_layout: str | None = None  # of the source's vision encoder, a key of LAYOUTS; detected by default
    prefix: str | None = None  # of the component's tensor names, where several could be meant
    image_size: int | None = None  # height and width in pixels; learned position embeddings are resampled to it
    dtype: str | None = None  # one of DTYPES; by default the source's, float32 if it has fp32 masters and rounded ones
    max_shard_size: int | str | None = None  # bytes, or as "5GB", the default for rewritten files; if given, all are
    insert_vision: str | None = None  # AIMv2 that replaces a SAIL-VL's vision encoder: file, folder or name on the Hub
    # Whether unchanged weight files may be hard links where reflinks are not available; else they are copied. Whatever
    # writes into a hard link in place changes the source too.
    link: bool = False

    def check(self) -> None:
        """Raise CheckpointError if a value that the user gave is out of range; a dtype found later may be any."""
        check_choice("part", self.part, PARTS)
        check_choice("dtype", self.dtype, DTYPES)
        if self.image_size is not None and (type(self.image_size) is not int or self.image_size < 1):
            raise CheckpointError(f"image size: expected a positive integer of pixels, got {self.image_size!r}")
        if self.max_shard_size is not None:
            split_in_shards({}, self.max_shard_size)

    def provenance(self) -> dict[str, Any]:
        """Return the options without local paths."""
        return {**asdict(self), "insert_vision": self.insert_vision and without_local_path(self.insert_vision)}


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise CheckpointError if a value is given that is not one of the choices."""
    if value not in (None, *choices):
        raise CheckpointError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


@dataclass(kw_only=True)
class ConversionPlan(ABC):
    """A conversion that was checked to be possible."""

    checkpoint: Checkpoint  # the source
    dtype: str  # of the written tensors, a value of TORCH_DTYPES
    unchanged_files: list[str] = field(default_factory=list)  # weight files of the source that are not rewritten
    notes: list[str] = field(default_factory=list)  # messages about what was detected, dropped or assumed
    verification: dict[str, Any] | None = None  # the reference and the difference from it; None if not verified

    @abstractmethod
    def tensors(self) -> list[NewTensor]:
        """Return the tensors to write, in their order in the files."""

    @abstractmethod
    def source_tensors(self) -> Iterable[StoredTensor]:
        """Return the tensors of the source that are read."""

    @abstractmethod
    def write_folder(self, folder: Path) -> None:
        """Write all files but the weights and provenance.json."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """
        Return the entries of provenance.json of this kind of conversion: those about the source under "source"; under
        "kept" name -> name in the source of weight files that were not rewritten.
        """

    def verify(self, folder: Path) -> dict[str, Any] | None:
        """Load the folder and compare it with the source; None if nothing loads it alone."""
        return None

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """Write the tensors, one chunk in memory at a time; may add notes; return tensor name -> sha256."""
        tensors = self.tensors()
        total = sum(tensor.nbytes for tensor in tensors)
        check_space(folder, total)
        return write_weights(folder, tensors, max_shard_size, count_bytes(total, on_progress))


def output_dtype(dtype: str | None, tensors: dict[str, StoredTensor], source: str) -> str:
    """
    Return the dtype to write, a value of TORCH_DTYPES: the given one, else that of all tensors.

    Raises:
        CheckpointError: No dtype is given, and the tensors have several, or none of DTYPES.
    """
    if dtype:
        return TORCH_DTYPES[dtype]
    stored = sorted({tensor.dtype for tensor in tensors.values()})
    if len(stored) != 1 or stored[0] not in map(TORCH_DTYPES.get, DTYPES):
        raise CheckpointError(f"{source}: expected tensors of one dtype, got {', '.join(stored)}: choose with --dtype")
    return stored[0]
