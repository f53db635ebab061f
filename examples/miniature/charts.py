# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of an experiment: charts of its summary, and what the encoders of its arms see in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...evaluate.pictures import PrincipalColours, enlarge, side_by_side, stitch_tokens
from .figure import SPACE, ZOOM, with_title


SHOWN = ("what", "colour", "count", "caption")  # of transfer
RUNS = {"connector": "connector trained", "language": "connector and language model trained"}


def draw_charts(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Draw what the arms with several seeds reached, with intervals, if there are such arms.

    Args:
        summary: As `summarize` returns it.
        folder: Where probes.png and transfer.png are written.
    """
    arms = {name: one for name, one in summary["arms"].items() if len(one["seeds"]) > 1}
    figures = {name: one["figures"] for name, one in arms.items()}
    probes: dict[str, dict[str, str]] = {}  # panel -> label on the x axis -> figure
    for name in next(iter(figures.values()), {}):
        kind, *parts = name.split("/")
        if kind == "probes":
            probes.setdefault(parts[0].replace("_", " "), {})[parts[1].replace("_", "\n")] = name
    transfer = {title: {name: f"transfer/mean/{run}/{name}" for name in SHOWN} for run, title in RUNS.items()}
    charts = {"probes.png": probes, "transfer.png": transfer}
    return [_draw_panels(panels, figures, folder / name) for name, panels in charts.items() if arms]


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
    """Draw a panel for each of a group of figures: a colour for each arm, which the legend names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 3.2 * len(panels)), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for number, (arm, figures) in enumerate(arms.items()):
            shift = 0.6 * ((number + 0.5) / len(arms) - 0.5)
            shown = [(at + shift, figures[name]) for at, name in enumerate(names.values()) if name in figures]
            axis.errorbar(*_with_intervals(shown), fmt="o", markersize=3, capsize=2, color=f"C{number}", label=arm)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("right, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    figure.savefig(path, dpi=80)
    return path


def _with_intervals(shown: Sequence[tuple[float, Mapping[str, float]]]) -> tuple[list[float], list[float], list[Any]]:
    """Return x, y and the lengths of the bars below and above, in percent."""
    below, above = ([100 * abs(one["mean"] - one[end]) for _, one in shown] for end in ("low", "high"))
    return [at for at, _ in shown], [100 * one["mean"] for _, one in shown], [below, above]
