"""Interleaved timing: all candidates run in every round, so that changes of machine speed affect all equally."""

import statistics
import time
from collections.abc import Callable

import torch


def medians(
    candidates: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of every candidate over `rounds` rounds, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for is_warm in [False, *[True] * rounds]:
        for name, run in candidates.items():
            synchronize()
            started = clock()
            run()
            synchronize()
            if is_warm:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_ratios(title: str, ratios: dict[str, float]) -> None:
    """Print the ratios of a benchmark, which the documentation lists."""
    print(f"\n{title}")
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}x  {name}")
