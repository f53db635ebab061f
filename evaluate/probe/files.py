"""The files of a probe: results.json, results.md, results.png, and evaluation.json for the model card."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from operator import add
from pathlib import Path
from typing import Any

from ...convert.export.card import RESULTS as EVALUATION
from ...convert.storage.files import write_json
from ...convert.storage.sources import without_local_path


RESULTS = "results.json"
TABLE, PLOT = "results.md", "results.png"
HEADS = {
    "mlp": "2-layer MLP",
    "linear": "logistic regression",
    "knn": "nearest neighbours",
    "whitened_knn": "whitened nearest neighbours",
}
STYLES = ("-", "--", ":", "-.")  # of lines by layer, one for each test set
Entry = Mapping[str, Any]


def write_report(folder: Path, content: Mapping[str, Any], tests: Mapping[str, str]) -> None:
    """
    Write the files of a probe to a folder.

    Args:
        folder: Where.
        content: Of results.json.
        tests: Name of a test set in results -> as the user named it.
    """
    write_json(folder / RESULTS, content)
    (folder / TABLE).write_text(as_markdown(content), encoding="utf-8")
    draw_results(content, folder / PLOT)
    first = content["results"][0]["model"]
    write_json(folder / EVALUATION, card_results([one for one in content["results"] if one["model"] == first], tests))


def card_results(results: Iterable[Entry], tests: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return results of one encoder as the model card takes them: the arguments of huggingface_hub.EvalResult."""
    return [_card_result(one, *_data_set(one["test"], tests)) for one in results]


def _card_result(one: Entry, name: str, source: str, classes: str) -> dict[str, Any]:
    return {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": without_local_path(source),
        "dataset_name": name,
        **({"dataset_config": classes} if classes else {}),
        "metric_type": "accuracy",
        "metric_name": f"accuracy of {HEADS[one['head']]} on frozen features, %",
        "metric_value": round(100 * one["accuracy"], 2),
        "metric_args": {"interval": [round(100 * one[end], 2) for end in ("low", "high")], "n": one["n"]},
    }


def _data_set(test: str, tests: Mapping[str, str]) -> tuple[str, str, str]:
    """Return name and source of a test set, and the classes that its results are over."""
    name = next(name for name in tests if test == name or test.startswith(f"{name} ("))
    return name, tests[name], test[len(name) :].strip(" ()")


def as_markdown(content: Mapping[str, Any]) -> str:
    """Return tables of accuracies in percent for each head, of comparisons and of layers, with their caption."""
    parts = ["# Probe", *_accuracy_tables(_with_layers(content), "model")]
    if content["layers"]:
        for model in _distinct(content["layers"], "model"):
            chosen = [one for one in content["layers"] if one["model"] == model]
            parts += [f"## {model} by layer", *_accuracy_tables(chosen, "layer")]
    if content["comparisons"]:
        parts += ["## Pairs", _comparison_table(content["comparisons"])]
    if content["skipped"]:
        lines = [f"- {one['data']}: {one['image']}: {one['reason']}" for one in content["skipped"]]
        parts += [f"## {len(lines)} skipped", "\n".join(lines)]
    return "\n\n".join([*parts, _caption(content["settings"])]) + "\n"


def _with_layers(content: Mapping[str, Any]) -> list[Entry]:
    """Return the results; where there are several layers, models with the one that was chosen."""
    if not content["layers"]:
        return content["results"]
    layers = chosen_layers(content)
    return [
        {**one, "model": f"{one['model']}, layer {layers[one['model'], one['head']]}"} for one in content["results"]
    ]


def chosen_layers(content: Mapping[str, Any]) -> dict[tuple[str, str], int | str]:
    """Return (model, head) -> the layer that was chosen on the split."""
    return {(one["model"], one["head"]): one["layer"] for one in content["heads"] if one["is_best"]}


def _accuracy_tables(results: Sequence[Entry], row_key: str) -> list[str]:
    tables = []
    for head in _distinct(results, "head"):
        chosen = [one for one in results if one["head"] == head]
        tests = _distinct(chosen, "test")
        cells = {(one[row_key], one["test"]): one for one in chosen}
        rows = [[str(row), *(_percent(cells[row, test]) for test in tests)] for row in _distinct(chosen, row_key)]
        tables.append(markdown_table([f"{row_key}, {HEADS[head]}", *tests], rows))
    return tables


def _percent(one: Entry) -> str:
    return f"{100 * one['accuracy']:.2f} [{100 * one['low']:.2f}, {100 * one['high']:.2f}]"


def _comparison_table(comparisons: Iterable[Entry]) -> str:
    rows = [
        [
            one["test"], HEADS[one["head"]], one["first"], one["second"],
            f"{100 * one['difference']:+.2f} [{100 * one['low']:+.2f}, {100 * one['high']:+.2f}]",
            f"{one['p_value']:.2g}", f"{one['n']:,}",
        ]
        for one in comparisons
    ]  # fmt: skip
    return markdown_table(["test", "head", "first", "second", "second - first, points", "p", "n"], rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _caption(settings: Mapping[str, Any]) -> str:
    preprocessing = settings["preprocessing"]
    own = "each encoder's own" if preprocessing == "own" else f"that of {preprocessing}, for all encoders"
    return (
        f"Top-1 accuracy in percent of heads on frozen features, trained on {settings['train']}. Features: "
        f"{settings['tokens']}; computed in {settings['computed_in']}. Preprocessing: {own}. "
        f"{settings['heads']['caption']} Intervals, {settings['intervals']}."
    )


def _distinct(entries: Iterable[Entry], key: str) -> list[Any]:
    return list(dict.fromkeys(one[key] for one in entries))


def draw_results(content: Mapping[str, Any], path: Path) -> None:
    """Draw accuracies with their intervals: by test set, and by layer where there are several."""
    from matplotlib.figure import Figure

    heads, by_layer = _distinct(content["results"], "head"), content["layers"]
    rows = 2 if by_layer else 1
    figure = Figure(figsize=(max(6, 5 * len(heads)), 4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(heads), squeeze=False, sharey="row")
    for column, head in enumerate(heads):
        _draw_tests(axes[0, column], [one for one in content["results"] if one["head"] == head], HEADS[head])
        if by_layer:
            _draw_layers(axes[1, column], [one for one in by_layer if one["head"] == head])
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    shown = axes[0, 0].get_legend_handles_labels()
    if by_layer and len(_distinct(by_layer, "test")) > 1:
        shown = tuple(map(add, shown, axes[1, 0].get_legend_handles_labels()))
    figure.legend(*shown, loc="outside lower center", fontsize="small")  # below the axes, so that no point is hidden
    figure.savefig(path, dpi=120)


def _draw_tests(axis: Any, results: list[Entry], title: str) -> None:
    tests, models = _distinct(results, "test"), _distinct(results, "model")
    for number, model in enumerate(models):
        chosen = [one for one in results if one["model"] == model]
        shift = 0.6 * ((number + 0.5) / len(models) - 0.5)
        positions = [tests.index(one["test"]) + shift for one in chosen]
        axis.errorbar(positions, *_with_intervals(chosen), fmt="o", capsize=3, label=model)
    axis.set_xticks(range(len(tests)), tests, rotation=20, ha="right")
    axis.set_xlim(-0.5, len(tests) - 0.5)
    axis.set_title(title)
    axis.grid(axis="y", alpha=0.3)


def _draw_layers(axis: Any, results: list[Entry]) -> None:
    """Draw accuracy by layer: a colour for each model, as above, and a style of line for each test set."""
    for number, model in enumerate(_distinct(results, "model")):
        for test, style in zip(_distinct(results, "test"), cycle(STYLES), strict=False):
            chosen = [one for one in results if (one["model"], one["test"]) == (model, test)]
            layers, label = [str(one["layer"]) for one in chosen], None if number else f"by layer: {test}"
            axis.errorbar(layers, *_with_intervals(chosen), fmt=f"o{style}", color=f"C{number}", capsize=3, label=label)
    axis.set_xlabel("layer")
    axis.grid(axis="y", alpha=0.3)


def _with_intervals(results: list[Entry]) -> tuple[list[float], list[list[float]]]:
    values = [100 * one["accuracy"] for one in results]
    below = [max(0.0, value - 100 * one["low"]) for value, one in zip(values, results, strict=True)]
    above = [max(0.0, 100 * one["high"] - value) for value, one in zip(values, results, strict=True)]
    return values, [below, above]
