"""The pictures of an image as PNGs, and the files of the command."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pages import check_writable, write_files
from ..pictures import (
    INFERNO,
    VIRIDIS,
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
from .attention import expand_regions
from .view import Place, ShownImage, principal_colours


def draw_pngs(shown: ShownImage, at: tuple[float, float] = (0.5, 0.5)) -> dict[str, Image.Image]:
    """
    Return the pictures of the page by name, for one place: picture, components, similarity, and of each block whose
    attention is kept by query the heads; heads averaged over queries.

    Args:
        shown: As returned by `show_image`.
        at: Place whose similarity and attention are drawn, x and y in 0..1.
    """
    place, colours = Place.at(shown, *at), principal_colours(shown)[0]
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


def cosine_map(shown: ShownImage, place: Place) -> torch.Tensor:
    """Return the cosine similarity (T, R, C) of the token at a place to all tokens."""
    unit = F.normalize(shown.tokens, dim=-1)
    return unit @ unit[place.tile, place.row, place.column]


# Files


def check_outputs(source: str, out: Path, folder: Path | None = None, overwrite: bool = False) -> None:
    """
    Check, before anything is encoded, that the page and a folder of PNGs can be written.

    Raises:
        ValueError: `out` is the image, exists and is not to be overwritten, or is no .html file in a folder that
            exists; or `folder` is a file, or has files that are not to be overwritten.
    """
    if out.suffix.lower() not in (".html", ".htm") or not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out}: expected a .html file in a folder that exists")
    is_source = out.exists() and Path(source).exists() and out.samefile(source)
    if is_source or (out.exists() and not overwrite):
        raise ValueError(f"--out {out} exists: name another file, or give --overwrite if it is not the image")
    check_writable(out, "--out")
    if folder is None:
        return
    check_writable(folder / "picture.png", "--png")
    if not folder.exists():
        return
    if any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--png {folder} has files: name another folder, or give --overwrite")


def write_outputs(html: str, out: Path, pngs: Mapping[str, Image.Image], folder: Path | None = None) -> list[Path]:
    """
    Write the page and the PNGs, all or none; return the path of each.

    Raises:
        OSError: The disk is full, or a file cannot be written.
    """
    contents, is_new = {out: html.encode()}, folder is not None and not folder.exists()
    for name, image in pngs.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        contents[folder / f"{name}.png"] = buffer.getvalue()
    try:
        if pngs:
            folder.mkdir(parents=True, exist_ok=True)
        write_files(contents)
    except OSError:
        if is_new and folder.is_dir():
            folder.rmdir()
        raise
    return [*contents]
