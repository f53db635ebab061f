"""Interleaved timing: every contender in turn, round after round, so that a drifting machine is unfair to none."""

import statistics
import time
from collections.abc import Callable

import torch


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every contender over `rounds` rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False, *[True] * rounds]:
        for name, run in contenders.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if counted:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_ratios(title: str, ratios: dict[str, float]) -> None:
    """The last lines of a benchmark: what the README's table is made of."""
    print(f"\n{title}")
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}x  {name}")
