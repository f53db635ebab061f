"""Tensors in pieces: runs of elements, or boxes, that lie somewhere in the files of several processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .errors import CheckpointError
from .sources import Source
from .tensors import CHUNK, ITEM_SIZES, StoredTensor, read_bytes
from .torch_pickle import read_saved


@dataclass(frozen=True)
class FlatSlice:
    """Elements of a stored tensor that follow one another: `count` of them, from `first` on."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class ConcatenatedTensor(StoredTensor):
    """
    A tensor in runs, one after the other.

    Attributes:
        runs: They hold as many elements as the tensor.
    """

    runs: tuple[FlatSlice, ...] = field(default=(), repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        at, stop = 0, math.prod(self.shape) if stop is None else stop
        for run in self.runs:
            first, last = max(start - at, 0), min(stop - at, run.count)
            if first < last:
                yield from run.tensor.chunks(run.first + first, run.first + last)
            at += run.count


@dataclass(frozen=True)
class Shard:
    """
    A part of a tensor: where it begins, its sizes, and the file in which torch.save wrote it.

    Attributes:
        info: Of the engine: name of the file, first byte, bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: tuple[str, int, int]


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """
    A tensor in boxes, that fill it.

    Attributes:
        boxes: None of them empty.
        source, folder: Where their files are.
        trust: Whether the pickles in these may name what is no tensor.
        opened: The boxes that were looked for -> where their elements lie.
    """

    boxes: tuple[Shard, ...] = field(default=(), repr=False, compare=False)
    source: Source | None = field(default=None, repr=False, compare=False)
    folder: str = ""
    trust: bool = False
    opened: dict[Shard, StoredTensor] = field(default_factory=dict, repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """As many rows at a time as fit into CHUNK, but one at least."""
        item, shape = ITEM_SIZES[self.dtype], self.shape or (1,)
        stop = math.prod(shape) if stop is None else stop
        row = math.prod(shape[1:])
        step = max(CHUNK // max(row * item, 1), 1)
        for top in range(start // max(row, 1), -(-stop // max(row, 1)), step):
            bottom = min(top + step, shape[0])
            slab = self._slab(top, bottom, shape, item)
            yield slab[max(start - top * row, 0) * item : (min(stop, bottom * row) - top * row) * item]

    def _slab(self, top: int, bottom: int, shape: tuple[int, ...], item: int) -> np.ndarray:
        """The bytes of the rows from `top` to `bottom`."""
        slab = np.empty((bottom - top, *shape[1:]), f"V{item}")
        for box in self.boxes:
            offsets, sizes = (box.offsets, box.sizes) if self.shape else ((0,), (1,))
            first, last = max(top, offsets[0]), min(bottom, offsets[0] + sizes[0])
            if first < last:
                inner = math.prod(sizes[1:])
                rows = read_bytes(self._open(box), (first - offsets[0]) * inner, (last - offsets[0]) * inner)
                rest = (slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
                target = (slice(first - top, last - top), *rest)
                slab[target] = rows.view(slab.dtype).reshape(last - first, *sizes[1:])
        return slab.reshape(-1).view(np.uint8)

    def _open(self, box: Shard) -> StoredTensor:
        if box in self.opened:
            return self.opened[box]
        file, start, length = box.info
        path = self.source.path(self.folder + file)
        stored = read_saved(path, trust=self.trust, start=start, length=length)
        found = (stored.dtype, stored.shape) if isinstance(stored, StoredTensor) else type(stored).__name__
        if found != (self.dtype, box.sizes):
            what = f"at byte {start} is {found}, not {(self.dtype, box.sizes)} as .metadata says"
            raise CheckpointError(f"{path}: {what}: it is of another run, copy it again")
        self.opened[box] = stored
        return stored
