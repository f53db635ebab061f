# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The figure of the demo: a picture, its tiles, its tokens as colours; another one, and answers about it."""

from collections.abc import Sequence
from textwrap import shorten

import torch
from PIL import Image, ImageDraw, ImageFont

from ...evaluate.pictures import PrincipalColours, enlarge, sheet_of, side_by_side, stitch_tokens
from .questions import Question


ZOOM = 5  # pixels of the figure for a pixel of the picture
GAP, SPACE, LINE, FONT_SIZE = 12, 36, 28, 18  # pixels: between tiles, between panels, of a line of text, of its letters
LONGEST_ANSWER = 60  # letters
INK, RIGHT, WRONG = "black", "#1a7f37", "#c0261e"


def draw_figure(
    picture: Image.Image,
    tokens: torch.Tensor,
    grid: tuple[int, int],
    asked: Image.Image,
    answers: Sequence[tuple[Question, str]],
) -> Image.Image:
    """
    Return a picture, its tiles, the first three principal components of its tokens as colours; below, answers about
    another picture.

    Args:
        picture: In RGB.
        tokens: (tiles, N / 4, 4 * D), as `get_image_features` returns them after the 2x2 pixel shuffle; a thumbnail is
            ignored.
        grid: Columns and rows of tiles.
        asked: The other picture, in RGB.
        answers: Questions about it, and what a model answered.
    """
    patches = stitch_tokens(tokens, grid, factor=2)
    large = picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST)
    colours = enlarge(PrincipalColours.fit(patches)(patches), large.size)
    panels = [
        with_title(large, f"picture, {picture.width} x {picture.height} pixels"),
        with_title(sheet_of(_cut(large, grid), grid[0], GAP), f"{grid[0] * grid[1]} tiles"),
        with_title(
            sheet_of(_cut(colours, grid), grid[0], GAP), f"{patches[..., 0].numel()} patches, 3 principal components"
        ),
    ]
    row = side_by_side(panels, SPACE)
    asked = asked.resize((asked.width * ZOOM, asked.height * ZOOM), Image.Resampling.NEAREST)
    top, left = row.height + SPACE, asked.width + SPACE
    figure = Image.new("RGB", (row.width + 2 * GAP, top + asked.height + GAP), "white")
    figure.paste(row, (GAP, GAP))
    figure.paste(asked, (GAP, top))
    for number, (question, answer) in enumerate(answers):
        _write(figure, GAP + left, top + LINE * number, _verdict(question, answer))
    return figure


def with_title(image: Image.Image, title: str) -> Image.Image:
    """Return an image with a line of text above."""
    panel = Image.new("RGB", (image.width, image.height + LINE), "white")
    panel.paste(image, (0, LINE))
    _write(panel, 0, 0, [(title, INK)])
    return panel


def _cut(image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """Return the tiles of an image, row by row."""
    width, height = image.width // grid[0], image.height // grid[1]
    corners = [(column * width, row * height) for row in range(grid[1]) for column in range(grid[0])]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def _verdict(question: Question, answer: str) -> list[tuple[str, str]]:
    """Return texts and their colours."""
    answer = shorten(answer, LONGEST_ANSWER, placeholder=" ...")
    if answer == question.assistant:
        return [(question.user, INK), (answer, RIGHT)]
    return [(question.user, INK), (answer, WRONG), (f"(right: {question.assistant})", INK)]


def _write(figure: Image.Image, left: int, top: int, texts: Sequence[tuple[str, str]]) -> None:
    """Write texts in a line, each in its colour."""
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(FONT_SIZE)
    for text, colour in texts:
        draw.text((left, top), text, fill=colour, font=font)
        left += round(draw.textlength(f"{text}  ", font=font))
