"""Pictures of visual tokens: principal components as colours, heat maps over an image, the tile grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw


# Colours of heat maps from low to high, ten steps each (matplotlib's viridis and inferno, CC0).
VIRIDIS = ("440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6dcd59", "b4de2c", "fde725")
INFERNO = ("000004", "1b0c42", "4b0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9a06", "f7d03c", "fcffa4")
LONGEST_SIDE = 1024  # pixels of a drawn image


@dataclass(frozen=True)
class PrincipalColours:
    """
    Colours of tokens: red, green and blue are their first three principal components, in one basis and one range.

    Attributes:
        mean: (D,) of the tokens that it was fitted to.
        directions: (D, 3), of unit length, the largest entry of each positive.
        low, high: (3,) components that get the levels 0 and 255: the 1% and 99% quantiles, so that a few outliers do
            not take the range of all others.
        shares: Share of the variance that each component has.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    shares: tuple[float, float, float]

    @classmethod
    def fit(cls, tokens: torch.Tensor) -> "PrincipalColours":
        """Return the colours for tokens (..., D); D is at least 3."""
        flat = tokens.flatten(0, -2).float()
        mean = flat.mean(0)
        flat = flat - mean
        variances, vectors = torch.linalg.eigh(flat.T @ flat)
        directions = vectors[:, -3:].flip(-1)
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        low, high = _quantiles(flat @ directions, (0.01, 0.99))
        shares = (variances[-3:].flip(0) / variances.sum().clamp_min(1e-30)).tolist()
        return cls(mean, directions, low, high, tuple(shares))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the colours (..., 3), uint8, of tokens (..., D)."""
        components = (tokens.float() - self.mean) @ self.directions
        levels = (components - self.low) / (self.high - self.low).clamp_min(1e-12)
        return (levels.clamp(0, 1) * 255).round().byte()


def _quantiles(values: torch.Tensor, shares: Sequence[float]) -> tuple[torch.Tensor, ...]:
    """Return quantiles over the rows of (n, k), for any n; torch.quantile takes at most 2^24 values."""
    return tuple(torch.from_numpy(np.quantile(values.numpy(), shares, axis=0)).float())


def stitch_tiles(tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Return (rows * R, columns * C, ...) of the whole image from (tiles, R, C, ...), without tiles after the grid.

    The tile of a 1 x 1 grid is the last of all; those before it are of the second grid of `msac`.
    """
    columns, rows = grid
    tiles = tiles[-1:] if columns * rows == 1 else tiles[: columns * rows]
    return rearrange(tiles, "(r k) y x ... -> (r y) (k x) ...", r=rows, k=columns)


def stitch_tokens(tokens: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """Return the patches (rows, columns, D) of the whole image from its tokens (tiles, N / f^2, f^2 * D)."""
    side = round(tokens.shape[1] ** 0.5)
    pattern = "t (y x) (p q d) -> t (y p) (x q) d"
    return stitch_tiles(rearrange(tokens, pattern, y=side, x=side, p=factor, q=factor), grid)


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
    patches = stitch_tokens(tokens, grid, factor)
    image = fit_image(image)
    colours = enlarge(PrincipalColours.fit(patches)(patches), image.size)
    return side_by_side([with_grid(image, grid), with_grid(colours, grid)])


def fit_image(image: Image.Image, longest: int = LONGEST_SIDE) -> Image.Image:
    """Return an image with at most `longest` and at least 16 pixels along a side."""
    image = image.copy()
    image.thumbnail((longest, longest))
    return image.resize((max(image.width, 16), max(image.height, 16)))


def enlarge(colours: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """Return colours (Y, X, 3), uint8, as an image of `size` pixels (width, height), each a rectangle."""
    return Image.fromarray(colours.numpy()).resize(size, Image.Resampling.NEAREST)


def side_by_side(images: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Return images in a row, their tops aligned, on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def sheet_of(images: Sequence[Image.Image], per_row: int, gap: int = 8) -> Image.Image:
    """Return images of one size in rows of `per_row`, on white."""
    (width, height), rows = images[0].size, -(-len(images) // per_row)
    size = (per_row * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % per_row * (width + gap), index // per_row * (height + gap)))
    return sheet


def colour_table(colours: Sequence[str]) -> torch.Tensor:
    """Return 256 colours (256, 3), uint8, interpolated between colours given as "rrggbb"."""
    steps = np.array([[*bytes.fromhex(colour)] for colour in colours], dtype=np.float64)
    at = np.linspace(0, len(steps) - 1, 256)
    table = np.stack([np.interp(at, np.arange(len(steps)), channel) for channel in steps.T], axis=1)
    return torch.from_numpy(table.round().astype(np.uint8))


def heat_colours(values: torch.Tensor, low: float, high: float, colours: Sequence[str]) -> torch.Tensor:
    """Return the colours (..., 3), uint8, of values (...): the first up to `low`, the last from `high` on."""
    levels = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1) * 255
    return colour_table(colours)[levels.round().long()]


def overlay(image: Image.Image, colours: torch.Tensor, opacity: float = 0.75) -> Image.Image:
    """Return colours (Y, X, 3), uint8, over the grey values of an image, at its size."""
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, enlarge(colours, image.size), opacity)


def with_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """Return an image with white lines between its tiles; `grid` is columns and rows."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    width = max(1, max(image.size) // 300)
    for axis, tiles in enumerate(grid):
        for line in range(1, tiles):
            at = line * image.size[axis] / tiles
            ends = ((at, 0), (at, image.height)) if axis == 0 else ((0, at), (image.width, at))
            draw.line(ends, fill="white", width=width)
    return image


def with_marker(image: Image.Image, x: float, y: float) -> Image.Image:
    """Return an image with a circle around a place, `x` and `y` in 0..1."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    radius = max(image.size) / 60
    centre = (x * image.width, y * image.height)
    for colour, width in (("black", 5), ("white", 3)):
        draw.circle(centre, radius, outline=colour, width=width)
    return image
