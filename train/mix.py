# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Which samples an epoch has: a part or a multiple of every source, and shares of kinds."""

from collections.abc import Mapping, Sequence

import numpy as np

from .order import permutation


def draw(entries: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """Return `count` of the entries: each of them equally often, and a random part of them once more; sorted."""
    times, rest = divmod(count, len(entries))
    part = np.sort(permutation(len(entries), *seed)[:rest])
    return np.sort(np.concatenate([np.repeat(entries, times), entries[part]]), kind="stable")


def scale_kinds(counts: Mapping[str, int], shares: Mapping[str, float], total: int | None = None) -> dict[str, int]:
    """
    Return the samples of every kind after some kinds are set to shares of the total (paper, appendix F).

    Args:
        counts: Samples of every kind.
        shares: Kind -> share of the total. The other kinds are scaled evenly.
        total: Default: the sum of counts, so that it stays.

    Raises:
        ValueError: A kind has no samples, or nothing is left for the other kinds, or there are none.
    """
    total = total or sum(counts.values())
    for kind in shares:
        if not counts.get(kind):
            raise ValueError(
                f"kinds: no source has samples of kind {kind!r}; the kinds are {', '.join(sorted(counts))}"
            )
    others = {kind: count for kind, count in counts.items() if kind not in shares}
    left = 1 - sum(shares.values())
    if bool(others) != (left > 1e-9):
        left_out = ", ".join(sorted(others))
        fix = f"lower them, so that {left_out} get samples" if others else "expected 1, no other kind is left"
        raise ValueError(f"kinds: the shares add up to {1 - left:g}: {fix}")
    factor = left * total / max(1, sum(others.values()))
    exact = {kind: shares[kind] * total if kind in shares else factor * count for kind, count in counts.items()}
    return _round_to(exact, total)


def _round_to(exact: dict[str, float], total: int) -> dict[str, int]:
    """Round numbers so that their sum is `total`: those with the largest remainders up, equal ones by name."""
    rounded = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: (round(rounded[kind] - exact[kind], 9), kind))
    for kind in by_remainder[: total - sum(rounded.values())]:
        rounded[kind] += 1
    return rounded
