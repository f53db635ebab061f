# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a picture shows, drawn at random: scenes of objects, lines of text, bar charts, sums.

A description holds no pixels and no lengths in pixels: draw.py draws it at any size.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .vocabulary import CELLS, GRIDS, SEEN, WORDS, Look


HELD_OUT = 8  # one of so many descriptions is kept for validation and tests
MOST_BAR = 8  # height of the tallest bar, in units of its axis
MULTI_TILE = 0.04  # share of pictures of more than one tile
DARK = "dark"  # text in a colour on a dark ground; else dark text on paper
PAPER = "paper"


@dataclass(frozen=True)
class Item:
    """
    An object of a scene.

    Attributes:
        thing, colour, font: What is drawn.
        cell: Name of its cell; "" in a picture of one object, which may be anywhere.
        height: In 32nds of a tile.
        offset: Where it is in the free space of its cell, (x, y) from 0 to 1.
    """

    thing: str
    colour: str
    font: str
    cell: str
    height: int
    offset: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.thing}"


@dataclass(frozen=True)
class Scene:
    """Objects in the cells of a grid; `tiles` is (columns, rows), as for the other descriptions."""

    items: tuple[Item, ...]
    tiles: tuple[int, int] = (1, 1)

    @property
    def cells(self) -> tuple[str, ...]:
        return CELLS[GRIDS[self.tiles]]

    def at(self, cell: str) -> Item | None:
        return next((item for item in self.items if item.cell == cell), None)

    def count(self, colour: str | None = None, thing: str | None = None) -> int:
        """Return the number of objects of a colour, of a thing, or of both."""
        return sum(colour in (None, item.colour) and thing in (None, item.thing) for item in self.items)

    @property
    def key(self) -> str:
        """What two pictures must not share; of one object, of which there are few, with the layout."""
        if len(self.items) == 1:
            return repr(self.items[0])
        return ", ".join(sorted(f"{item.cell} {item.name}" for item in self.items))


@dataclass(frozen=True)
class Lines:
    """Lines of words and numbers, on paper or on a dark ground."""

    lines: tuple[str, ...]
    font: str
    ground: str
    colour: str
    tiles: tuple[int, int] = (1, 1)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True)
class Chart:
    """Bars: (colour, height from 1 to MOST_BAR)."""

    bars: tuple[tuple[str, int], ...]
    tiles: tuple[int, int] = (1, 1)

    @property
    def key(self) -> str:
        return ", ".join(f"{colour} {height}" for colour, height in self.bars)


@dataclass(frozen=True)
class Sum:
    """A written sum or difference, which is not negative: `12+7=`."""

    left: int
    sign: str
    right: int
    font: str
    ground: str
    colour: str
    tiles: tuple[int, int] = (1, 1)

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def text(self) -> str:
        return f"{self.left}{self.sign}{self.right}="

    @property
    def lines(self) -> tuple[str, ...]:
        return (self.text,)

    @property
    def key(self) -> str:
        return self.text


Picture = Scene | Lines | Chart | Sum


def is_held_out(key: str) -> bool:
    """Return whether a description belongs to validation and tests, never to training."""
    return zlib.crc32(key.encode()) % HELD_OUT == 0


def choose(make: Callable[[], Picture], held_out: bool) -> Picture:
    """Return the first description that belongs to training, or to validation."""
    while True:
        picture = make()
        if is_held_out(picture.key) == held_out:
            return picture


def choose_tiles(random: Random, grids: tuple[tuple[int, int], ...] = ((2, 1), (1, 2), (2, 2))) -> tuple[int, int]:
    """Return one tile, or for MULTI_TILE of the pictures one of the grids."""
    return random.choice(grids) if random.random() < MULTI_TILE else (1, 1)


def make_scene(
    random: Random, look: Look = SEEN, count: int | None = None, tiles: tuple[int, int] | None = None
) -> Scene:
    """
    Return a scene.

    Args:
        random: The source of randomness.
        look: What may be drawn.
        count: Objects. Default: 1 to 4 in one tile, more in a picture of several.
        tiles: Columns and rows of tiles. Default: at random. One object is always in one tile.
    """
    fewest = 1 if tiles in (None, (1, 1)) else 2
    tiles = tiles or choose_tiles(random)
    grid = GRIDS[tiles]
    cells = CELLS[grid]
    count = count or random.randint(fewest, min(len(cells), look.most_objects))
    if count == 1:
        return Scene((_make_item(random, look, "", look.single),), (1, 1))
    # Few colours make objects of one colour, so that counting them is a question.
    colours = random.sample(look.colours, random.randint(2, len(look.colours)))
    tallest = min(32 * tiles[0] // grid[0], 32 * tiles[1] // grid[1]) - 3
    heights = (tallest - 1, tallest)
    chosen = sorted(random.sample(range(len(cells)), count))
    return Scene(tuple(_make_item(random, look, cells[index], heights, colours) for index in chosen), tiles)


def _make_item(
    random: Random, look: Look, cell: str, heights: tuple[int, int], colours: list[str] | None = None
) -> Item:
    return Item(
        random.choice(look.things),
        random.choice(colours or look.colours),
        random.choice(look.fonts),
        cell,
        random.randint(*heights),
        (round(random.random(), 3), round(random.random(), 3)),
    )


def make_lines(random: Random, look: Look = SEEN) -> Lines:
    """Return lines of text: up to 3 lines of 5 characters in one tile, more in a picture of several."""
    tiles = choose_tiles(random)
    most = (3, 5)[tiles[1] - 1]
    lines = tuple(_make_line(random, 5 * tiles[0]) for _ in range(random.randint(1, most)))
    return Lines(lines, *_make_style(random, look), tiles)


def _make_line(random: Random, length: int) -> str:
    """Return words and numbers of at most `length` characters."""
    line = ""
    for _ in range(random.randint(1, 2) if length <= 5 else random.randint(1, 3)):
        word = random.choice(WORDS) if random.random() < 0.6 else str(random.randint(0, 999))
        longer = f"{line} {word}".strip()
        line = longer if len(longer) <= length else line
    return line or str(random.randint(0, 999))


def _make_style(random: Random, look: Look) -> tuple[str, str, str]:
    """Return font, ground and colour."""
    return random.choice(look.fonts), random.choice((DARK, PAPER)), random.choice(look.colours)


def make_chart(random: Random, look: Look = SEEN) -> Chart:
    """Return a chart of 2 to 4 bars of different colours and heights; up to 6 in a picture of two tiles."""
    tiles = choose_tiles(random, ((2, 1),))
    count = random.randint(2, min(2 + 2 * tiles[0], len(look.colours)))
    return Chart(tuple(zip(random.sample(look.colours, count), _heights(random, count), strict=True)), tiles)


def _heights(random: Random, count: int) -> list[int]:
    return random.sample(range(1, MOST_BAR + 1), count)


def make_sum(random: Random, look: Look = SEEN) -> Sum:
    """Return a sum or difference of a number up to 20 and one up to 9."""
    sign = random.choice("+-")
    left = random.randint(0, 20)
    right = random.randint(0, 9 if sign == "+" else min(9, left))
    return Sum(left, sign, right, *_make_style(random, look), choose_tiles(random, ((2, 1),)))
