# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Digits, letters, signs and shapes as strokes (glyphs.txt), and the fonts that draw them at any size.

A mask is the coverage of every pixel, from distances to the strokes; it needs no font files and no other library.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np


COLUMNS, ROWS = 4, 6  # intervals of the grid of glyphs.txt
STEPS = 5  # straight pieces of a rounded corner
POINT = re.compile(r"([a-e])([1-7])")
STROKE = re.compile(r"[a-e][1-7](?:[-~][a-e][1-7])+")


@dataclass(frozen=True)
class Font:
    """
    How strokes are drawn. Lengths are parts of the glyph's height.

    Attributes:
        weight: Thickness of the strokes.
        slant: How far the top is right of the bottom.
        width: Factor on the width of the grid.
        serif: Length of the bars at free ends; 0 for none.
        rounded: Draw the rounded corners of glyphs.txt round.
    """

    weight: float = 0.12
    slant: float = 0.0
    width: float = 1.0
    serif: float = 0.0
    rounded: bool = True


FONTS = {
    "plain": Font(),
    "bold": Font(weight=0.19),
    "italic": Font(slant=0.22),
    "serif": Font(weight=0.12, serif=0.2, width=1.05),
    "angular": Font(weight=0.14, slant=-0.2, width=1.2, rounded=False),
}


@dataclass(frozen=True)
class Stroke:
    """A line of a glyph: (x, y) on the grid, and which of the points are rounded corners."""

    points: tuple[tuple[int, int], ...]
    is_round: tuple[bool, ...]

    @property
    def is_closed(self) -> bool:
        return self.points[0] == self.points[-1]


@dataclass(frozen=True)
class Glyph:
    """The strokes of a glyph; `filled`: their inside is drawn."""

    strokes: tuple[Stroke, ...]
    filled: bool


def parse_glyphs(text: str) -> dict[str, Glyph]:
    """
    Return the glyphs of a text in the format of glyphs.txt.

    Raises:
        ValueError: A line is in another format, or names a glyph again.
    """
    glyphs: dict[str, Glyph] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] == "#":
            continue
        name, filled = fields[0], fields[1:2] == ["fill"]
        strokes = fields[2:] if filled else fields[1:]
        if name in glyphs or not strokes or not all(map(STROKE.fullmatch, strokes)):
            what = "is given twice" if name in glyphs else "expected strokes such as a7-c1~e1"
            raise ValueError(f"line {number}: glyph {name}: {what}, got {line.strip()!r}")
        glyphs[name] = Glyph(tuple(map(_parse_stroke, strokes)), filled)
    return glyphs


def _parse_stroke(text: str) -> Stroke:
    points = tuple((ord(column) - ord("a"), int(row) - 1) for column, row in POINT.findall(text))
    joints = re.findall("[-~]", text)
    is_round = (False, *(before == after == "~" for before, after in pairwise(joints)), False)
    return Stroke(points, is_round)


@lru_cache(maxsize=1)
def load_glyphs() -> dict[str, Glyph]:
    """Return the glyphs of glyphs.txt."""
    return parse_glyphs((Path(__file__).parent / "glyphs.txt").read_text("utf-8"))


def flatten(stroke: Stroke, rounded: bool) -> np.ndarray:
    """Return the straight pieces of a stroke as their end points (pieces + 1, 2); a rounded corner is a parabola."""
    points = np.array(stroke.points, np.float64)
    if not rounded:
        return points
    line = [points[0]]
    for index in range(1, len(points) - 1):
        if not stroke.is_round[index]:
            line.append(points[index])
            continue
        ends = [
            (points[index] + points[near]) / 2 if stroke.is_round[near] else points[near]
            for near in (index - 1, index + 1)
        ]
        for t in np.linspace(0, 1, STEPS + 1):
            line.append((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * points[index] + t**2 * ends[1])
    return np.array([*line, points[-1]])


@lru_cache(maxsize=4096)
def draw_glyph(name: str, font: str, height: int) -> np.ndarray:
    """
    Return the coverage of a glyph, (height, width) uint8, 255 inside; as narrow as the glyph is.

    Args:
        name: A glyph of glyphs.txt.
        font: A key of FONTS; shapes are the same in all of them.
        height: In pixels; that of the tallest glyphs, signs and shapes have empty rows.
    """
    glyph = load_glyphs()[name]
    style = Font(weight=0) if glyph.filled else FONTS[font]
    margin = style.weight * height / 2
    scale = (height - 2 * margin) / ROWS  # pixels of a row of the grid
    lines = [_place(flatten(stroke, style.rounded), style, scale, margin) for stroke in glyph.strokes]
    serif = style.serif * height / 2 if name.isalnum() else 0.0
    left = min(line[:, 0].min() for line in lines) - margin - serif
    right = max(line[:, 0].max() for line in lines) + margin + serif
    grid = np.stack(np.meshgrid(np.arange(int(np.ceil(right - left))) + left + 0.5, np.arange(height) + 0.5), -1)
    if glyph.filled:
        coverage = np.max([_fill(line, grid) for line in lines], 0)
    else:
        lines += _serifs(glyph, lines, serif)
        coverage = np.max([0.5 + margin - _distance(line, grid, margin + 1) for line in lines], 0)
    mask = (np.clip(coverage, 0, 1) * 255).round().astype(np.uint8)
    columns = np.flatnonzero(mask.any(0))
    mask = np.ascontiguousarray(mask[:, columns[0] : columns[-1] + 1])
    mask.flags.writeable = False
    return mask


def _place(line: np.ndarray, style: Font, scale: float, margin: float) -> np.ndarray:
    """Move points from the grid to pixels: widened, slanted, below the margin."""
    x, y = line[:, 0] * style.width, line[:, 1]
    return np.stack([(x + style.slant * (ROWS - y)) * scale, y * scale + margin], 1)


def _serifs(glyph: Glyph, lines: list[np.ndarray], length: float) -> list[np.ndarray]:
    """Return horizontal bars at the free ends of strokes that are not horizontal there."""
    bars = []
    for stroke, line in zip(glyph.strokes, lines, strict=True):
        for end, near in () if stroke.is_closed or not length else ((line[0], line[1]), (line[-1], line[-2])):
            if abs(end[1] - near[1]) > abs(end[0] - near[0]) / 2:
                bars.append(np.array([[end[0] - length, end[1]], [end[0] + length, end[1]]]))
    return bars


def _distance(line: np.ndarray, grid: np.ndarray, reach: float) -> np.ndarray:
    """Return the distance of pixels (height, width, 2) from a line of several pieces; infinite beyond the reach."""
    squared = np.full(grid.shape[:2], np.inf)
    corner = grid[0, 0]
    for start, end in pairwise(line):
        first = np.floor(np.minimum(start, end) - reach - corner).astype(int).clip(0)
        last = np.ceil(np.maximum(start, end) + reach - corner).astype(int).clip(0) + 1
        box = (slice(first[1], last[1]), slice(first[0], last[0]))
        along, offset = end - start, grid[box] - start
        length = max((along**2).sum(), 1e-9)
        part = np.clip((offset @ along) / length, 0, 1)[..., None]
        squared[box] = np.minimum(squared[box], ((offset - part * along) ** 2).sum(-1))
    return np.sqrt(squared)


def _fill(line: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the coverage inside of an outline: by its distance, positive inside (even-odd rule)."""
    x, y = grid[..., 0], grid[..., 1]
    inside = np.zeros(grid.shape[:2], bool)
    for (x0, y0), (x1, y1) in pairwise(line):
        if y0 != y1:
            crosses = (y < y0) != (y < y1)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return 0.5 + np.where(inside, 1, -1) * _distance(line, grid, 1)


@lru_cache(maxsize=4096)
def draw_line(direction: int, length: int, thickness: int) -> np.ndarray:
    """Return the coverage of a straight line, (height, width) uint8, in one of eight directions over half a turn."""
    angle = np.pi * direction / 8
    end = length * np.array([np.cos(angle), np.sin(angle)])
    line = np.stack([np.zeros(2), end]) - np.minimum(end, 0) + thickness / 2
    width, height = np.ceil(np.abs(end) + thickness).astype(int)
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
    coverage = np.clip(0.5 + thickness / 2 - _distance(line, grid, thickness / 2 + 1), 0, 1)
    return (coverage * 255).round().astype(np.uint8)
