# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Intervals of accuracies, and paired tests of two models on the same questions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


Z_95 = 1.959963984540054  # 97.5th percentile of the normal distribution
RESAMPLES = 10_000


class Interval(NamedTuple):
    low: float
    high: float


def wilson_interval(right: int, n: int) -> Interval:
    """
    Return the 95% score interval of an accuracy (Wilson 1927): `right` of `n` answers are right.

    Raises:
        ValueError: `n` is 0, or `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n or not n:
        raise ValueError(f"expected 0 <= right <= n and n > 0, got right {right}, n {n}")
    share, squared = right / n, Z_95**2
    center = (share + squared / (2 * n)) / (1 + squared / n)
    half = Z_95 / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    return Interval(0.0 if right == 0 else center - half, 1.0 if right == n else center + half)


def mcnemar(a_only: int, b_only: int) -> float:
    """
    Return the two-sided p-value of McNemar's exact test (binomial, McNemar 1947).

    Args:
        a_only: Questions that only model A answers right.
        b_only: Questions that only model B answers right.

    Raises:
        ValueError: A count is negative.
    """
    if min(a_only, b_only) < 0:
        raise ValueError(f"expected counts of at least 0, got {a_only} and {b_only}")
    n, fewer = a_only + b_only, min(a_only, b_only)
    tail, term = 0, 1  # term is the binomial coefficient (n, k)
    for k in range(fewer + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(differences: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """
    Return the 95% percentile interval of a mean difference, from resampled questions.

    Args:
        differences: Score of B minus score of A, one per question.

    Raises:
        ValueError: There is no question.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size:
        raise ValueError("expected the differences of at least one question, got none")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, values.size, values.size)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))
