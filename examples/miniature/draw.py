# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Descriptions of pictures -> pixels, at any size: a tile of 32 pixels or of 448 shows the same."""

import struct
import zlib
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from .glyphs import draw_glyph, draw_line
from .pictures import MOST_BAR, PAPER, Chart, Item, Lines, Picture, Scene, Sum, choose, make_scene
from .vocabulary import COLOURS, GRIDS, SEEN, Look


UNITS = 32  # lengths are in 32nds of a tile
LONGEST_DASH = 8
REFERENCE = 64  # pixels of a character whose width is measured
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JITTER = 14  # of a colour, up or down in each channel


def draw_picture(picture: Picture, size: int, random: Random, look: Look = SEEN) -> np.ndarray:
    """
    Return a picture, (rows * size, columns * size, 3) uint8.

    Args:
        picture: What it shows.
        size: Pixels of a tile.
        random: Chooses what the description leaves open: ground, clutter, noise, exact colours.
        look: Its clutter and noise.
    """
    columns, rows = picture.tiles
    noise = np.random.Generator(np.random.PCG64(random.getrandbits(64)))
    canvas = noise.standard_normal((rows * size, columns * size, 3), np.float32)
    canvas *= look.noise
    paper = not isinstance(picture, Scene | Chart) and picture.ground == PAPER
    canvas += _ground(random, canvas.shape, paper)
    for _ in range(sum(random.randint(*look.clutter) for _ in range(columns * rows))):
        _draw_dash(canvas, random, size)
    if isinstance(picture, Scene):
        _draw_scene(canvas, picture, random, size)
    elif isinstance(picture, Chart):
        _draw_chart(canvas, picture, random, size)
    else:
        _draw_lines(canvas, picture, random, size)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def draw_scenes(size: int, count: int = 8, seed: int = 0) -> list[Image.Image]:
    """Return pictures of one tile of `size` pixels, of scenes that training never shows."""
    random = Random(seed)
    scenes = [choose(lambda: make_scene(random, tiles=(1, 1)), held_out=True) for _ in range(count)]
    return [Image.fromarray(draw_picture(scene, size, random)) for scene in scenes]


def encode_png(pixels: np.ndarray) -> bytes:
    """Return (H, W, 3) uint8 as the bytes of a PNG file; Pillow takes five times as long for a small one."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a row: its filter, 0 for none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_png_chunk(name, data) for name, data in chunks)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _ground(random: Random, shape: tuple[int, ...], paper: bool) -> np.ndarray:
    """Return a ground that is brighter at one end, (H, 1, 3) or (1, W, 3)."""
    base = random.randint(200, 240) if paper else random.randint(8, 55)
    colour = np.array([base + random.randint(-8, 8) for _ in range(3)], np.float32)
    ramp = np.linspace(0, random.randint(-25, 25), shape[0 if random.random() < 0.5 else 1], dtype=np.float32)
    return colour + (ramp[:, None, None] if len(ramp) == shape[0] else ramp[None, :, None])


def _paste(canvas: np.ndarray, mask: np.ndarray, left: int, top: int, colour: np.ndarray) -> None:
    """Blend a colour into the canvas where the mask is; what is outside of the canvas is cut off."""
    region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    part = mask[: region.shape[0], : region.shape[1], None] * np.float32(1 / 255)
    region += part * (colour - region)


def _colour(random: Random, name: str) -> np.ndarray:
    return np.array([value + random.randint(-JITTER, JITTER) for value in COLOURS[name]], np.float32)


def _draw_dash(canvas: np.ndarray, random: Random, size: int) -> None:
    """Draw a piece of clutter: a thin line in a muted colour."""
    unit = size / UNITS
    length = random.randint(3, LONGEST_DASH)
    mask = draw_line(random.randrange(8), round(length * unit), max(1, round(unit)))
    left, top = (
        int(random.random() * (side - min(side, own) + 1))
        for side, own in zip(canvas.shape[1::-1], mask.shape[::-1], strict=True)
    )
    region = canvas[top : top + 1, left : left + 1].mean((0, 1))
    _paste(canvas, mask, left, top, region + 0.3 * (_colour(random, random.choice([*COLOURS])) - region))


def _draw_scene(canvas: np.ndarray, scene: Scene, random: Random, size: int) -> None:
    for item in scene.items:
        left, top, right, bottom = find_cell(scene, item, size)
        mask = draw_glyph(item.thing, item.font, round(item.height * size / UNITS))
        x = left + round(item.offset[0] * max(0, right - left - mask.shape[1]))
        y = top + round(item.offset[1] * max(0, bottom - top - mask.shape[0]))
        _paste(canvas, mask, x, y, _colour(random, item.colour))


def find_cell(scene: Scene, item: Item, size: int) -> tuple[int, int, int, int]:
    """Return the box of an object's cell, without its border: left, top, right, bottom in pixels."""
    columns, rows = GRIDS[scene.tiles] if item.cell else (1, 1)
    column, row = (
        (scene.cells.index(item.cell) % columns, scene.cells.index(item.cell) // columns) if item.cell else (0, 0)
    )
    width, height = scene.tiles[0] * size / columns, scene.tiles[1] * size / rows
    border = size / UNITS
    edges = (column * width + border, row * height + border, (column + 1) * width - border, (row + 1) * height - border)
    return tuple(map(round, edges))


def _draw_chart(canvas: np.ndarray, chart: Chart, random: Random, size: int) -> None:
    unit = size / UNITS
    height, width = canvas.shape[:2]
    base = round(height - 2 * unit)
    canvas[base : base + max(1, round(unit)), round(unit) : round(width - unit)] = 130  # the axis
    step = (width - 2 * unit) / len(chart.bars)
    bar = min(step * random.uniform(0.5, 0.8), 10 * unit)
    for index, (colour, value) in enumerate(chart.bars):
        left = unit + (index + 0.5) * step - bar / 2
        top = round(base - value * (base - 2 * unit) / MOST_BAR)
        canvas[top:base, round(left) : round(left + bar)] = _colour(random, colour)


def _draw_lines(canvas: np.ndarray, picture: Lines | Sum, random: Random, size: int) -> None:
    """Draw lines of text as high as fits, up to 14 units, at a random place."""
    height, width = canvas.shape[:2]
    border = round(size / UNITS)
    row = (height - 2 * border) / len(picture.lines)
    pixels = _fit_text(picture, size, row, width - 2 * border)
    gap = (row - pixels) * 0.9
    left = border + random.random() * (
        width - 2 * border - max(text_width(line, picture.font, pixels) for line in picture.lines)
    )
    shift = random.random() * gap
    dark = np.array([random.randint(0, 60)] * 3, np.float32)
    colour = dark if picture.ground == PAPER else _colour(random, picture.colour)
    for index, line in enumerate(picture.lines):
        _write(canvas, line, picture.font, pixels, round(left), round(border + index * row + shift), colour)


def _fit_text(picture: Lines | Sum, size: int, row: float, width: int) -> int:
    """Return the height of characters, in pixels: a multiple of half a unit, so that few masks are drawn."""
    step = max(1, round(size / UNITS / 2))
    parts = max(text_width(line, picture.font, REFERENCE) for line in picture.lines) / REFERENCE
    most = min(row * 0.8, 14 * size / UNITS, width / parts + step)
    pixels = int(most // step) * step
    while max(text_width(line, picture.font, pixels) for line in picture.lines) > width:
        pixels -= step
    return pixels


def _write(canvas: np.ndarray, line: str, font: str, height: int, left: int, top: int, colour: np.ndarray) -> None:
    for character in line:
        if character == " ":
            left += _space(height)
            continue
        mask = draw_glyph(character, font, height)
        _paste(canvas, mask, left, top, colour)
        left += mask.shape[1] + _gap(height)


def _space(height: int) -> int:
    return max(2, round(height * 0.35))


def _gap(height: int) -> int:
    """Return the pixels between two characters."""
    return max(1, round(height * 0.12))


@lru_cache(maxsize=1 << 16)
def text_width(line: str, font: str, height: int) -> int:
    """Return the width of a line of text, in pixels; raises ValueError if the height is not positive."""
    if height < 1:
        raise ValueError(f"{line!r} does not fit into the picture: shorten the line")
    widths = [
        _space(height) if character == " " else draw_glyph(character, font, height).shape[1] + _gap(height)
        for character in line
    ]
    return sum(widths)
