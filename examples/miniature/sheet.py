# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws sheet.png, which README.md shows: python -m sailvit.examples.miniature.sheet OUT.png"""

import sys
from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
from PIL import Image

from .draw import draw_picture
from .pictures import Picture, make_chart, make_lines, make_scene, make_sum
from .vocabulary import LOOKS, Look


SIZE, ZOOM, COLUMNS, GAP = 32, 2, 8, 4
COLOURS = 64  # of the palette, which makes the file small
TILE = (1, 1)
ROWS: tuple[tuple[str, Callable[[Random, Look], Picture]], ...] = (
    ("seen", make_scene),
    ("seen", make_lines),
    ("seen", make_chart),
    ("seen", make_sum),
    ("unseen_letters", partial(make_scene, tiles=TILE)),
    ("unseen_font_colour", partial(make_scene, tiles=TILE)),
    ("large_letters", partial(make_scene, tiles=TILE)),
    ("clutter", partial(make_scene, tiles=TILE)),
)


def draw_sheet(seed: int = 0) -> Image.Image:
    """Return a row of pictures of one or two tiles for each subject and look."""
    rows = [_draw_row(index, *row, seed) for index, row in enumerate(ROWS)]
    sheet = Image.fromarray(np.concatenate(rows)).quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE)
    return sheet.resize((sheet.width * ZOOM, sheet.height * ZOOM), Image.Resampling.NEAREST)


def _draw_row(index: int, look: str, make: Callable[[Random, Look], Picture], seed: int) -> np.ndarray:
    width = COLUMNS * (SIZE + GAP) + GAP
    row = np.full((SIZE + GAP, width, 3), 255, np.uint8)
    left, number = GAP, 0
    while left < width - GAP:
        random = Random(f"{seed}/sheet/{index}/{number}")
        picture, number = make(random, LOOKS[look]), number + 1
        columns, rows = picture.tiles
        if rows > 1 or left + columns * SIZE > width - GAP:
            continue
        row[:SIZE, left : left + columns * SIZE] = draw_picture(picture, SIZE, random, LOOKS[look])
        left += columns * SIZE + GAP + (columns - 1) * GAP
    return row


if __name__ == "__main__":
    draw_sheet().save(sys.argv[1], optimize=True)
