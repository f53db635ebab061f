# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The arms over the seeds: summary.json, and the same as tables in summary.md.

Intervals of means are Student's t over the seeds; settings were tuned with seed 0. A difference is paired: both arms
have the world, the pretrained encoder and the language models of a seed in common (on another kind of processor, up to
rounding), and the interval is that of the mean of the seeds' differences.
Within a seed, a bootstrap over test pictures gives the interval of a difference of answers, in summary.json alone: it
holds the trained models fixed, so that it is narrower than what another seed would change.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import sem, t

from ...convert.storage.files import read_json, replace_text
from ...evaluate.statistics import CONFIDENCE, paired_bootstrap
from .answers import CATEGORIES
from .arms import ARMS, REFINED, SINGLE
from .charts import draw_charts
from .results import HEADS
from .tables import ALL_LANGUAGES, to_markdown


Result = Mapping[str, Any]
Results = Mapping[str, Mapping[int, Result]]  # arm -> seed -> result
GATED_SETS = ("objects", "unseen_letters", "unseen_font_colour", "large_letters")  # scenes need places, a mean has none
ANSWERS = {"what": 0.93, "colour": 0.98, "count": 0.87}  # what is expected of the refined model
PROBE_GAIN, TRANSFER_GAIN = 0.10, 0.15
FIELDS = {
    "arm": str,
    "seed": int,
    "setting": str,
    "pictures": int,
    "tiles_seen": int,
    "probes": dict,
    "answers": dict,
    "transfer": dict,
}  # of a result


def write_summary(folder: Path) -> list[Path]:
    """
    Write summary.json, summary.md and charts of the results in a folder, and return the paths.

    Args:
        folder: With NAME/results/ARM.json, a NAME for every seed.

    Raises:
        ValueError: There are no results, one cannot be read, two are of the same arm and seed, or not all of the same
            setting.
    """
    summary = summarize(read_results(folder))
    texts = {"summary.json": json.dumps(summary, indent=1) + "\n", "summary.md": to_markdown(summary)}
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [*draw_charts(summary, folder), *(folder / name for name in texts)]


def read_results(folder: Path) -> Results:
    """Return the results in a folder: arm -> seed -> result, in the order of ARMS and of the seeds."""
    found: dict[str, dict[int, Result]] = {name: {} for name in ARMS}
    settings: dict[str, Path] = {}
    for path in sorted(folder.glob("*/results/*.json")):
        result = _read_result(path)
        arm, seed = result["arm"], result["seed"]
        if seed in found[arm]:
            raise ValueError(f"{path}: expected one result of {arm} with seed {seed}, got two: remove one")
        found[arm][seed] = result
        settings.setdefault(result["setting"], path)
    results = {arm: dict(sorted(seeds.items())) for arm, seeds in found.items() if seeds}
    if not results:
        raise ValueError(
            f"{folder}: no results: expected seed-N/results/ARM.json, which `sailvit miniature --arms` writes"
        )
    if len(settings) > 1:
        described = " and ".join(f"{setting} ({path})" for setting, path in settings.items())
        raise ValueError(f"expected results of one setting, got {described}: remove those of the other")
    return results


def _read_result(path: Path) -> Result:
    result = read_json(path)
    if wrong := [name for name, kind in FIELDS.items() if type(result.get(name)) is not kind]:
        raise ValueError(f"{path}: expected a result with {wrong[0]}: remove it, and the same command writes it anew")
    if result["arm"] not in ARMS:
        raise ValueError(f"{path}: expected one of the arms {', '.join(ARMS)}, got {result['arm']!r}")
    if ARMS[result["arm"]].single and result["seed"] != SINGLE:
        raise ValueError(f"{path}: expected seed {SINGLE}, the only one of {result['arm']}, got {result['seed']}")
    return result


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
    """Return "probes/SET/HEAD", "answers/CATEGORY", "transfer/LANGUAGE/RUN/CATEGORY" and their means -> accuracy."""
    probes = {f"probes/{name}/{head}": one for name, heads in result["probes"].items() for head, one in heads.items()}
    answers = {f"answers/{category}": one for category, one in result["answers"].items()}
    transfer = {f"transfer/{name}": one for name, one in _transfers(result).items()}
    found = {name: one["accuracy"] for name, one in {**probes, **answers, **transfer}.items()}
    languages = [*result["transfer"]]
    for name in [name.split("/", 2)[2] for name in transfer if name.split("/")[1] == languages[0]]:
        found[f"transfer/{ALL_LANGUAGES}/{name}"] = fmean(found[f"transfer/{one}/{name}"] for one in languages)
    return found


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and its interval of Student's t; without interval if there is one value."""
    mean = fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _transfers(result: Result) -> dict[str, Any]:
    """Return "LANGUAGE/RUN/CATEGORY" -> answers."""
    return {
        f"{language}/{run}/{category}": one
        for language, runs in result["transfer"].items()
        for run, answers in runs.items()
        for category, one in answers.items()
    }


def _describe_arm(arm: str, seeds: Mapping[int, Result]) -> dict[str, Any]:
    figures = _gather({seed: flatten(result) for seed, result in seeds.items()})
    compute = {name: [result[name] for result in seeds.values()] for name in ("pictures", "tiles_seen")}
    blind = {
        category: fmean(result["answers"][category]["accuracy_with_another_picture"] for result in seeds.values())
        for category in CATEGORIES
        if all(category in result["answers"] for result in seeds.values())
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
        {f"answers/{name}": one for name, one in result["answers"].items()}
        | {f"transfer/{name}": one for name, one in _transfers(result).items()}
        for result in (refined, other)
    ]
    try:
        return {
            name: bootstrap_pictures(*(one[name]["right"] for one in answers)) for name in names if name in answers[0]
        }
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
