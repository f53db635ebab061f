# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Packing inside the optimizer step: the samples of a step become balanced packs, k per rank.

    seed, epoch -> permutation of the epoch -> samples of step n -> ranks x k packs -> one row of tensors per pack

Step n takes samples [n * S, (n + 1) * S) of the concatenated epochs, where S is `samples_per_step`, however many ranks
there are. Only the permutation is computed ahead, so the state of a run is (seed, epoch, step), and resuming costs the
same at any step.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..configuration_sailvl import SAILVLConfig
from .collate import Pack, read_pack
from .corpus import TOO_LONG, Corpus
from .flops import forward_flops_of_tile, forward_flops_of_token, meta_model
from .order import EpochOrder


# Steps that `PackedBatches.statistics` plans by default, evenly spaced.
STATISTICS_STEPS = 200


# Plan: the samples of a step -> packs


def plan_step(
    tokens: Sequence[int],
    tiles: Sequence[int],
    ranks: int,
    max_tokens: int,
    max_tiles: int | None,
    tile_cost: float,
) -> list[list[list[int]]]:
    """
    Divide the samples of a step into ranks x k packs of similar cost.

    The cost of a sample is `tokens + tile_cost * tiles`. The costliest sample goes first, to the pack of the lowest
    cost that has room for it. k is the smallest number of packs per rank for which every sample finds room, up to 1%
    more if it is above 100. Packs of similar cost have the same position on all ranks, because a micro-step lasts as
    long as its slowest rank.

    Args:
        tokens, tiles: Tokens (visual tokens included) and tiles of every sample of the step.
        max_tokens, max_tiles: The most tokens and tiles of a pack; None for any number of tiles.
        tile_cost: Cost of encoding a tile, in tokens of the language model; see `tile_cost`.

    Returns:
        [rank][pack] -> sorted positions of the samples in the step; k packs on every rank, of which some may be empty.

    Raises:
        ValueError: A sample does not fit into a pack.
    """
    tokens, tiles = _as_list(tokens), _as_list(tiles)
    most_tiles = sum(tiles) if max_tiles is None else max_tiles
    _check_fit(tokens, tiles, max_tokens, most_tiles)
    costs = [length + tile_cost * count for length, count in zip(tokens, tiles, strict=True)]
    order = sorted(range(len(costs)), key=lambda position: (-costs[position], position))

    def fill(packs_per_rank: int) -> list[list[int]] | None:
        return _fill_packs(order, costs, tokens, tiles, ranks * packs_per_rank, max_tokens, most_tiles)

    packs = _first_filled(fill, _fewest_packs(tokens, tiles, ranks, max_tokens, most_tiles))
    return _assign_to_ranks(packs, costs, ranks)


def _first_filled(fill: Callable[[int], list[list[int]] | None], least: int) -> list[list[int]]:
    """Return the packs of the smallest number, from `least` on, with which `fill` succeeds; to 1% of it."""
    if (packs := fill(least)) is not None:
        return packs
    resolution = 1 + least // 100
    failed, step = least, resolution
    while (packs := fill(failed + step)) is None:
        failed, step = failed + step, 2 * step
    enough = failed + step
    while enough - failed > resolution:
        middle = (failed + enough) // 2
        if (found := fill(middle)) is None:
            failed = middle
        else:
            enough, packs = middle, found
    return packs


def _as_list(numbers: Sequence[int]) -> list[int]:
    return numbers.tolist() if isinstance(numbers, np.ndarray) else list(numbers)  # numpy's scalars are slow


def _check_fit(tokens: list[int], tiles: list[int], max_tokens: int, max_tiles: int) -> None:
    for position, (length, count) in enumerate(zip(tokens, tiles, strict=True)):
        if length > max_tokens or count > max_tiles:
            raise ValueError(
                f"sample {position} of the step: expected at most {max_tokens} tokens and {max_tiles} tiles, got "
                f"{length} and {count}: raise the limits of a pack, or drop or truncate long samples"
            )


def _fewest_packs(tokens: list[int], tiles: list[int], ranks: int, max_tokens: int, max_tiles: int) -> int:
    """Return a lower bound of the packs per rank: by sums, and by samples larger than half a pack, one per pack."""
    bounds = [1]
    for sizes, limit in ((tokens, max_tokens), (tiles, max_tiles)):
        if limit:
            bounds += [math.ceil(sum(sizes) / limit), sum(2 * size > limit for size in sizes)]
    return math.ceil(max(bounds) / ranks)


def _fill_packs(
    order: list[int],
    costs: list[float],
    tokens: list[int],
    tiles: list[int],
    num_packs: int,
    max_tokens: int,
    max_tiles: int,
) -> list[list[int]] | None:
    """Put every sample into the least loaded pack that has room; None if one finds no room."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [(max_tokens, max_tiles)] * num_packs
    heap = [(0.0, index) for index in range(num_packs)]  # (cost of the pack, its index)
    shortest = list(accumulate((tokens[position] for position in reversed(order)), min))  # of the samples to come
    for position in order:
        least, too_full = shortest.pop(), []
        while heap:
            load, index = heapq.heappop(heap)
            free_tokens, free_tiles = room[index][0] - tokens[position], room[index][1] - tiles[position]
            if free_tokens >= 0 and free_tiles >= 0:
                break
            if room[index][0] >= least:  # else it has no room for any other sample, either
                too_full.append((load, index))
        else:
            return None
        packs[index].append(position)
        room[index] = (free_tokens, free_tiles)
        for entry in [*too_full, (load + costs[position], index)]:
            heapq.heappush(heap, entry)
    return packs


def _assign_to_ranks(packs: list[list[int]], costs: list[float], ranks: int) -> list[list[list[int]]]:
    """
    Give every rank one pack of each group of `ranks` packs of similar cost, the costliest group first.

    The direction alternates from group to group, which also balances the sums of the ranks.
    """
    loads = [sum(costs[position] for position in pack) for pack in packs]
    by_load = sorted(range(len(packs)), key=lambda index: (-loads[index], index))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(packs), ranks):
        group = by_load[start : start + ranks]
        for rank, index in zip(plan, group if start // ranks % 2 == 0 else group[::-1], strict=True):
            rank.append(sorted(packs[index]))
    return plan


def plan_without_packing(
    tokens: Sequence[int], tiles: Sequence[int], ranks: int, tile_cost: float
) -> list[list[list[int]]]:
    """Return a plan as `plan_step` does in which every pack is one sample, or empty."""
    costs = [length + tile_cost * count for length, count in zip(_as_list(tokens), _as_list(tiles), strict=True)]
    packs_per_rank = math.ceil(len(costs) / ranks)
    packs = [[position] for position in range(len(costs))]
    return _assign_to_ranks(packs + [[]] * (ranks * packs_per_rank - len(packs)), costs, ranks)


# Cost: FLOPs of a tile in tokens


def tile_cost(config: SAILVLConfig) -> float:
    """
    Return the FLOPs of encoding a tile divided by the FLOPs of the language model for a token.

    With W the weights of linear layers and convolutions, N patches of a tile, f the pixel shuffle factor, L layers of
    width D:

        tile:  2 N W(vision encoder) + 4 L N^2 D (attention) + 2 (N / f^2) W(connector)
        token: 2 W(decoder layers)

    Of the experts of a mixture only the share that a token visits counts. The attention of the language model depends
    on the length of a sample, and its LM head runs at the positions of answers only: both are left out. Normalisation,
    activations and class tokens are left out, too. The ratio is that of a forward pass; it holds for a backward pass
    where all components are trained.

    Args:
        config: Any vision encoder and language model; the model is built without memory (on the meta device).
    """
    model = meta_model(config)
    return forward_flops_of_tile(model) / forward_flops_of_token(model)


# Batches: step -> the packs of a rank


class PackedBatches(Dataset):
    """
    The steps of a run: `batches[step]` is the list of packs of one rank.

        DataLoader(batches, batch_size=None, sampler=range(first_step, len(batches)), num_workers=4)

    The samples of a step depend on (seed, step) and `samples_per_step` only, not on the number of ranks, workers or
    packs. All ranks have the same number of packs in a step. Only the last step of the run may be short.

    Args:
        corpus: The samples, with their lengths.
        samples_per_step: Samples of an optimizer step, all ranks together.
        max_tokens_per_pack, max_tiles_per_pack: The most tokens (visual tokens included) and tiles of a pack.
        ranks, rank: The number of processes, and the one whose packs are read.
        seed: Of the order of samples.
        epochs: Passes over the corpus; may be a fraction.
        too_long: What to do with a sample longer than a pack: "drop", "truncate" or "fail"; see `Corpus.fit`.
        tile_cost: Cost of encoding a tile, in tokens of the language model; `tile_cost(model.config)` computes it.
            Default: the number of its visual tokens, about right for SAILViT-Large and a language model of 1.5B.
        packing: False for one sample per pack.
        uint8_tiles: Return the tiles as uint8, a quarter of the bytes; `normalize_tiles` makes pixel_values of them.
        flash_attention: Add the arguments that FlashAttention needs to keep the samples of a pack apart.

    Raises:
        ValueError: An argument is out of range, or no sample fits into a pack.
    """

    def __init__(
        self,
        corpus: Corpus,
        samples_per_step: int,
        max_tokens_per_pack: int = 8192,
        max_tiles_per_pack: int | None = None,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        epochs: float = 1,
        too_long: str = "drop",
        tile_cost: float | None = None,
        packing: bool = True,
        uint8_tiles: bool = False,
        flash_attention: bool = False,
    ):
        _check_arguments(locals())
        self.corpus = corpus.fit(max_tokens_per_pack, max_tiles_per_pack, too_long)
        if not len(self.corpus):
            raise ValueError(
                f"expected at least one sample of at most {max_tokens_per_pack} tokens and {max_tiles_per_pack} tiles, "
                f"got none of {len(corpus)}: raise max_tokens_per_pack or max_tiles_per_pack"
            )
        self.samples_per_step, self.ranks, self.rank = samples_per_step, ranks, rank
        self.max_tokens_per_pack, self.max_tiles_per_pack = max_tokens_per_pack, max_tiles_per_pack
        self.tile_cost = float(corpus.processor.image_seq_length if tile_cost is None else tile_cost)
        self.packing, self.uint8_tiles, self.flash_attention = packing, uint8_tiles, flash_attention
        self.num_samples = math.ceil(len(self.corpus) * epochs)
        self.order = EpochOrder(len(self.corpus), seed, self.corpus.cache_dir, self.corpus.fingerprint)

    def __len__(self) -> int:
        """Return the number of steps."""
        return math.ceil(self.num_samples / self.samples_per_step)

    def samples(self, step: int) -> np.ndarray:
        """Return the corpus indices of the samples of a step, all ranks together, in the order of the epoch."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step}: expected 0 to {len(self) - 1}")
        start = int(step) * self.samples_per_step
        return self.order.samples(start, min(start + self.samples_per_step, self.num_samples))

    def plan(self, step: int) -> list[list[list[int]]]:
        """Return [rank][pack] -> corpus indices."""
        indices = self.samples(step)
        positions = self._plan_positions(indices)
        indices = indices.tolist()
        return [[[indices[position] for position in pack] for pack in rank] for rank in positions]

    def _plan_positions(self, indices: np.ndarray) -> list[list[list[int]]]:
        tokens, tiles = self.corpus.tokens[indices], self.corpus.tiles[indices]
        if not self.packing:
            return plan_without_packing(tokens, tiles, self.ranks, self.tile_cost)
        limits = (self.max_tokens_per_pack, self.max_tiles_per_pack)
        return plan_step(tokens, tiles, self.ranks, *limits, self.tile_cost)

    def __getitem__(self, step: int) -> list[Pack]:
        """Read the samples of a step of this rank, and return its packs."""
        options = {"uint8_tiles": self.uint8_tiles, "flash_attention": self.flash_attention}
        return [read_pack(self.corpus, pack, **options) for pack in self.plan(step)[self.rank]]

    def statistics(self, steps: Iterable[int] | None = None) -> dict[str, Any]:
        """
        Plan steps and return how well they are packed. No sample is read.

        Args:
            steps: Default: all, or 200 evenly spaced ones if there are more.

        Returns:
            steps: The number of steps planned.
            packs_per_rank: {min, mean, max}.
            fill: Useful tokens / capacity of all packs.
            balance: Time of the steps if a micro-step lasts as long as its costliest pack / time if all ranks were
                always busy.
        """
        if steps is None:
            steps = np.unique(np.linspace(0, len(self) - 1, STATISTICS_STEPS).astype(int)).tolist()
        useful, times, ideals, packs_per_rank = 0, 0.0, 0.0, []
        for step in steps:
            plan = self.plan(step)
            costs = self._pack_costs(plan)
            useful += int(self.corpus.tokens[self.samples(step)].sum())
            times += costs.max(0).sum()
            ideals += costs.sum() / self.ranks
            packs_per_rank.append(len(plan[0]))
        if not packs_per_rank:
            raise ValueError("expected at least one step, got none")
        return {
            "steps": len(packs_per_rank),
            "packs_per_rank": {
                "min": min(packs_per_rank),
                "mean": sum(packs_per_rank) / len(packs_per_rank),
                "max": max(packs_per_rank),
            },
            "fill": useful / (sum(packs_per_rank) * self.ranks * self.max_tokens_per_pack),
            "balance": float(times / ideals),
        }

    def _pack_costs(self, plan: list[list[list[int]]]) -> np.ndarray:
        """Return the cost of every pack (ranks, k), in tokens of the language model."""
        tokens, tiles = self.corpus.tokens, self.corpus.tiles
        return np.array(
            [
                [tokens[pack].sum() + self.tile_cost * tiles[pack].sum() if pack else 0.0 for pack in rank]
                for rank in plan
            ]
        )


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise a ValueError that names the first argument of PackedBatches that is out of range."""
    for name, least in {
        "samples_per_step": 1,
        "max_tokens_per_pack": 1,
        "max_tiles_per_pack": 1,
        "ranks": 1,
        "rank": 0,
        "seed": 0,
    }.items():
        value = arguments[name]
        if value is None and name == "max_tiles_per_pack":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if arguments["rank"] >= arguments["ranks"]:
        raise ValueError(f"rank: expected 0 to {arguments['ranks'] - 1}, got {arguments['rank']}")
    for name, least in {"epochs": "above 0", "tile_cost": "of at least 0"}.items():
        value = arguments[name]
        if value is None and name == "tile_cost":
            continue
        if not _is_finite(value) or value < 0 or (name == "epochs" and value == 0):
            raise ValueError(f"{name}: expected a number {least}, got {value!r}")
    if arguments["too_long"] not in TOO_LONG:
        raise ValueError(f"too_long: expected one of {', '.join(TOO_LONG)}, got {arguments['too_long']!r}")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
