"""Intervals of accuracies, and paired comparisons of two classifiers on the same images."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


CONFIDENCE = 0.95
DRAWS = 10_000  # of the bootstrap


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the interval of an accuracy (Wilson, 1927)."""
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


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
    n, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    # Drawing n images with replacement draws the numbers of these three kinds from a multinomial distribution.
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, DRAWS)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, [tail, 1 - tail])
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return Comparison(
        (only_second - only_first) / n, float(low), float(high), only_first, only_second, float(p_value), n
    )
