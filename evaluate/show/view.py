"""One image as an encoder sees it: tokens, principal components, attention."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from ...devices import dtype_name
from ...image_processing_sailvit import SAILViTImageProcessor
from ..pictures import PrincipalColours, fit_image
from .attention import Attention, AttentionUnavailableError, plan_attention, record_attention
from .tiled_encoder import TiledEncoder


# Budgets in bytes before base64, which adds a third: with those of page.py together 7.1 million, a page below 10 MB.
ATTENTION_BYTES = 4_500_000
MEAN_ATTENTION_BYTES = 400_000
PICTURE_SIDE = 1344  # pixels


@dataclass(frozen=True)
class ShownImage:
    """
    An image as an encoder sees it; T tiles, the thumbnail last.

    Attributes:
        name: File name of the image.
        image: The image in RGB, reduced to the size that is drawn.
        size: Width and height of the image that was encoded, in pixels.
        grid: Columns and rows of tiles.
        tokens: (T, R, C, D) float32, one for each patch.
        attention: Of all blocks; None if the model has none to show.
        unavailable: Why there is no attention.
        facts: Settings of the encoder, by name.
    """

    name: str
    image: Image.Image
    size: tuple[int, int]
    grid: tuple[int, int]
    tokens: torch.Tensor
    attention: Attention | None
    unavailable: str
    facts: dict[str, str]

    @property
    def has_thumbnail(self) -> bool:
        return len(self.tokens) > self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Place:
    """A patch: its tile, its row and its column in the tile."""

    tile: int
    row: int
    column: int

    @classmethod
    def at(cls, shown: ShownImage, x: float, y: float) -> "Place":
        """Return the patch at a place of the image, `x` and `y` in 0..1."""
        (columns, rows), (high, wide) = shown.grid, shown.tokens.shape[1:3]
        column = min(int(x * columns * wide), columns * wide - 1)
        row = min(int(y * rows * high), rows * high - 1)
        return cls(row // high * columns + column // wide, row % high, column % wide)


def check_image(source: str) -> None:
    """Raise ValueError if the image of a path or URL cannot be read, before a model is loaded for it."""
    try:
        SAILViTImageProcessor().to_rgb_image(source)
    except ValueError as error:
        raise ValueError(f"{source[:200]}: {str(error).removeprefix('image: ')}") from error


def show_image(
    encoder: TiledEncoder, source: str, blocks: Sequence[int] = (), log: Callable[[str], None] = lambda line: None
) -> ShownImage:
    """
    Encode an image and record the attention.

    Args:
        encoder: As returned by `load_tiled_encoder`.
        source: Path or URL of the image.
        blocks: Indices of the blocks whose attention is shown by query; by default as many as fit, evenly spaced.
        log: Called with a line if the model has no attention weights.

    Raises:
        ValueError: The image cannot be read, a block does not exist, or the tokens are not finite.
    """
    batch = encoder.processor(source)
    tiles, grid = batch["pixel_values"], tuple(batch["tile_grids"][0].tolist())
    plan = plan_attention(
        encoder.blocks, encoder.heads, len(tiles), encoder.patches, ATTENTION_BYTES, MEAN_ATTENTION_BYTES, blocks
    )
    attention, unavailable = None, ""
    try:
        tokens, attention = record_attention(encoder.model, tiles, encoder.patches, plan, encoder.encode)
    except AttentionUnavailableError as error:
        unavailable = f"No attention: {error}."
        log(unavailable)
        tokens = torch.cat([encoder.encode(tile[None]) for tile in tiles])
    if not tokens.isfinite().all():
        raise ValueError(f"{source}: tokens of {encoder.name} are NaN or infinite: try --dtype float32")
    image = encoder.processor.to_rgb_image(source)
    tokens = tokens.unflatten(1, encoder.patches)
    facts = _describe(encoder, grid, tokens)
    picture = fit_image(image, PICTURE_SIDE)
    return ShownImage(Path(source).name, picture, image.size, grid, tokens, attention, unavailable, facts)


def _describe(encoder: TiledEncoder, grid: tuple[int, int], tokens: torch.Tensor) -> dict[str, str]:
    config, (columns, rows) = encoder.model.config, grid
    height, width = (encoder.processor.size[side] for side in ("height", "width"))
    thumbnail = " and a thumbnail" if len(tokens) > columns * rows else ""
    norm = encoder.processor.image_mean, encoder.processor.image_std
    mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in norm)
    layer = "after the final norm" if encoder.layer == -1 else f"hidden_states[{encoder.layer}]"
    return {
        "Encoder": f"{encoder.name} ({config.model_type}), {encoder.blocks} blocks of {encoder.heads} heads",
        "Tiles": f"{columns} x {rows} of {width} x {height} pixels{thumbnail}; mean {mean}, std {std}",
        "Tokens": f"{tokens[..., 0].numel():,} of width {tokens.shape[-1]:,}, {layer}",
        "Computed": f"in {dtype_name(encoder.model.dtype)} on {encoder.model.device.type}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}",
    }


def relative_place(shown: ShownImage, pixel: Sequence[float] | None) -> tuple[float, float]:
    """
    Return a place, x and y in 0..1, of a pixel (x, y) of the image that was encoded; the middle if it is None.

    Raises:
        ValueError: The pixel is outside of the image.
    """
    if pixel is None:
        return 0.5, 0.5
    (x, y), (width, height) = pixel, shown.size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"--at {x:g} {y:g}: expected a pixel of the image, which is {width} x {height}")
    return x / width, y / height


def principal_colours(shown: ShownImage) -> tuple[torch.Tensor, PrincipalColours]:
    """Return the colours (T, R, C, 3) of unit tokens, in one basis and range over all tiles, and that basis."""
    unit = F.normalize(shown.tokens, dim=-1)
    colours = PrincipalColours.fit(unit)
    return colours(unit), colours
