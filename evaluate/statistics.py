# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Intervals of accuracies, and paired tests of two models on the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


CONFIDENCE = 0.95
DRAWS = 10_000  # of the bootstrap


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Return the interval of an accuracy (Wilson 1927): `right` of `n` answers are right."""
    interval = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a_only: int, b_only: int) -> float:
    """
    Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Args:
        a_only: Questions that only model A answers right.
        b_only: Questions that only model B answers right.
    """
    return float(binomtest(a_only, a_only + b_only).pvalue) if a_only + b_only else 1.0


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """
    Return the interval of a mean difference, from questions drawn with replacement.

    Args:
        differences: Score of B minus score of A, one per question.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    n, tail = int(counts.sum()), (1 - CONFIDENCE) / 2
    # Drawing n questions with replacement draws how often each value occurs, from a multinomial distribution.
    means = np.random.default_rng(seed).multinomial(n, counts / n, DRAWS) @ values / n
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same images: the accuracy of the second minus that of the first."""

    difference: float
    low: float  # of the interval of the difference, by a paired bootstrap over images
    high: float
    only_first: int  # images that only the first classifies correctly
    only_second: int
    p_value: float  # exact McNemar test
    n: int


def compare_paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """
    Compare two classifiers.

    Args:
        first: (n,), bool: whether the first classifier is right on each image.
        second: (n,), bool, for the same images in the same order.
        seed: Of the bootstrap.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    low, high = paired_bootstrap(second.astype(int) - first, seed)
    difference = (only_second - only_first) / len(first)
    return Comparison(difference, low, high, only_first, only_second, mcnemar(only_first, only_second), len(first))
