"""The files of a report: one self-contained HTML page, and tables in Markdown for the model card."""

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from ..charts import Line, line_chart
from ..encoders import LAST
from ..pages import check_writable, data_url, read_template, render, write_files
from ..probe.files import HEADS, markdown_table
from ..probe.results import PAPER_ACCURACIES, PAPER_TESTS
from ..versions import library_versions
from .build import Report
from .runs import Run, find_gaps


PAPER = "SAILViT, arXiv 2507.01643"
LOSS_POINTS = 150  # of a curve: more steps are averaged
TOO_LONG = ("dropped", "truncated")  # in the records of stages
MOST_REASONS = 8  # of skipped samples in the page
NO_PROBE = "Accuracy by block: give --probe DIR, a folder that `sailvit probe MODELS --layers 1 2 ... last` wrote."
NO_LAYERS = "Accuracy by block: the probe has one layer; `sailvit probe --layers 1 2 ... last` has several."
NO_PAPER = "The paper's accuracies: a probe trained on ImageNet-1k and tested on its validation set, -A, -R or -V2."
STAGE_COLUMNS = (
    "stage", "recipe", "began with", "trained", "learning rate", "batch", "steps", "samples", "tokens", "loss", "hours"
)  # fmt: skip
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Chart:
    """A chart with its legend."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, int], ...]


def page(report: Report, command: str = "") -> str:
    """Return the HTML page of a report: self-contained, without scripts or requests to a network."""
    return render(
        "report.html",
        report=report,
        title=_title(report),
        stages=stage_table(report),
        probe_charts=_probe_charts(report),
        probe_table=probe_table(report),
        paper_table=paper_table(report),
        paper=PAPER,
        change_chart=_change_chart(report),
        change_table=change_table(report),
        similarity_chart=_similarity_chart(report),
        similarity_table=similarity_table(report),
        losses=[(run, _loss_chart(run)) for run in report.runs if run.log],
        mixes=_mixes(report.runs),
        skipped=[_skipped(run) for run in report.runs],
        skipped_table=skipped_table(report),
        pictures=_pictures(report),
        missing=missing(report),
        made_with=_made_with(),
        command=command,
        style=read_template("page.css", "report.css"),
    )


def as_markdown(report: Report, command: str = "") -> str:
    """Return the tables of a report for a model card, with what they are of."""
    tables = [
        ("Stages", stage_table(report), ""),
        ("Probe accuracy", probe_table(report), _probe_caption(report)),
        ("Accuracy in the paper", paper_table(report), f"{PAPER}: top-1 in percent; not measured here."),
        (
            "Change of weights",
            change_table(report),
            "Norm of the difference to the base, relative to its norm, in percent: a stage that began with another one "
            "contains its change.",
        ),
        ("Similarity of features", similarity_table(report), _similarity_caption(report)),
        (
            "Data",
            data_table(report),
            "Shares of the samples of an epoch by kind, in percent, and samples that could not be read.",
        ),
    ]
    parts = [f"# {_title(report)}"]
    for title, (header, rows), caption in tables:
        if rows:
            parts += [f"## {title}", markdown_table(header, rows), *([caption] if caption else [])]
    if lines := missing(report):
        parts += ["## Not in this report", "\n".join(f"- {line}" for line in lines)]
    made = f"`{command}`, {_made_with()}" if command else _made_with()
    return "\n\n".join([*parts, made]) + "\n"


def _title(report: Report) -> str:
    """Return the names of the models, with arrows if each stage began with the one before it."""
    stages = [(), *(run.stages for run in report.runs)]
    is_chain = all(now[:-1] == before for before, now in pairwise(stages))
    return (" → " if is_chain else ", ").join(report.names)


def check_outputs(out: Path, overwrite: bool) -> tuple[Path, Path]:
    """
    Return the paths of page and Markdown file, before anything is computed.

    Raises:
        ValueError: `out` is no .html file in a folder that exists, or a file exists and is not to be overwritten.
    """
    if out.suffix.lower() not in (".html", ".htm") or not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out}: expected a .html file in a folder that exists")
    files = out, out.with_suffix(".md")
    if found := [file for file in files if file.exists() and not overwrite]:
        raise ValueError(f"{found[0]} exists: name another --out, or give --overwrite")
    check_writable(out, "--out")
    return files


def write_report(report: Report, out: Path, overwrite: bool = False, command: str = "") -> tuple[Path, Path]:
    """Write the page and, next to it, the Markdown file; return their paths. Raises as `check_outputs`."""
    files = check_outputs(out, overwrite)
    contents = page(report, command), as_markdown(report, command)
    write_files({file: content.encode() for file, content in zip(files, contents, strict=True)})
    return files


def missing(report: Report) -> list[str]:
    """Return a line for each part that lacks its input, with what would fill it."""
    lines = []
    if report.probe is None:
        lines.append(NO_PROBE)
    elif not report.probe.layers:
        lines.append(NO_LAYERS)
    if report.probe:
        lines += _not_probed(report)
    if report.probe is None or not report.probe.paper:
        lines.append(NO_PAPER)
    lines += find_gaps(report.runs)
    without = [run.name for run in report.runs if not run.log]
    if without:
        lines.append(f"Loss of {', '.join(without)}: log.jsonl in the folder of the run.")
    if without := [run.name for run in report.runs if not run.kinds]:
        lines.append(f"Data mix of {', '.join(without)}: `kinds` in training.json.")
    if len(report.pictures) == 1:
        lines.append("More pictures, and similarity over more images: give --images DIR.")
    return lines


def _not_probed(report: Report) -> list[str]:
    """Return a line if probes have no results of some models, and one if they have none by block."""
    lines = []
    for what, entries in (("Accuracy", report.probe.results), ("Accuracy by block", report.probe.layers)):
        known = {one["model"] for one in entries}
        without = [name for name in report.names if name not in known]
        if known and without:
            lines.append(f"{what} of {', '.join(without)}: no --probe has it; `sailvit probe` takes several models.")
    return lines[:1]


# Stages


def stage_table(report: Report) -> Table:
    """Return what each run was: a row for each."""
    return list(STAGE_COLUMNS), [[run.name, *_describe(run)] for run in report.runs]


def _describe(run: Run) -> list[str]:
    stage = run.stage
    rates = [value for name, value in stage.items() if name == "learning_rate" or name.startswith("learning_rate.")]
    numbers = [stage.get(name) for name in ("samples_per_step", "step", "samples_seen", "tokens_seen")]
    trained = stage.get("trainable", [])
    return [
        str(stage.get("recipe", "")),
        str(stage.get("trained_from", "")),
        ", ".join(trained) if isinstance(trained, list) else str(trained),
        " / ".join(f"{rate:g}" for rate in rates if isinstance(rate, (int, float))),
        *(f"{number:,}" if isinstance(number, (int, float)) else "" for number in numbers),
        *(f"{stage[name]:.4g}" if isinstance(stage.get(name), (int, float)) else "" for name in ("loss", "hours")),
    ]


# Probe


def probe_table(report: Report) -> Table:
    """
    Return accuracies in percent with their intervals: a row for each test and head, a column for each model; with the
    block that was chosen on the split, where there are several.
    """
    results = report.probe.results if report.probe else []
    cells = {(one["test"], one["head"], one["model"]): _accuracy(one, bool(report.probe.layers)) for one in results}
    models = [name for name in report.names if any(model == name for *_, model in cells)]
    rows = [
        [f"{test}, {HEADS[head]}", *(cells.get((test, head, model), "") for model in models)]
        for test, head in dict.fromkeys((one["test"], one["head"]) for one in results)
    ]
    return ["test, head", *models], rows


def _accuracy(one: Mapping[str, Any], names_block: bool) -> str:
    layer = f", {_layer_name(one['layer'])}" if names_block else ""
    return f"{100 * one['accuracy']:.2f} [{100 * one['low']:.2f}, {100 * one['high']:.2f}]{layer}"


def _probe_caption(report: Report) -> str:
    chosen = ["Blocks are those that were chosen on the split."] if report.probe and report.probe.layers else []
    return " ".join([*chosen, *report.probe.captions]) if report.probe else ""


def _layer_name(layer: int | str) -> str:
    return "final norm" if layer == LAST else f"block {layer}"


def _probe_charts(report: Report) -> list[Chart]:
    entries = report.probe.layers if report.probe else []
    layers = sorted({str(one["layer"]) for one in entries}, key=lambda layer: (layer == LAST, layer.zfill(9)))
    charts = []
    for test, head in dict.fromkeys((one["test"], one["head"]) for one in entries):
        cells = {
            (one["model"], str(one["layer"])): one for one in entries if (one["test"], one["head"]) == (test, head)
        }
        lines = []
        for number, model in enumerate(report.names):
            found = [cells.get((model, layer), {}) for layer in layers]
            if any(found):
                values, low, high = ([one.get(key) for one in found] for key in ("accuracy", "low", "high"))
                lines.append(Line(model, values, number, low, high))
        charts.append(_chart(f"{test}: {HEADS[head]}", "block", layers, lines, percent=True))
    return charts


def paper_table(report: Report) -> Table:
    """Return the paper's accuracies on the test sets that a probe has, too."""
    tests = list(PAPER_TESTS.values())
    columns = [test for test in tests if report.probe and test in report.probe.paper]
    rows = [
        [model, *(f"{accuracies[tests.index(test)]:.2f}" for test in columns)]
        for model, accuracies in PAPER_ACCURACIES.items()
        if columns
    ]
    names = [f"{test} ({report.probe.paper[test]} here)" for test in columns]
    return [f"model, in {PAPER}", *names], rows


# Weights and features


def change_table(report: Report) -> Table:
    """Return the relative change of each component in percent: a row for each run."""
    components = list(dict.fromkeys(name for change in report.changes for name in change.components))
    rows = [
        [run.name, *(_percent(change.components.get(name)) for name in components)]
        for run, change in zip(report.runs, report.changes, strict=True)
    ]
    return ["stage", *components], rows


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return "was zero" if math.isinf(value) else f"{100 * value:.4g}"


def _change_chart(report: Report) -> Chart:
    blocks = list(report.changes[0].blocks)
    lines = [
        Line(run.name, [change.blocks.get(block) for block in blocks], number)
        for number, (run, change) in enumerate(zip(report.runs, report.changes, strict=True), 1)
    ]
    return _chart("Relative change of weights", "block", [str(block) for block in blocks], lines, percent=True)


def similarity_table(report: Report) -> Table:
    """Return the CKA of each run with the base: first, middle and last block, after the final norm, the least."""
    layers = report.views[0].layers
    chosen = list(dict.fromkeys([0, (len(layers) - 2) // 2, max(len(layers) - 2, 0), len(layers) - 1]))
    rows = []
    for name, view in zip(report.names[1:], report.views[1:], strict=True):
        known = [value for value in view.similarity if value is not None]
        rows.append([name, *(_cka(view.similarity[index]) for index in chosen), _cka(min(known, default=None))])
    header = [_layer_name(layers[index]) for index in chosen]
    return ["stage", *header, "least"], rows


def _cka(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _similarity_caption(report: Report) -> str:
    images = f"{report.images} image" + "s" * (report.images != 1)
    return f"Linear CKA with the base, unbiased, from minibatches of up to 1,024 patch tokens of {images}; 1 is equal."


def _similarity_chart(report: Report) -> Chart:
    layers = [str(layer) for layer in report.views[0].layers]
    lines = [
        Line(name, view.similarity, number)
        for number, (name, view) in enumerate(zip(report.names[1:], report.views[1:], strict=True), 1)
    ]
    return _chart("Linear CKA with the base", "block", layers, lines)


def _chart(
    title: str, x_label: str, positions: Sequence[float | str], lines: Sequence[Line], percent: bool = False
) -> Chart:
    return Chart(
        title + (", %" if percent else ""),
        line_chart(title, x_label, positions, lines, percent),
        tuple((line.label, line.colour) for line in lines),
    )


# Loss and data


def _loss_chart(run: Run) -> Chart:
    steps = np.array([entry["step"] for entry in run.log], dtype=float)
    bins = np.array_split(np.arange(len(steps)), min(len(steps), LOSS_POINTS))
    kinds = sorted({kind for entry in run.log for kind in entry.get("loss_by_kind", {})})
    lines = [
        Line(kind, _means([entry.get("loss_by_kind", {}).get(kind) for entry in run.log], bins), number)
        for number, kind in enumerate(kinds, 1)
    ]
    total = Line("all", _means([entry["loss"] for entry in run.log], bins), 0)
    positions = [int(steps[part[-1]]) for part in bins]
    chart = _chart(run.name, "step", positions, [*lines, total])  # the total is drawn over the kinds
    return replace(chart, legend=(chart.legend[-1], *chart.legend[:-1]))


def _means(values: Sequence[float | None], bins: Iterable[np.ndarray]) -> list[float | None]:
    """Return the mean of the values in each bin; None where there is none."""
    found = [[values[index] for index in part if values[index] is not None] for part in bins]
    return [sum(part) / len(part) if part else None for part in found]


def _mixes(runs: Sequence[Run]) -> list[tuple[Run, list[tuple[str, int, float, int]]]]:
    """Return for each run kind, samples, share, and number of its colour, which is the same in all runs."""
    numbers = {kind: number for number, kind in enumerate(_kinds(runs), 1)}
    mixes = []
    for run in runs:
        total = sum(run.kinds.values())
        parts = [(kind, count, count / total, numbers[kind]) for kind, count in sorted(run.kinds.items()) if count]
        if parts:
            mixes.append((run, parts))
    return mixes


def _kinds(runs: Sequence[Run]) -> list[str]:
    return sorted({kind for run in runs for kind in run.kinds})


def data_table(report: Report) -> Table:
    """Return the share of each kind in percent, and the numbers of samples and of those left out, for each run."""
    kinds = _kinds(report.runs)
    rows = []
    for run in report.runs:
        total = sum(run.kinds.values())
        shares = [f"{100 * run.kinds.get(kind, 0) / total:.1f}" if total else "" for kind in kinds]
        rows.append([run.name, f"{total:,}" if total else "", *shares, f"{len(run.skipped):,}"])
    return ["stage", "samples", *kinds, "could not be read"], rows


@dataclass(frozen=True)
class SkippedSamples:
    """The most frequent reasons why a run left samples out: how often each, and the place of an example."""

    name: str
    reasons: tuple[tuple[str, int, str], ...]


def skipped_table(report: Report) -> Table:
    """Return how many samples each run left out, and what it did to those that are too long."""
    rows = [
        [run.name, f"{len(run.skipped):,}", *(str(run.stage.get(name, "")) for name in TOO_LONG)] for run in report.runs
    ]
    return ["stage", "could not be read", *(f"too long, {name}" for name in TOO_LONG)], rows


def _skipped(run: Run) -> SkippedSamples:
    counts = Counter(str(entry.get("reason", "unknown")) for entry in run.skipped)
    examples = {str(entry.get("reason", "unknown")): _location(entry) for entry in reversed(run.skipped)}
    most = counts.most_common(MOST_REASONS)
    return SkippedSamples(run.name, tuple((reason, count, examples[reason]) for reason, count in most))


def _location(entry: Mapping[str, Any]) -> str:
    place = next((f", {name} {entry[name]}" for name in ("line", "index") if name in entry), "")
    return f"{entry.get('source', '')}: {Path(str(entry.get('path', ''))).name}{place}"


# Pictures


def _pictures(report: Report) -> list[tuple[str, str, str, list[str]]]:
    """Return for each picture its name, ratio of width to height and URL, and the URL of each model's components."""
    rows = []
    for number, (name, image) in enumerate(report.pictures):
        urls = [data_url(Image.fromarray(model[number].numpy()), "PNG", optimize=True) for model in report.colours]
        rows.append((name, f"{image.width} / {image.height}", data_url(image, "JPEG", quality=82), urls))
    return rows


def _made_with() -> str:
    libraries = ", ".join(f"{name} {release}" for name, release in library_versions().items())
    return f"sailvit {version('sailvit')}, {libraries}, Python {platform.python_version()}"
