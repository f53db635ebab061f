"""The page of an image: self-contained HTML, below 10 MB."""

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image

from ..pages import data_url, read_template, render
from ..pictures import INFERNO, VIRIDIS, stitch_tiles
from .attention import Attention
from .view import Place, ShownImage, principal_colours


TOKEN_BYTES = 1_600_000  # before base64, as those of attention in view.py
PICTURE_BYTES = 600_000
MOST_DIRECTIONS = 256  # of the tokens in the page
CHECKED_TOKENS = 128  # whose cosine similarities are compared with the exact ones


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
    data = {"mean": _pack(scales, codes)}
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
    colours, tokens = principal_colours(shown), reduce_tokens(shown.tokens)
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
    return render(
        "show.html",
        title=f"{shown.name} seen by {shown.facts['Encoder'].split(' (')[0]}",
        shown=shown,
        facts=Markup(json.dumps(facts).replace("<", "\\u003c")),
        blobs=blobs,
        picture=_photo_url(shown.image),
        components=[data_url(Image.fromarray(each.numpy()), "PNG", optimize=True) for each in components],
        shares=colours[1].shares,
        reductions=_reductions(shown, tokens),
        command=command,
        style=read_template("page.css", "show.css"),
        script=read_template("show.js"),
    )
