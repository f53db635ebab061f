# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches for next-patch prediction: the pictures of a step -> tiles with random prefixes -> packs."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch

from .attention import Segment
from .collate import Pack
from .corpus import Corpus
from .formats import BadSample, Sample
from .packing import PackedBatches


class TileBatches(PackedBatches):
    """
    The packs of this rank for next-patch prediction: uint8 tiles, each with a random prefix.

    Prefixes depend on the seed, the step and the sample only, not on the ranks, and are the same after a resume.
    """

    def __getitem__(self, step: int) -> list[Pack]:
        return [read_tile_pack(self.corpus, pack, (self.order.seed, step)) for pack in self.plan(step)[self.rank]]


def read_tile_pack(corpus: Corpus, indices: Sequence[int], seed: Sequence[int]) -> Pack:
    """
    Return the pack of samples: pixel_values (n, 3, h, w) uint8 and prefix_lengths (n,), 1 to N - 1 at random.

    Its answers are the patches after the prefixes. A sample that cannot be read, or has not the tiles that it was
    planned with, is left out and listed in `skipped`. Without samples the pack is one tile without predicted patches.

    Args:
        seed: Of the prefixes, together with the index of each sample.
    """
    processor = corpus.processor
    read, skipped = _read_samples(corpus, indices)
    tiles = [own for _, own in read]
    prefixes = [random_prefixes(processor.patches, len(own), (*seed, index)) for index, own in read]
    segments = [Segment((processor.patches * len(own),)) for own in tiles]
    answers = [int((processor.patches - own).sum()) for own in prefixes]
    if not read:
        size = processor.image_processor.size
        tiles = [torch.zeros(1, 3, size["height"], size["width"], dtype=torch.uint8)]
        prefixes = [torch.tensor([processor.patches])]
    inputs = {"pixel_values": torch.cat(tiles), "prefix_lengths": torch.cat(prefixes)}
    samples = [index for index, _ in read]
    return Pack(inputs, samples, segments, skipped, answers, [1] * len(read), [None] * len(read))


def _read_samples(
    corpus: Corpus, indices: Sequence[int]
) -> tuple[list[tuple[int, torch.Tensor]], list[tuple[int, str]]]:
    """Return index and tiles of the samples that can be read, index and reason of the others."""
    read, skipped = [], []
    for group in _by_options(corpus, indices, skipped):
        read += _read_group(corpus, group, skipped)
    return read, skipped


def _by_options(
    corpus: Corpus, indices: Sequence[int], skipped: list[tuple[int, str]]
) -> Iterator[list[tuple[int, Sample]]]:
    """Yield index and sample of consecutive samples with the same options: the image processor takes many at once."""
    samples = []
    for index in indices:
        try:
            samples.append((index, corpus[index]))
        except BadSample as error:
            skipped.append((index, str(error)))
    for _, group in groupby(samples, key=lambda entry: entry[1].options):
        yield [*group]


def _read_group(
    corpus: Corpus, group: list[tuple[int, Sample]], skipped: list[tuple[int, str]]
) -> list[tuple[int, torch.Tensor]]:
    """Return index and tiles of the samples of a group; if one cannot be read, each is read by itself."""
    try:
        tiles = corpus.processor.read_tiles([sample for _, sample in group])
    except BadSample as error:
        if len(group) > 1:
            return [found for entry in group for found in _read_group(corpus, [entry], skipped)]
        skipped.append((group[0][0], str(error)))
        return []
    read = []
    for (index, _), own in zip(group, tiles, strict=True):
        if len(own) == (expected := int(corpus.tiles[index])):
            read.append((index, own))
        else:
            reason = f"expected {expected} tiles, got {len(own)}: a file changed since they were counted"
            skipped.append((index, reason))
    return read


def random_prefixes(patches: int, tiles: int, seed: Sequence[int]) -> torch.Tensor:
    """
    Return prefix lengths (tiles,) int64, from 1 to N - 1 with equal chances, as in AIM (section 3.1).

    The raw output of PCG64 is the same in all releases of numpy.
    """
    numbers = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(tiles)
    return torch.from_numpy((numbers % np.uint64(patches - 1)).astype(np.int64) + 1)
