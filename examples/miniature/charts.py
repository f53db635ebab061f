# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of an experiment: charts of its summary, and what the encoders of its arms see in one picture."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ...evaluate.pictures import PrincipalColours, enlarge, side_by_side, stitch_tokens
from .answers import CATEGORIES
from .figure import SPACE, ZOOM, with_title
from .results import HEADS, SETS, TRANSFER
from .tables import ALL_LANGUAGES


RUNS = dict(zip(TRANSFER, ("connector trained", "connector and language model trained"), strict=True))
COLUMNS = 3  # panels side by side
NAMES = 2  # of arms in the legend, side by side below a panel


def draw_charts(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Draw what the arms with several seeds reached: a dot for each seed, a line for the mean. A chart that would be empty
    is removed.

    Args:
        summary: As `summarize` returns it.
        folder: Where probes.png and transfer.png are written.
    """
    figures = {name: one["figures"] for name, one in summary["arms"].items() if len(one["seeds"]) > 1}
    probes = {
        name.replace("_", " "): {title.replace(" ", "\n"): f"probes/{name}/{head}" for head, title in HEADS.items()}
        for name in SETS
    }
    transfer = {
        title: {name: f"transfer/{ALL_LANGUAGES}/{run}/{name}" for name in CATEGORIES} for run, title in RUNS.items()
    }
    drawn = []
    for file, panels in (("probes.png", probes), ("transfer.png", transfer)):
        shown = {name for panel in panels.values() for name in panel.values()}
        if arms := {arm: own for arm, own in figures.items() if shown & {*own}}:
            drawn.append(_draw_panels(panels, arms, folder / file))
        else:
            (folder / file).unlink(missing_ok=True)
    return drawn


def draw_tokens(encoders: Mapping[str, Path], picture: Image.Image) -> Image.Image:
    """
    Return a picture next to its tokens in each encoder: the first three principal components as red, green and blue.

    Args:
        encoders: Title -> folder of a SAILViT; each has a basis of its own, so colours compare within an encoder.
        picture: In RGB.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel

    size = picture.width * ZOOM, picture.height * ZOOM
    panels = [with_title(picture.resize(size, Image.Resampling.NEAREST), "picture")]
    for title, folder in encoders.items():
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        batch = processor(picture, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.get_image_features(batch["pixel_values"])
        patches = stitch_tokens(tokens, tuple(batch["tile_grids"][0].tolist()), model.config.pixel_shuffle_factor)
        panels.append(with_title(enlarge(PrincipalColours.fit(patches)(patches), size), title))
    return side_by_side(panels, SPACE)


def _draw_panels(panels: Mapping[str, Mapping[str, str]], arms: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw a panel for each group of figures; an arm has a colour, which the legend names."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / COLUMNS)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(3.8 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for number, (arm, figures) in enumerate(arms.items()):
            shift = 0.7 * ((number + 0.5) / len(arms) - 0.5)
            for at, found in enumerate(figures.get(name) for name in names.values()):
                if found:
                    _draw_seeds(axis, at + shift, found, 0.6 / len(arms), f"C{number}")
            axis.plot([], [], "o", markersize=4, color=f"C{number}", label=arm)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title, fontsize="medium")
        axis.set_ylim(-2, 102)
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("right, %")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(arms), NAMES * columns), fontsize="small")
    figure.savefig(path, dpi=80)
    return path


def _draw_seeds(axis: Any, x: float, figure: Mapping[str, Any], width: float, colour: str) -> None:
    values = [100 * value for value in figure["values"]]
    axis.plot([x] * len(values), values, "o", markersize=3, color=colour, alpha=0.6)
    axis.hlines(100 * figure["mean"], x - width / 2, x + width / 2, color=colour)
