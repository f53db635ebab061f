# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares two bundles question by question."""

from pathlib import Path
from typing import Any

from ..statistics import mcnemar, paired_bootstrap, wilson_interval
from .run import read_bundle, read_questions


# Settings that should be equal; the others are those that one compares.
EQUAL = ("harness", "batch_size", "msac", "max_new_tokens", "judge", "limit", "questions", "seed")


def compare_bundles(a: Path, b: Path) -> dict[str, Any]:
    """
    Compare the scores of two bundles on the same questions.

    Returns:
        {"a", "b", "different": settings and versions that differ, "skipped": {data set: reason}, "data_sets": {name:
        {"n", "left_out" (questions that one of them has no score for), "a", "b" (mean scores), "difference" (b - a),
        "low", "high" (95% interval, bootstrap), "p" (McNemar, right and wrong answers only), "a_only", "b_only",
        "a_interval", "b_interval" (Wilson)}}}.

    Raises:
        ValueError: A folder is no bundle, they share no data set, or a data set has other questions.
    """
    first, second = read_bundle(a), read_bundle(b)
    shared = [name for name in first["data_sets"] if name in second["data_sets"]]
    if not shared:
        raise ValueError(f"{a} and {b} share no data set: expected bundles of the same suite")
    compared, skipped = {}, {}
    for name in [name for name in first["data_sets"] | second["data_sets"] if name not in shared]:
        skipped[name] = f"in {a if name in first['data_sets'] else b} only"
    for name in shared:
        pairs = _pairs(a, b, name)
        scored = [pair for pair in pairs if None not in pair]
        if scored:
            compared[name] = {**_compare(scored), "left_out": len(pairs) - len(scored)}
        else:
            skipped[name] = "no question that both bundles have a score for"
    return {"a": str(a), "b": str(b), "different": _differences(first, second), "skipped": skipped,
            "data_sets": compared}  # fmt: skip


def _differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """Return setting or package -> its two values, of those that should be equal and are not."""
    found = [
        {key: bundle.get(key) for key in EQUAL} | bundle.get("versions", {}).get("packages", {})
        for bundle in (first, second)
    ]
    pairs = {key: [one.get(key) for one in found] for key in found[0] | found[1]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _pairs(a: Path, b: Path, name: str) -> list[tuple[float | None, float | None]]:
    """Return the scores of both for every question, None where there is none."""
    first, second = ({line["index"]: line for line in read_questions(path, name)} for path in (a, b))
    if first.keys() != second.keys():
        index = min(first.keys() ^ second.keys())
        place = a if index in first else b
        raise ValueError(
            f"{name}: question {index} is in {place} only: expected bundles of the same questions and --limit"
        )
    for key in ("question", "answer"):
        other = [index for index in first if first[index].get(key) != second[index].get(key)]
        if other:
            raise ValueError(f"{name}: {key} {other[0]} of {a} and {b} differ: expected bundles of the same questions")
    return [(first[index]["score"], second[index]["score"]) for index in first]


def _compare(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    n, differences = len(pairs), [after - before for before, after in pairs]
    means = [sum(column) / n for column in zip(*pairs, strict=True)]
    low, high = paired_bootstrap(differences)
    result = {"n": n, "a": means[0], "b": means[1], "difference": means[1] - means[0], "low": low, "high": high}
    if not {score for pair in pairs for score in pair} <= {0.0, 1.0}:
        return {**result, "p": None}
    a_only, b_only = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    right = [sum(map(round, column)) for column in zip(*pairs, strict=True)]
    intervals = [list(wilson_interval(count, n)) for count in right]
    counts = {"a_only": a_only, "b_only": b_only, "p": mcnemar(a_only, b_only)}
    return {**result, **counts, "a_interval": intervals[0], "b_interval": intervals[1]}
