"""
Checkpoints on disk as named tensors, read lazily: safetensors and torch pickles, in one file or in shards.

Opening reads headers; the data of a tensor is read in chunks when it is asked for. Only the shards that hold tensors
which are asked for are opened.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .errors import CheckpointError


if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes read at a time

# Bytes of an element, under the names of the safetensors format.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

# Bits of a number without its sign, and from which value on they mean an infinity or NaN.
FLOAT_BITS = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor that lies in a file, row-major.

    Attributes:
        file: Where it lies.
        dtype: A key of ITEM_SIZES.
        shape: Its dimensions.
        offset: Of its first byte in the file.
        mapped: The tensor of a pickle, which torch has mapped into memory; `offset` says nothing then.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    mapped: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    def __setstate__(self, state: Any) -> None:
        """What a pickle says of a tensor is checked when its place is found; it may not be changed thereafter."""
        raise pickle.UnpicklingError("a tensor has no state")

    def pieces(self) -> Iterable["StoredTensor"]:
        """Where it is read from: itself, or the tensors it is computed from."""
        return (self,)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Its elements from `start` to `stop`, as bytes (uint8), at most CHUNK of them at a time."""
        item = ITEM_SIZES[self.dtype]
        first, last = start * item, self.nbytes if stop is None else stop * item
        if self.mapped is not None:
            import torch

            flat = self.mapped.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield from (flat[at : min(at + CHUNK, last)] for at in range(first, last, CHUNK))
            return
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first)
            for at in range(first, last, CHUNK):
                yield _read(file, min(CHUNK, last - at), self.file)


def _read(file: BinaryIO, count: int, path: Path) -> np.ndarray:
    chunk = np.empty(count, np.uint8)
    rest = memoryview(chunk)
    while rest:
        got = file.readinto(rest)
        if not got:
            raise CheckpointError(f"{path}: the file ends early: it was cut while it was read")
        rest = rest[got:]
    return chunk


def is_finite(chunk: np.ndarray, dtype: str) -> bool:
    """Whether the bytes of a chunk hold no NaN and no infinity; what is not floating point does not."""
    if dtype not in FLOAT_BITS or not len(chunk):
        return True
    bits, magnitude, infinity = FLOAT_BITS[dtype]
    return int((chunk.view(bits) & bits(magnitude)).max()) < infinity


def torch_name(dtype: str) -> str:
    """ "F32" -> "float32"."""
    return next(name for name, key in TORCH_DTYPES.items() if key == dtype)


def cast(chunk: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """The bytes of a chunk in another dtype, rounded to nearest even."""
    if dtype == wanted:
        return chunk
    if (dtype, wanted) == ("F32", "BF16") and is_finite(chunk, dtype):  # without torch, which is large
        bits = chunk.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)
    if (dtype, wanted) == ("BF16", "F32"):
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    import torch

    numbers = torch.from_numpy(chunk).view(getattr(torch, torch_name(dtype)))
    return to_bytes(numbers.to(getattr(torch, torch_name(wanted))))


def to_bytes(tensor: "torch.Tensor") -> np.ndarray:
    """A tensor's elements, row-major, as bytes (uint8)."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def is_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, by their bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        a is not None and b is not None and np.array_equal(a, b) for a, b in zip_longest(one.chunks(), other.chunks())
    )


def load(stored: StoredTensor, rounded_to: str = "F32") -> "torch.Tensor":
    """A stored tensor in float32, its values rounded to those that another dtype has."""
    import torch

    chunks = [cast(cast(chunk, stored.dtype, rounded_to), rounded_to, "F32") for chunk in stored.chunks()]
    return torch.from_numpy(np.concatenate(chunks)).view(torch.float32).reshape(stored.shape)


def read_bytes(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Elements `start` to `stop` of a tensor, in one piece."""
    chunks = [*tensor.chunks(start, stop)]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint8), *chunks])


@dataclass(frozen=True)
class NewTensor:
    """
    A tensor to be written.

    Attributes:
        name: In the file.
        dtype: A key of ITEM_SIZES.
        shape: Its dimensions.
        chunks: Yields its bytes (uint8), row-major, from the first on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def cast_stream(
    tensor: StoredTensor, name: str, dtype: str, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """
    The bytes of elements `start` to `stop` of a stored tensor, in another dtype.

    Args:
        name: Of the tensor in the checkpoint.

    Raises:
        CheckpointError: They hold NaN or infinity, or do not fit the dtype.
    """
    for chunk in tensor.chunks(start, stop):
        if not is_finite(chunk, tensor.dtype):
            raise CheckpointError(f"{tensor.file}: {name} holds NaN or infinity: the checkpoint is broken")
        written = cast(chunk, tensor.dtype, dtype)
        if written is not chunk and not is_finite(written, dtype):
            raise CheckpointError(f"{tensor.file}: {name} has values beyond {dtype}: try --dtype bfloat16")
        yield written
