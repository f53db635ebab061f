"""Figures of visual tokens: an image with its tile grid, next to the principal components of its tokens as colours."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw

from ..image_processing_sailvit import SAILViTImageProcessor
from .stream import EncodedImage


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_figure(figure: Path, sources: Sequence[str], overwrite: bool = False, resume: bool = False) -> None:
    """
    Check, before anything is encoded, that a figure can be written.

    Raises:
        ValueError: `sources` is not one image, `figure` is that image, or exists and is not to be overwritten, or has
            another suffix or no folder; or `resume` is set, with which the image might not be encoded.
    """
    if len(sources) != 1:
        raise ValueError(f"--figure draws one image, got {len(sources)}")
    if resume:
        raise ValueError("--figure draws an image when it is encoded: leave out --resume, which may skip it")
    if figure.suffix.lower() not in SUFFIXES or not figure.parent.is_dir():
        raise ValueError(f"--figure {figure}: expected a {', '.join(SUFFIXES)} file in a folder that exists")
    is_source = figure.exists() and Path(sources[0]).exists() and figure.samefile(sources[0])
    if is_source or (figure.exists() and not overwrite):
        raise ValueError(f"--figure {figure} exists: name another file, or give --overwrite if it is not the image")


def draw_encoded(encoded: EncodedImage, processor: SAILViTImageProcessor, factor: int) -> Image.Image:
    """Return the figure of `draw_tokens` for an encoded image, which the processor reads again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its first reading are in encoded.warnings
        image = processor.to_rgb_image(encoded.source)
    return draw_tokens(image, encoded.tokens, encoded.grid, factor)


def draw_tokens(image: Image.Image, tokens: torch.Tensor, grid: tuple[int, int], factor: int = 2) -> Image.Image:
    """
    Return an image with its tile grid, next to the first three principal components of its tokens as colours.

    Args:
        image: The image that was encoded, in RGB.
        tokens: (tiles, N / f^2, f^2 * D) of square tiles, as `get_image_features` returns them; a thumbnail is ignored.
        grid: Columns and rows of tiles.
        factor: The pixel shuffle factor f of the tokens.

    Returns:
        An RGB image of both, each at the size of the image (at most 1,024 pixels along a side).
    """
    image = image.copy()
    image.thumbnail((1024, 1024))
    image = image.resize((max(image.width, 16), max(image.height, 16)))
    colours = principal_colours(stitch_tokens(tokens, grid, factor)).resize(image.size, Image.Resampling.NEAREST)
    gap = 16
    sheet = Image.new("RGB", (2 * image.width + gap, image.height), "white")
    sheet.paste(_with_grid(image, grid), (0, 0))
    sheet.paste(_with_grid(colours, grid), (image.width + gap, 0))
    return sheet


def stitch_tokens(tokens: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """Return the patches (rows, columns, D) of the whole image from its tokens (tiles, N / f^2, f^2 * D)."""
    columns, rows = grid
    tiles = tokens[: columns * rows]
    side = round(tiles.shape[1] ** 0.5)
    pattern = "(r k) (y x) (p q d) -> (r y p) (k x q) d"
    return rearrange(tiles, pattern, r=rows, k=columns, y=side, x=side, p=factor, q=factor)


def principal_colours(tokens: torch.Tensor) -> Image.Image:
    """Return tokens (Y, X, D) as an image of X x Y pixels: RGB are the first three principal components, 1% clipped."""
    flat = rearrange(tokens, "y x d -> (y x) d").float()
    flat = flat - flat.mean(0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(-1)
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    components = flat @ (directions * signs)
    low, high = torch.quantile(components, torch.tensor([0.01, 0.99]), dim=0)
    levels = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return Image.fromarray(levels.round().byte().reshape(*tokens.shape[:2], 3).numpy())


def _with_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    width = max(1, max(image.size) // 300)
    for axis, tiles in enumerate(grid):
        for line in range(1, tiles):
            at = line * image.size[axis] / tiles
            ends = ((at, 0), (at, image.height)) if axis == 0 else ((0, at), (image.width, at))
            draw.line(ends, fill="white", width=width)
    return image
