"""Show what an encoder makes of one image: a self-contained HTML page, or PNGs."""

import base64
import io
import json
import os
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..devices import dtype_name
from .attention import Attention, AttentionUnavailableError, expand_regions, plan_attention, record_attention
from .pictures import (
    INFERNO,
    VIRIDIS,
    PrincipalColours,
    enlarge,
    fit_image,
    heat_colours,
    overlay,
    sheet_of,
    side_by_side,
    stitch_tiles,
    with_grid,
    with_marker,
)
from .tiled_encoder import TiledEncoder


TEMPLATES = Path(__file__).parent / "templates"
# Budgets in bytes before base64, which adds a third: together 7.1 million, a page below 10 MB.
ATTENTION_BYTES = 4_500_000
MEAN_ATTENTION_BYTES = 400_000
TOKEN_BYTES = 1_600_000
PICTURE_BYTES = 600_000
PICTURE_SIDE = 1344  # pixels
MOST_DIRECTIONS = 256  # of the tokens in the page
CHECKED_TOKENS = 128  # whose cosine similarities are compared with the exact ones


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


def cosine_map(shown: ShownImage, place: Place) -> torch.Tensor:
    """Return the cosine similarity (T, R, C) of the token at a place to all tokens."""
    unit = F.normalize(shown.tokens, dim=-1)
    return unit @ unit[place.tile, place.row, place.column]


# The data of the page


@dataclass(frozen=True)
class ReducedTokens:
    """
    Unit tokens in their first principal directions, without centring, as int8: enough for cosine similarities.

    Attributes:
        codes: (T, R, C, k) int8.
        scales: (k,) float32: component = code * scale.
        error: Largest error of a cosine similarity, over some tokens and all others.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    error: float


def reduce_tokens(tokens: torch.Tensor) -> ReducedTokens:
    """Reduce tokens (T, R, C, D) to TOKEN_BYTES at most."""
    unit = F.normalize(tokens.flatten(0, 2), dim=-1)
    count = max(min(unit.shape[1], MOST_DIRECTIONS, TOKEN_BYTES // len(unit)), 1)
    directions = torch.linalg.eigh(unit.T @ unit).eigenvectors[:, -count:].flip(-1)
    components = unit @ directions
    scales = components.abs().amax(0).clamp_min(1e-12) / 127
    codes = (components / scales).round().to(torch.int8)
    reduced = F.normalize(codes * scales, dim=-1)
    some = torch.linspace(0, len(unit) - 1, min(CHECKED_TOKENS, len(unit))).long()
    error = (reduced[some] @ reduced.T - unit[some] @ unit.T).abs().max().item()
    return ReducedTokens(codes.unflatten(0, tokens.shape[:3]), scales, error)


def quantize_weights(weights: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return codes, uint8, and scales, float32: weight = scale * (code / 255)^2, which keeps small weights apart.

    Args:
        weights: (..., K), not negative.
        dims: Number of leading dimensions that have scales of their own.
    """
    scales = weights.flatten(dims).amax(-1)
    shares = weights / scales.clamp_min(1e-30).reshape(*scales.shape, *[1] * (weights.ndim - dims))
    return (shares.sqrt() * 255).round().byte(), scales


def _pack(*arrays: torch.Tensor) -> str:
    """Return arrays, one after the other, compressed, in base64."""
    data = b"".join(np.ascontiguousarray(array.numpy()).tobytes() for array in arrays)
    return base64.b64encode(zlib.compress(data)).decode()


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image as a data URL, in a format and with options of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _photo_url(image: Image.Image) -> str:
    """Return a JPEG of at most PICTURE_BYTES, of the best quality that fits."""
    for quality in (90, 80, 65, 50):
        url = data_url(image, "JPEG", quality=quality)
        if len(url) * 3 // 4 <= PICTURE_BYTES:
            break
    return url


def _attention_facts(attention: Attention) -> dict[str, Any]:
    plan = attention.plan
    return {
        "total": plan.total,
        "heads": attention.mean.shape[2],
        "blocks": plan.blocks,
        "querySide": plan.query_side,
        "keySide": plan.key_side,
        "meanSide": plan.mean_side,
        "distance": [[round(value, 2) for value in block] for block in attention.distance.tolist()],
    }


def _attention_data(attention: Attention) -> dict[str, str]:
    """Return the name of each blob -> scales, then codes."""
    codes, scales = quantize_weights(attention.mean.transpose(1, 2), dims=2)
    data = {"mean": _pack(scales, codes)}  #
    for block, weights in attention.by_query.items():
        codes, scales = quantize_weights(weights, dims=3)
        data[f"block-{block}"] = _pack(scales, codes)  # (T, h, Q), (T, h, Q, K)
    return data


def _reductions(shown: ShownImage, tokens: ReducedTokens) -> list[str]:
    """Return sentences on what the page does not keep exactly."""
    kept, width = tokens.codes.shape[-1], shown.tokens.shape[-1]
    lines = [
        f"The picture is a JPEG of {shown.image.width} x {shown.image.height} pixels; the encoder read "
        f"{shown.size[0]} x {shown.size[1]}.",
        f"Similarity uses {kept} of {width:,} directions of the tokens, in 8 bits: cosines differ by at most "
        f"{tokens.error:.3f} from exact ones ({CHECKED_TOKENS} tokens compared with all).",
        "Colours of the components: 1% of the tokens at either end of each component have the colour of the end.",
    ]
    if (attention := shown.attention) is None:
        return [*lines, shown.unavailable]
    plan, blocks = attention.plan, ", ".join(str(block + 1) for block in attention.plan.blocks)
    lines += [
        f"Attention by query is kept of blocks {blocks} of {plan.total} (--blocks chooses others): averaged over "
        f"queries of {_square(plan.query_side)}, summed over keys of {_square(plan.key_side)}, in 8 bits.",
        f"Attention averaged over all queries is kept of every block and head, in squares of "
        f"{_square(plan.mean_side)}. A tile attends to itself only.",
    ]
    if attention.elsewhere:
        share = f"{attention.elsewhere:.0%}"
        lines.append(f"Class token and registers are left out: a patch pays them up to {share} of its attention.")
    return lines


def _square(side: int) -> str:
    return "1 patch" if side == 1 else f"{side} x {side} patches"


def page(shown: ShownImage, at: tuple[float, float] = (0.5, 0.5), command: str = "") -> str:
    """
    Return the HTML page of an image: self-contained, without a request to a network, below 10 MB.

    Args:
        shown: As returned by `show_image`.
        at: Place that is shown first, x and y in 0..1.
        command: The command that writes the page, for its footer.
    """
    colours, tokens = _principal_colours(shown), reduce_tokens(shown.tokens)
    place, patches = Place.at(shown, *at), shown.tokens.shape[1:3]
    components = [stitch_tiles(colours[0], shown.grid), *([colours[0][-1]] if shown.has_thumbnail else [])]
    facts = {
        "grid": shown.grid,
        "thumbnail": shown.has_thumbnail,
        "patches": tuple(patches),
        "size": shown.size,
        "place": [place.tile, place.row, place.column],
        "scales": tokens.scales.tolist(),
        "viridis": VIRIDIS,
        "inferno": INFERNO,
        "attention": None if shown.attention is None else _attention_facts(shown.attention),
    }
    blobs = {"tokens": _pack(tokens.codes)} | ({} if shown.attention is None else _attention_data(shown.attention))
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("show.html").render(
        shown=shown,
        facts=Markup(json.dumps(facts).replace("<", "\\u003c")),
        blobs=blobs,
        picture=_photo_url(shown.image),
        components=[data_url(Image.fromarray(each.numpy()), "PNG", optimize=True) for each in components],
        shares=colours[1].shares,
        reductions=_reductions(shown, tokens),
        command=command,
        style=read_style("show.css"),
        script=Markup((TEMPLATES / "show.js").read_text(encoding="utf-8")),
    )


def read_style(name: str) -> Markup:
    """Return the CSS that all pages have, and that of one."""
    return Markup("".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("page.css", name)))


def _principal_colours(shown: ShownImage) -> tuple[torch.Tensor, PrincipalColours]:
    """Return the colours (T, R, C, 3) of unit tokens, in one basis and range over all tiles, and that basis."""
    unit = F.normalize(shown.tokens, dim=-1)
    colours = PrincipalColours.fit(unit)
    return colours(unit), colours


# PNGs


def draw_pngs(shown: ShownImage, at: tuple[float, float] = (0.5, 0.5)) -> dict[str, Image.Image]:
    """
    Return the pictures of the page by name, for one place: picture, components, similarity, and of each block whose
    attention is kept by query the heads; heads averaged over queries.

    Args:
        shown: As returned by `show_image`.
        at: Place whose similarity and attention are drawn, x and y in 0..1.
    """
    place, colours = Place.at(shown, *at), _principal_colours(shown)[0]
    similarity = cosine_map(shown, place)
    low, high = np.quantile(similarity.numpy(), (0.02, 0.995))
    heat = heat_colours(similarity, low, high, VIRIDIS)
    drawn = {
        "picture": with_marker(with_grid(shown.image, shown.grid), *at),
        "components": _with_thumbnail(shown, colours),
        "similarity": _with_thumbnail(shown, heat, at),
    }
    if shown.attention is not None:
        drawn |= {
            f"attention-block-{block + 1}": _draw_heads(shown, place, block) for block in shown.attention.by_query
        }
        drawn["attention-mean"] = _draw_all_heads(shown)
    return drawn


def _with_thumbnail(shown: ShownImage, colours: torch.Tensor, at: tuple[float, float] | None = None) -> Image.Image:
    """Draw colours (T, R, C, 3) of all tiles, over the image if a place is marked; the thumbnail tile beside."""
    whole = stitch_tiles(colours, shown.grid)
    main = overlay(shown.image, whole) if at else enlarge(whole, shown.image.size)
    main = with_grid(main, shown.grid)
    images = [with_marker(main, *at) if at else main]
    if shown.has_thumbnail:
        side = max(min(shown.image.size) // 3, 64)
        images.append(enlarge(colours[-1], (side, side)))
    return side_by_side(images)


def _draw_heads(shown: ShownImage, place: Place, block: int, side: int = 224) -> Image.Image:
    """Draw the attention of the query at a place over its tile, by each head of a block in the order of the heads."""
    patches, plan = tuple(shown.tokens.shape[1:3]), shown.attention.plan
    across = -(-patches[1] // plan.query_side)
    query = place.row // plan.query_side * across + place.column // plan.query_side
    maps = expand_regions(shown.attention.by_query[block][place.tile, :, query], patches, plan.key_side)
    tile = _crop_tile(shown, place.tile).resize((side, side))
    marked = (place.column + 0.5) / patches[1], (place.row + 0.5) / patches[0]
    drawn = [with_marker(overlay(tile, _attention_colours(head)), *marked) for head in maps]
    return sheet_of(drawn, per_row=min(8, len(drawn)))


def _attention_colours(weights: torch.Tensor) -> torch.Tensor:
    """Return the colours of attention weights, from their smallest to their largest by the square root."""
    roots = weights.sqrt()
    return heat_colours(roots, roots.min().item(), roots.max().item(), INFERNO)


def _crop_tile(shown: ShownImage, tile: int) -> Image.Image:
    (columns, rows), (width, height) = shown.grid, shown.image.size
    if tile >= columns * rows:
        return shown.image
    column, row = tile % columns, tile // columns
    box = (column * width / columns, row * height / rows, (column + 1) * width / columns, (row + 1) * height / rows)
    return shown.image.crop(tuple(round(edge) for edge in box))


def _draw_all_heads(shown: ShownImage, longest: int = 96) -> Image.Image:
    """Draw the attention averaged over queries, over the whole image: a row for each block, a column for each head."""
    mean, plan = shown.attention.mean, shown.attention.plan
    size = fit_image(shown.image, longest).size
    drawn = []
    for block in expand_regions(mean, tuple(shown.tokens.shape[1:3]), plan.mean_side):  # (T, h, R, C)
        for head in block.transpose(0, 1):
            drawn.append(enlarge(_attention_colours(stitch_tiles(head, shown.grid)), size))
    return sheet_of(drawn, per_row=mean.shape[2], gap=4)


# Files


def check_outputs(source: str, out: Path, folder: Path | None = None, overwrite: bool = False) -> None:
    """
    Check, before anything is encoded, that the page and a folder of PNGs can be written.

    Raises:
        ValueError: `out` is the image, exists and is not to be overwritten, or is no .html file in a folder that
            exists; or `folder` is a file, or has files that are not to be overwritten.
    """
    if out.suffix.lower() not in (".html", ".htm") or not out.parent.is_dir():
        raise ValueError(f"--out {out}: expected a .html file in a folder that exists")
    is_source = out.exists() and Path(source).exists() and out.samefile(source)
    if is_source or (out.exists() and not overwrite):
        raise ValueError(f"--out {out} exists: name another file, or give --overwrite if it is not the image")
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--png {folder} is a file: expected a folder")
    if any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--png {folder} has files: name another folder, or give --overwrite")


def write_outputs(html: str, out: Path, pngs: Mapping[str, Image.Image], folder: Path | None = None) -> Iterator[Path]:
    """Write the page and the PNGs, each atomically; yield the path of each."""
    yield write_file(html.encode(), out)
    for name, image in pngs.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        folder.mkdir(parents=True, exist_ok=True)
        yield write_file(buffer.getvalue(), folder / f"{name}.png")


def write_file(data: bytes, path: Path) -> Path:
    """Write a file that appears complete or not at all; return its path."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)
