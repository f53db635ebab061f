"""Tensors assembled on demand from the files of several ranks: flat slices (ZeRO) or n-dimensional shards (DCP)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import CheckpointError
from .tensors import CHUNK, ITEM_SIZES, StoredTensor, read_bytes, spans
from .torch_pickle import read_saved


@dataclass(frozen=True)
class FlatSlice:
    """Elements `first` to `first + count` of a tensor, flattened."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class ConcatenatedTensor(StoredTensor):
    """
    Flat slices, one after another, in the shape of a parameter.

    Attributes:
        slices: They have as many elements as the tensor.
    """

    slices: tuple[FlatSlice, ...] = field(default=(), repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        position, stop = 0, math.prod(self.shape) if stop is None else stop
        for part in self.slices:
            first, last = max(start - position, 0), min(stop - position, part.count)
            if first < last:
                yield from part.tensor.chunks(part.first + first, part.first + last)
            position += part.count


@dataclass(frozen=True)
class Shard:
    """A block of a tensor, saved by torch.save as `nbytes` bytes of a file, from `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """
    A tensor in shards that fill it without overlap.

    Attributes:
        shards: None is empty.
        trust: Whether their pickles may name unknown classes.
        located: The data of every shard that was opened.
    """

    shards: tuple[Shard, ...] = field(default=(), repr=False, compare=False)
    trust: bool = False
    located: dict[Shard, StoredTensor] = field(default_factory=dict, repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """As many rows at a time as fit into CHUNK, at least one."""
        shape, item = self.shape or (1,), ITEM_SIZES[self.dtype]
        stop, row = math.prod(shape) if stop is None else stop, max(math.prod(shape[1:]), 1)
        for top, bottom in spans(start // row, -(-stop // row), max(CHUNK // (row * item), 1)):
            rows = self._read_rows(top, bottom, shape)
            yield rows[max(start - top * row, 0) * item : (min(stop, bottom * row) - top * row) * item]

    def _read_rows(self, top: int, bottom: int, shape: tuple[int, ...]) -> np.ndarray:
        rows = np.empty((bottom - top, *shape[1:]), f"V{ITEM_SIZES[self.dtype]}")
        for shard in self.shards:
            offsets, sizes = (shard.offsets, shard.sizes) if self.shape else ((0,), (1,))
            first, last = max(top, offsets[0]), min(bottom, offsets[0] + sizes[0])
            if first < last:
                row = math.prod(sizes[1:])
                data = read_bytes(self._locate(shard), (first - offsets[0]) * row, (last - offsets[0]) * row)
                columns = (slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
                rows[(slice(first - top, last - top), *columns)] = data.view(rows.dtype).reshape(-1, *sizes[1:])
        return rows.reshape(-1).view(np.uint8)

    def _locate(self, shard: Shard) -> StoredTensor:
        if shard not in self.located:
            stored = read_saved(shard.file, trust=self.trust, start=shard.start, length=shard.nbytes)
            found = (stored.dtype, stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
            if found != (self.dtype, shard.sizes):
                what = f"at byte {shard.start}: expected {(self.dtype, shard.sizes)} as in .metadata, got {found}"
                raise CheckpointError(f"{shard.file}: {what}: the file is of another run, copy it again")
            self.located[shard] = stored
        return self.located[shard]
