"""Draws what a tower sees: a picture with its tile grid, and beside it its tokens as colours."""

import torch
from einops import rearrange
from PIL import Image, ImageDraw


def draw_tokens(picture: Image.Image, tokens: torch.Tensor, grid: tuple[int, int], factor: int = 2) -> Image.Image:
    """
    The picture with its tile grid, and the first three principal components of its tokens over the whole of it.

    Args:
        picture: The image that was encoded, in RGB.
        tokens: (tiles, N / f^2, f^2 * D) of square tiles, as `get_image_features` returns them, the thumbnail left out.
        grid: Columns and rows of tiles.
        factor: The pixel shuffle factor f of the tokens.

    Returns:
        An RGB image, the two side by side, at the size of the picture (at most 1,024 pixels along a side).
    """
    picture = picture.copy()
    picture.thumbnail((1024, 1024))
    picture = picture.resize((max(picture.width, 16), max(picture.height, 16)))
    colours = principal_colours(stitch_tokens(tokens, grid, factor)).resize(picture.size, Image.Resampling.NEAREST)
    gap = 16
    sheet = Image.new("RGB", (2 * picture.width + gap, picture.height), "white")
    sheet.paste(_with_grid(picture, grid), (0, 0))
    sheet.paste(_with_grid(colours, grid), (picture.width + gap, 0))
    return sheet


def stitch_tokens(tokens: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """Tiles of shuffled tokens (tiles, N / f^2, f^2 * D) -> the patches of the whole image (rows, columns, D)."""
    columns, rows = grid
    tiles = tokens[: columns * rows]
    side = round(tiles.shape[1] ** 0.5)
    pattern = "(r k) (y x) (p q d) -> (r y p) (k x q) d"
    return rearrange(tiles, pattern, r=rows, k=columns, y=side, x=side, p=factor, q=factor)


def principal_colours(tokens: torch.Tensor) -> Image.Image:
    """Tokens (Y, X, D) -> an image of X x Y pixels, its channels the first three principal components, 1% clipped."""
    flat = rearrange(tokens, "y x d -> (y x) d").float()
    flat = flat - flat.mean(0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(-1)
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    components = flat @ (directions * signs)
    low, high = torch.quantile(components, torch.tensor([0.01, 0.99]), dim=0)
    levels = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return Image.fromarray(levels.round().byte().reshape(*tokens.shape[:2], 3).numpy())


def _with_grid(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    width = max(1, max(picture.size) // 300)
    for axis, tiles in enumerate(grid):
        for line in range(1, tiles):
            at = line * picture.size[axis] / tiles
            ends = ((at, 0), (at, picture.height)) if axis == 0 else ((0, at), (picture.width, at))
            draw.line(ends, fill="white", width=width)
    return picture
