"""Attention weights of an encoder, block by block, reduced to what a page can hold."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, logging
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


RECORDING = "sailvit_recording"  # name among transformers' attention functions
# Patches along a side of the regions that queries and keys are reduced to, from fine to coarse.
REGIONS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 32), (64, 64), (128, 128))
FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class AttentionPlan:
    """
    Which attention is kept, and at which resolution.

    Attributes:
        total: Number of blocks of the model.
        blocks: Indices of the blocks whose attention is kept by query.
        query_side: Patches along a side of a region of queries, over which attention is averaged.
        key_side: Patches along a side of a region of keys, over which attention is summed.
        mean_side: The same for the attention averaged over all queries, which is kept of every block.
    """

    total: int
    blocks: tuple[int, ...]
    query_side: int
    key_side: int
    mean_side: int


@dataclass
class Attention:
    """
    Attention weights of the tiles of an image, without class token and registers; T tiles, h heads, Q and K regions.

    Attributes:
        plan: Which weights are kept.
        by_query: Block -> (T, h, Q, K): what a query of a region pays on average to all patches of another.
        mean: (blocks, T, h, K'): the same averaged over all queries.
        distance: (blocks, h): mean distance between query and key in patches, weighted with the attention.
        elsewhere: Largest share that a region pays to class token and registers.
    """

    plan: AttentionPlan
    by_query: dict[int, torch.Tensor]
    mean: torch.Tensor
    distance: torch.Tensor
    elsewhere: float


class AttentionUnavailableError(Exception):
    """The model has no attention weights of one query per patch; the message is why."""


def count_regions(patches: tuple[int, int], side: int) -> int:
    """Return the number of regions of `side` x `side` patches in a grid (rows, columns)."""
    rows, columns = patches
    return -(-rows // side) * -(-columns // side)


def evenly_spaced(count: int, total: int) -> tuple[int, ...]:
    """Return `count` different indices below `total`, evenly spaced, the last one included."""
    return tuple(-(-(step * total) // count) - 1 for step in range(1, count + 1))


def plan_attention(
    blocks: int,
    heads: int,
    tiles: int,
    patches: tuple[int, int],
    max_bytes: int,
    max_mean_bytes: int,
    chosen: Sequence[int] = (),
) -> AttentionPlan:
    """
    Return the finest plan whose attention, a byte for each weight, fits.

    Args:
        blocks, heads: Of the model.
        tiles: Of the image, its thumbnail included.
        patches: Rows and columns of the patch grid of a tile.
        max_bytes: For the attention by query.
        max_mean_bytes: For the attention averaged over queries.
        chosen: Blocks to keep by query; by default as many as fit, evenly spaced, at least three.

    Raises:
        ValueError: There is no such block, or the chosen ones do not fit.
    """
    if wrong := [block + 1 for block in chosen if not 0 <= block < blocks]:
        raise ValueError(f"block {wrong[0]}: expected 1 to {blocks}, the blocks of this model")
    needed = len(chosen) or min(FEWEST_BLOCKS, blocks)
    mean_side = next(
        (side for _, side in REGIONS if blocks * heads * tiles * count_regions(patches, side) <= max_mean_bytes),
        REGIONS[-1][1],
    )
    for query_side, key_side in REGIONS:
        size = heads * tiles * count_regions(patches, query_side) * count_regions(patches, key_side)
        if (fitting := max_bytes // size) >= needed:
            kept = tuple(sorted({*chosen})) or evenly_spaced(min(fitting, blocks), blocks)
            return AttentionPlan(blocks, kept, query_side, key_side, mean_side)
    raise ValueError(f"attention of {needed} blocks x {heads} heads x {tiles} tiles does not fit: choose fewer blocks")


@dataclass
class _Recorder:
    """An attention function of transformers that keeps reduced weights of every call."""

    plan: AttentionPlan
    patches: tuple[int, int]
    by_query: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    means: list[torch.Tensor] = field(default_factory=list)  # of every tile and block, tile by tile
    distances: list[torch.Tensor] = field(default_factory=list)
    elsewhere: float = 0.0
    block: int = 0

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Query, key and value (1, h, N, D/h) -> output (1, N, h, D/h); the weights are recorded."""
        weights = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = weights.softmax(-1, dtype=torch.float32)
        if self.block < self.plan.total:  # a pooling head may follow
            self._record(weights[0].cpu())
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    def _record(self, weights: torch.Tensor) -> None:
        """Reduce the weights (h, N, N) of one block and tile."""
        patches = self.patches[0] * self.patches[1]
        if weights.shape[1] != weights.shape[2] or weights.shape[1] < patches:
            shape = " x ".join(map(str, weights.shape[1:]))
            raise AttentionUnavailableError(f"a block attends with {shape} weights to {patches} patches")
        others = weights.shape[1] - patches  # class token and registers, which come first
        if others:
            self.elsewhere = max(self.elsewhere, weights[:, others:, :others].sum(-1).max().item())
        weights = weights[:, others:, others:]
        keys = region_matrix(self.patches, self.plan.mean_side)
        self.means.append(weights.mean(1) @ keys.T)
        distance = patch_distances(self.patches)
        self.distances.append((weights * distance).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1e-30))
        if self.block in self.plan.blocks:
            queries = region_matrix(self.patches, self.plan.query_side)
            queries = queries / queries.sum(1, keepdim=True)
            reduced = queries @ weights @ region_matrix(self.patches, self.plan.key_side).T
            self.by_query.setdefault(self.block, []).append(reduced)
        self.block += 1


def region_matrix(patches: tuple[int, int], side: int) -> torch.Tensor:
    """Return (regions, patches), 1 where a patch is in a region of `side` x `side`, smaller at the ends."""
    rows, columns = patches
    across = -(-columns // side)
    region = (torch.arange(rows) // side)[:, None] * across + torch.arange(columns) // side
    return torch.nn.functional.one_hot(region.flatten(), count_regions(patches, side)).T.float()


def expand_regions(values: torch.Tensor, patches: tuple[int, int], side: int) -> torch.Tensor:
    """Return (..., rows, columns), for each patch the value of its region, from (..., regions)."""
    rows, columns = patches
    regions = values.unflatten(-1, (-(-rows // side), -(-columns // side)))
    return regions.repeat_interleave(side, -2).repeat_interleave(side, -1)[..., :rows, :columns]


def patch_distances(patches: tuple[int, int]) -> torch.Tensor:
    """Return the distances (N, N) between the patches of a grid (rows, columns)."""
    places = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float32) for count in patches))
    return torch.cdist(places, places)


@contextmanager
def _attention_function(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """Run a model with an attention function; one that does not dispatch attention ignores it."""
    before, verbosity = model.config._attn_implementation, logging.get_verbosity()
    ALL_ATTENTION_FUNCTIONS[RECORDING] = function
    logging.set_verbosity_error()  # on models that do not dispatch attention
    try:
        model.set_attn_implementation(RECORDING)
        yield
    finally:
        model.set_attn_implementation(before)
        logging.set_verbosity(verbosity)
        del ALL_ATTENTION_FUNCTIONS[RECORDING]


def record_attention(
    model: PreTrainedModel,
    tiles: torch.Tensor,
    patches: tuple[int, int],
    plan: AttentionPlan,
    run: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, Attention]:
    """
    Return what `run` returns for every tile, concatenated, and the attention weights of all blocks.

    One tile and one block are in memory at a time.

    Args:
        model: An encoder whose attention is dispatched by transformers' AttentionInterface.
        tiles: (T, 3, height, width).
        patches: Rows and columns of the patch grid of a tile.
        plan: What is kept.
        run: Called with one tile (1, 3, height, width); runs the model once.

    Raises:
        AttentionUnavailableError: The model does not dispatch its attention, or has other weights than one query per
            patch.
    """
    recorder = _Recorder(plan, patches)
    outputs = []
    with _attention_function(model, recorder):
        for tile in tiles:
            recorder.block = 0
            outputs.append(run(tile[None]))
            if recorder.block != plan.total:
                how = "calls transformers' AttentionInterface"
                raise AttentionUnavailableError(f"the model {how} in {recorder.block} of its {plan.total} blocks")
    shape = (len(tiles), plan.total)
    means = torch.stack(recorder.means).unflatten(0, shape).transpose(0, 1)
    distance = torch.stack(recorder.distances).unflatten(0, shape).mean(0)
    by_query = {block: torch.stack(kept) for block, kept in recorder.by_query.items()}
    return torch.cat(outputs), Attention(plan, by_query, means, distance, recorder.elsewhere)
