# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The arms over the seeds: summary.json, and the same as tables in summary.md.

Intervals of means are Student's t over the seeds; settings were tuned with seed 0. A difference is paired: both arms
have the world, the language models and, but for arms without pretraining, the pretrained encoder of a seed in common
(on another kind of processor, up to rounding), and the interval is that of the mean of the seeds' differences.
Within a seed, a bootstrap over test pictures gives the interval of a difference of answers, in summary.json alone: it
holds the trained models fixed, so that it is narrower than what another seed would change.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import sem, t

from ...convert.storage.files import replace_text
from ...evaluate.statistics import CONFIDENCE, paired_bootstrap
from .answers import CATEGORIES
from .arms import ARMS, REFINED, SINGLE
from .charts import draw_charts
from .results import HEADS, TRANSFER, Result, Results, list_entries, read_results
from .tables import ALL_LANGUAGES, to_markdown


GATED_SETS = ("objects", "unseen_letters", "unseen_font_colour", "large_letters")  # not scenes: a mean has no places
ANSWERS = {"what": 0.93, "colour": 0.98, "count": 0.87}  # what is expected of the refined model
DIGITS = 6  # of the figures in summary.json
PROBE_GAIN, TRANSFER_GAIN = 0.10, 0.15


def write_summary(folder: Path) -> list[Path]:
    """
    Write summary.json, summary.md and charts of the results in a folder, and return the paths.

    Args:
        folder: With NAME/results/ARM.json, a NAME for every seed.

    Raises:
        ValueError: There are no results, one cannot be read, or they do not belong together.
    """
    summary = summarize(read_results(folder))
    rounded = json.loads(json.dumps(summary), parse_float=lambda number: round(float(number), DIGITS))
    texts = {"summary.json": json.dumps(rounded, indent=1) + "\n", "summary.md": to_markdown(summary)}
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [*draw_charts(summary, folder), *(folder / name for name in texts)]


def summarize(results: Results) -> dict[str, Any]:
    """Return the means of every arm over its seeds, and what the refined arm has more than each other one."""
    several = {arm: seeds for arm, seeds in results.items() if not ARMS[arm].single}
    summary: dict[str, Any] = {
        "method": " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "arms": {arm: _describe_arm(arm, seeds) for arm, seeds in several.items()},
        "single": {arm: _describe_arm(arm, seeds) for arm, seeds in _single(results).items()},
        "differences": {
            arm: _compare(results[REFINED], seeds)
            for arm, seeds in results.items()
            if arm != REFINED and REFINED in results and {*seeds} & {*results[REFINED]}
        },
    }
    return {**summary, "goals": [*_check_goals(summary)]}


def _single(results: Results) -> Results:
    """Return the arms of one seed, after the refined one with that seed; nothing if there are none."""
    single = {arm: seeds for arm, seeds in results.items() if ARMS[arm].single}
    refined = {SINGLE: results[REFINED][SINGLE]} if SINGLE in results.get(REFINED, {}) else {}
    return {REFINED: refined, **single} if single and refined else single


def flatten(result: Result) -> dict[str, float]:
    """Return the accuracies of a result, and their means over the language models, by the names of `list_entries`."""
    found = {name: one["accuracy"] for name, one in list_entries(result).items()}
    languages = [*result["transfer"]]
    for run, category in product(TRANSFER, CATEGORIES) if languages else ():
        accuracies = [found[f"transfer/{one}/{run}/{category}"] for one in languages]
        found[f"transfer/{ALL_LANGUAGES}/{run}/{category}"] = fmean(accuracies)
    return found


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and its interval of Student's t; without interval if there is one value."""
    mean = fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _describe_arm(arm: str, seeds: Mapping[int, Result]) -> dict[str, Any]:
    figures = _gather({seed: flatten(result) for seed, result in seeds.items()})
    compute = {name: [result[name] for result in seeds.values()] for name in ("pictures", "tiles_seen")}
    blind = {
        category: fmean(result["answers"][category]["accuracy_with_another_picture"] for result in seeds.values())
        for category in CATEGORIES
        if all(result["answers"] for result in seeds.values())
    }
    return {"title": ARMS[arm].title, "seeds": [*seeds], **compute, "figures": figures, "with_another_picture": blind}


def _compare(refined: Mapping[int, Result], other: Mapping[int, Result]) -> dict[str, Any]:
    """Return what the refined arm has more, on the seeds that both have."""
    shared = [seed for seed in refined if seed in other]
    pairs = {seed: (flatten(refined[seed]), flatten(other[seed])) for seed in shared}
    figures = _gather({seed: {name: a[name] - b[name] for name in a if name in b} for seed, (a, b) in pairs.items()})
    for seed in shared:
        for name, interval in _within(refined[seed], other[seed], [*figures]).items():
            figures[name].setdefault("within", {})[str(seed)] = interval
    return {"seeds": shared, "figures": figures}


def _gather(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return figure -> values of the seeds, mean, interval; of the figures that all seeds have."""
    names = [name for name in next(iter(by_seed.values())) if all(name in figures for figures in by_seed.values())]
    values = {name: [figures[name] for figures in by_seed.values()] for name in names}
    return {name: {"values": own, **mean_interval(own)} for name, own in values.items()}


def _within(refined: Result, other: Result, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the intervals of differences of answers, over the test pictures of a seed; of the figures with a name."""
    answers = [
        {name: one["right"] for name, one in list_entries(result).items() if "right" in one}
        for result in (refined, other)
    ]
    try:
        return {name: bootstrap_pictures(*(one[name] for one in answers)) for name in names if name in answers[0]}
    except ValueError as error:
        raise ValueError(f"{refined['arm']} and {other['arm']}, seed {refined['seed']}: {error}") from error


def bootstrap_pictures(first: str, second: str) -> tuple[float, float]:
    """
    Return the interval of the accuracy of the first minus that of the second, from pictures drawn with replacement.

    Args:
        first, second: A word for every picture, with a 1 for every right answer about it, as `write_answers` has it.

    Raises:
        ValueError: They are about other questions.
    """
    words = [text.split() for text in (first, second)]
    if [*map(len, words[0])] != [*map(len, words[1])]:
        raise ValueError(f"expected answers to the same questions, got {len(words[0])} and {len(words[1])} pictures")
    per_picture = sum(map(len, words[0])) / len(words[0])
    return paired_bootstrap([(a.count("1") - b.count("1")) / per_picture for a, b in zip(*words, strict=True)])


def _check_goals(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is expected of the refined arm, and whether the means over the seeds reach it."""
    for arm in ("base", "more_aim"):
        figures = summary["differences"].get(arm, {}).get("figures", {})
        for name in GATED_SETS:
            for head in HEADS:
                yield from _goal(figures, f"probes/{name}/{head}", f"{REFINED} - {arm}", PROBE_GAIN)
    figures = summary["differences"].get("base", {}).get("figures", {})
    yield from _goal(figures, f"transfer/{ALL_LANGUAGES}/language/what", f"{REFINED} - base", TRANSFER_GAIN)
    for category, least in ANSWERS.items():
        own = summary["arms"].get(REFINED, {}).get("figures", {})
        yield from _goal(own, f"answers/{category}", REFINED, least)


def _goal(figures: Mapping[str, Any], name: str, of: str, least: float) -> Iterator[dict[str, Any]]:
    if name in figures:
        mean = figures[name]["mean"]
        yield {"figure": name, "of": of, "mean": mean, "expected": least, "met": mean >= least}
