"""Stored tensors: dtypes, chunked reads, casts and comparisons. torch is imported for rare casts only."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError


if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes

# Name of a dtype in torch -> name in the safetensors format, and bytes of an element.
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# The unsigned integer of the same size, the bits without the sign, and their smallest value that is infinite or NaN.
FLOAT_BITS = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor in a file, from byte `offset` on; `dtype` is a key of ITEM_SIZES."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    def __setstate__(self, state: Any) -> None:
        """Refuse a state: a pickle could move a tensor with it, after its position was checked."""
        raise pickle.UnpicklingError("a tensor has no state")

    def leaves(self) -> Iterable["StoredTensor"]:
        """The tensors in files that it is computed from: itself, if it is one."""
        return (self,)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Bytes (uint8) of the elements from `start` to `stop`, at most CHUNK at a time."""
        item = ITEM_SIZES[self.dtype]
        with self.file.open("rb") as file:
            file.seek(self.offset + start * item)
            for first, last in spans(start * item, self.nbytes if stop is None else stop * item, CHUNK):
                chunk = np.empty(last - first, np.uint8)
                if file.readinto(chunk) < len(chunk):
                    raise CheckpointError(f"{self.file}: the file was truncated while it was read")
                yield chunk


@dataclass(frozen=True, kw_only=True)
class ComputedTensor(StoredTensor):
    """A tensor that is assembled or computed when it is read; `read` yields bytes as StoredTensor.chunks does."""

    read: Callable[[int, int], Iterator[np.ndarray]] = field(repr=False, compare=False)
    parents: tuple[StoredTensor, ...] = field(default=(), repr=False, compare=False)

    def leaves(self) -> Iterable[StoredTensor]:
        return chain.from_iterable(parent.leaves() for parent in self.parents) if self.parents else (self,)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return self.read(start, prod(self.shape) if stop is None else stop)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `chunks` yields its bytes (uint8), row-major, from the first one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (first, last + 1), each at most `step` long."""
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def read_bytes(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Bytes (uint8) of the elements from `start` to `stop` in one array."""
    chunks = [*tensor.chunks(start, stop)]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint8), *chunks])


def load_float32(stored: StoredTensor, rounded_to: str = "F32") -> "torch.Tensor":
    """A stored tensor in float32, after rounding its values to another dtype (a key of ITEM_SIZES)."""
    import torch

    chunks = [cast(cast(chunk, stored.dtype, rounded_to), rounded_to, "F32") for chunk in stored.chunks()]
    return torch.from_numpy(np.concatenate(chunks)).view(torch.float32).reshape(stored.shape)


def to_bytes(tensor: "torch.Tensor") -> np.ndarray:
    """A tensor's elements, row-major, as bytes (uint8)."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def torch_name(dtype: str) -> str:
    """ "F32" -> "float32"."""
    return next(name for name, key in TORCH_DTYPES.items() if key == dtype)


def is_finite(chunk: np.ndarray, dtype: str) -> bool:
    """Whether bytes hold no NaN and no infinity; always true of integers."""
    if dtype not in FLOAT_BITS or not len(chunk):
        return True
    bits, magnitude, infinity = FLOAT_BITS[dtype]
    return int((chunk.view(bits) & bits(magnitude)).max()) < infinity


def cast(chunk: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Bytes in another dtype, rounded to nearest even."""
    if dtype == target:
        return chunk
    if (dtype, target) == ("F32", "BF16") and is_finite(chunk, dtype):
        bits = chunk.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)
    if (dtype, target) == ("BF16", "F32"):
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    import torch

    values = torch.from_numpy(chunk).view(getattr(torch, torch_name(dtype)))
    return to_bytes(values.to(getattr(torch, torch_name(target))))


def cast_stream(
    tensor: StoredTensor, name: str, dtype: str, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """
    Yield the bytes of elements `start` to `stop` of a stored tensor in another dtype; `name` is its name in the
    checkpoint, for the message. Raises a CheckpointError if a value is NaN, infinite, or out of range of `dtype`.
    """
    for chunk in tensor.chunks(start, stop):
        if not is_finite(chunk, tensor.dtype):
            raise CheckpointError(f"{tensor.file}: {name} holds NaN or infinity: the checkpoint is broken")
        converted = cast(chunk, tensor.dtype, dtype)
        if converted is not chunk and not is_finite(converted, dtype):
            raise CheckpointError(f"{tensor.file}: {name} has values beyond {dtype}: try --dtype bfloat16")
        yield converted


def is_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are bitwise equal."""
    return one.dtype == other.dtype and one.shape == other.shape and rounds_to(one, other)


def rounds_to(original: StoredTensor, rounded: StoredTensor) -> bool:
    """Whether a tensor, cast to the dtype of another one of its shape, is bitwise equal to it."""
    for first, last in spans(0, prod(rounded.shape), CHUNK // 8):
        expected = cast(read_bytes(original, first, last), original.dtype, rounded.dtype)
        if not np.array_equal(expected, read_bytes(rounded, first, last)):
            return False
    return True
