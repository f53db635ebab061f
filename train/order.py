# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of samples: a permutation per epoch, in a file that the processes of a node share."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from .cache import hash_of, locked, new_file


class EpochOrder:
    """
    The order of samples: one permutation per epoch, and the epochs one after the other as one stream.

    The permutation of an epoch depends on (seed, epoch) and `length` only. It is written once to `cache_dir` and
    memory-mapped, so that the processes of a node share it.

    Args:
        length: Samples of an epoch.
        seed: A non-negative integer.
        cache_dir: A writable folder. Files of epochs before the last one are removed.
        fingerprint: Of the corpus; part of the file names.

    Raises:
        OSError: `cache_dir` is full or not writable.
    """

    def __init__(self, length: int, seed: int, cache_dir: str | Path, fingerprint: str):
        self.length, self.seed, self.cache_dir = length, seed, Path(cache_dir)
        self._prefix = f"order-{hash_of([fingerprint, length, seed])}"
        self._open: dict[int, np.ndarray] = {}  # epoch -> memory-mapped permutation, at most two

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned worker maps the files itself

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the samples at positions [start, stop) of the stream of epochs."""
        parts = []
        for epoch in range(start // self.length, math.ceil(stop / self.length)):
            first = epoch * self.length
            parts.append(self._permutation(epoch)[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._open:
            path = self.cache_dir / f"{self._prefix}-{epoch}.npy"
            try:
                order = self._load(path)
                order = self._create(path, epoch) if order is None else order
            except OSError as error:
                megabytes = self.length * _index_dtype(self.length).itemsize / 1e6
                raise OSError(
                    f"{path}: cannot store the order of epoch {epoch}: {error.strerror or error}: expected a writable "
                    f"folder with {megabytes:.0f} MB free; choose another cache folder"
                ) from error
            neighbours = {known: self._open[known] for known in self._open if abs(known - epoch) == 1}
            self._open = {**neighbours, epoch: order}
        return self._open[epoch]

    def _load(self, path: Path) -> np.ndarray | None:
        """Map a permutation; None if it does not exist or is damaged."""
        try:
            order = np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return order if order.shape == (self.length,) and order.dtype == _index_dtype(self.length) else None

    def _create(self, path: Path, epoch: int) -> np.ndarray:
        with locked(self.cache_dir / self._prefix):
            if (order := self._load(path)) is None:  # no other process wrote it in the meantime
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, permutation(self.length, self.seed, epoch))
                self._remove_before(epoch - 1)
                order = self._load(path)
        if order is None:
            raise OSError("damaged as soon as it was written")
        return order

    def _remove_before(self, epoch: int) -> None:
        """Remove the files of earlier epochs. A process that has one of them mapped can still read it."""
        for path in self.cache_dir.glob(f"{self._prefix}-*.npy"):
            if int(path.stem.rpartition("-")[2]) < epoch:
                path.unlink(missing_ok=True)


def permutation(length: int, *seed: int) -> np.ndarray:
    """
    Return a random permutation of range(length), int32 where that is enough.

    It sorts the raw output of PCG64, which numpy keeps the same in all releases; the methods of
    `numpy.random.Generator` may change (NEP 19), and with them the order after a resume. The index is in the low bits
    of each key: plain sorting is faster than argsort, and no two keys are equal.

    Args:
        length: At least 1.
        seed: Non-negative integers.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(length)
    index_bits = np.uint64((1 << (length - 1).bit_length()) - 1)
    keys &= ~index_bits
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort()
    keys &= index_bits
    return keys.astype(_index_dtype(length))


def _index_dtype(length: int) -> np.dtype:
    return np.dtype(np.int32 if length <= 2**31 else np.int64)
