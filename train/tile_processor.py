# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The pictures of a corpus without its texts, for the pretraining of a vision encoder.

A sample is the pictures of a conversation; one without pictures is left out. Its tokens are the patches of its tiles,
so that it is measured, mixed and packed like any other sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..image_processing_sailvit import SAILViTImageProcessor
from ..processing_sailvl import TokenCounts
from .formats import BadSample, FilteredSample, Sample


class TileProcessor:
    """
    What a corpus needs of a processor, for an encoder alone: it makes tiles, and counts their patches.

    Args:
        image_processor: Makes the tiles.
        patches: N, the patches of a tile.

    Raises:
        ValueError: A tile has one patch only, and so no next one.
    """

    def __init__(self, image_processor: SAILViTImageProcessor, patches: int):
        if patches < 2:
            raise ValueError(f"patches: expected at least 2 of a tile, got {patches}: lower patch_size")
        self.image_processor, self.patches = image_processor, patches

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write preprocessor_config.json."""
        self.image_processor.save_pretrained(folder, **options)

    def select(self, sample: Sample) -> Sample:
        """
        Return a sample with its pictures alone.

        Raises:
            FilteredSample: It has none; frames of videos are not used.
        """
        parts = [part for message in sample.messages for part in message["content"] if part["type"] == "image"]
        if not parts:
            raise FilteredSample("no pictures")
        return replace(sample, messages=[{"role": "user", "content": parts}], independent_turns=False, turn_kinds=())

    def count_tokens(self, conversations: Sequence[list[dict[str, Any]]], **options: Any) -> list[TokenCounts]:
        """Return the patches and tiles of the pictures of samples; of a file only the header is read."""
        return [self._count(messages, _tiling(options)) for messages in conversations]

    def _count(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> TokenCounts:
        sizes = [self.image_processor.image_size(picture, **options) for picture in _pictures(messages)]
        tiles = sum(self.image_processor.get_number_of_image_patches(*size, options) for size in sizes)
        return TokenCounts(self.patches * tiles, (self.patches - 1) * tiles, tiles)

    def read_tiles(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """
        Return the tiles (n, 3, h, w) uint8 of the pictures of each of some samples with the same options.

        Raises:
            BadSample: A picture cannot be read.
        """
        options = {"do_rescale": False, "do_normalize": False, **_tiling(samples[0].options)}
        pictures = [_pictures(sample.messages) for sample in samples]
        try:
            batch = self.image_processor([picture for own in pictures for picture in own], **options)
        except Exception as error:  # decoders raise nearly anything on a broken file
            raise BadSample(" ".join(str(error).split()) or type(error).__name__) from error
        counts = [int(own.sum()) for own in batch["num_tiles"].split([len(own) for own in pictures])]
        return [*batch["pixel_values"].to(torch.uint8).split(counts)]


def _pictures(messages: list[dict[str, Any]]) -> list[Any]:
    return [part["image"] for message in messages for part in message["content"]]


def _tiling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a source that are of the image processor; num_frames is of videos."""
    return {name: value for name, value in options.items() if name != "num_frames"}
