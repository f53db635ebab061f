# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares two bundles question by question."""

from pathlib import Path
from typing import Any

from ..statistics import mcnemar, paired_bootstrap, wilson_interval
from .run import read_bundle, read_questions


# Settings that should be equal; the others are those that one compares.
EQUAL = ("harness", "batch_size", "msac", "max_new_tokens", "judge", "limit")


def compare_bundles(a: Path, b: Path) -> dict[str, Any]:
    """
    Compare the scores of two bundles on the same questions.

    Returns:
        {"a", "b", "different": settings that differ, "skipped": {data set: reason}, "data_sets": {name: {"n", "a",
        "b" (mean scores), "difference" (b - a), "low", "high" (95% interval, bootstrap), "p" (McNemar, right and
        wrong answers only), "a_only", "b_only", "a_interval", "b_interval" (Wilson)}}}.

    Raises:
        ValueError: A folder is no bundle, they share no data set, or a data set has other questions.
    """
    first, second = read_bundle(a), read_bundle(b)
    shared = [name for name in first["data_sets"] if name in second["data_sets"]]
    if not shared:
        raise ValueError(f"{a} and {b} share no data set: expected bundles of the same suite")
    compared, skipped = {}, {}
    for name in shared:
        pairs = _pairs(a, b, name)
        if pairs:
            compared[name] = _compare(pairs)
        else:
            skipped[name] = f"{first['harness']} gives no score of single questions"
    different = {key: [first.get(key), second.get(key)] for key in EQUAL if first.get(key) != second.get(key)}
    return {"a": str(a), "b": str(b), "different": different, "skipped": skipped, "data_sets": compared}


def _pairs(a: Path, b: Path, name: str) -> list[tuple[float, float]]:
    """Return the scores of both for every question; [] if a bundle has no scores of single questions."""
    first, second = ({line["index"]: line["score"] for line in read_questions(path, name)} for path in (a, b))
    if first.keys() != second.keys():
        index = min(first.keys() ^ second.keys())
        place = a if index in first else b
        raise ValueError(
            f"{name}: question {index} is in {place} only: expected bundles of the same questions and --limit"
        )
    pairs = [(first[index], second[index]) for index in first]
    return [] if any(None in pair for pair in pairs) else pairs


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
