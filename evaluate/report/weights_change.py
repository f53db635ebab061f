"""Relative change of weights: by component, and by block. Tensors are read in chunks, both models side by side."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ...convert.storage.checkpoint import Checkpoint
from ...convert.storage.names import strip_wrapper_prefixes
from ...convert.storage.tensors import StoredTensor, cast_stream, spans


CHUNK = 1 << 20  # elements in memory at a time
COMPONENTS = {"vision_model": "vision", "mlp1": "connector", "language_model": "language"}
BLOCK = re.compile(r"\.(\d+)\.")  # the number of a block in the name of a tensor, from 0
OUTSIDE = "other"  # tensors of a component that are in no block: embeddings, norms


@dataclass(frozen=True)
class WeightsChange:
    """
    ||after - before|| / ||before|| in the Frobenius norm, over all tensors of a part.

    Attributes:
        components: Of vision, connector and language.
        blocks: Of the vision encoder: number, from 1, or OUTSIDE -> change, in this order.
        left_out: Names of tensors that one model lacks, or that have another shape.
    """

    components: Mapping[str, float]
    blocks: Mapping[int | str, float]
    left_out: tuple[str, ...]


def weights_change(before: Checkpoint, after: Checkpoint) -> WeightsChange:
    """
    Compare the weights of two multimodal models.

    Args:
        before: What the change is relative to.
        after: The other one, with the same names.

    Raises:
        ValueError: They have no tensor of a vision encoder in common, or a value is NaN or infinite.
    """
    first, second = (
        {strip_wrapper_prefixes(name): model[name] for name in model.weight_map} for model in (before, after)
    )
    common = [name for name in first if name in second and first[name].shape == second[name].shape]
    components: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    blocks: dict[int | str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for name in common:
        component = COMPONENTS.get(name.split(".")[0])
        if component is None:
            continue
        sums = _sums(name, first[name], second[name])
        components[component] += sums
        if component == "vision":
            blocks[_block_of(name)] += sums
    if not blocks:
        raise ValueError(
            f"{before.source.name} and {after.source.name}: no vision_model.* tensor in common: expected the model "
            "that the run was trained from"
        )
    ordered = sorted(blocks, key=lambda block: (block == OUTSIDE, block if block != OUTSIDE else 0))
    left_out = sorted({*first, *second} - {*common})
    return WeightsChange(
        {name: _ratio(components[name]) for name in COMPONENTS.values() if name in components},
        {block: _ratio(blocks[block]) for block in ordered},
        tuple(left_out),
    )


def _block_of(name: str) -> int | str:
    match = BLOCK.search(name)
    return int(match[1]) + 1 if match else OUTSIDE


def _sums(name: str, before: StoredTensor, after: StoredTensor) -> np.ndarray:
    """Return the sums of squares of the difference, and of `before`."""
    total = np.zeros(2)
    for start, stop in spans(0, prod(before.shape), CHUNK):
        first, second = (_read(name, tensor, start, stop) for tensor in (before, after))
        total += (((second - first) ** 2).sum(), (first**2).sum())
    return total


def _read(name: str, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    chunks = [*cast_stream(tensor, name, "F32", start, stop)]
    return np.concatenate(chunks).view(np.float32).astype(np.float64)


def _ratio(sums: np.ndarray) -> float:
    """Return the root of the ratio; of a part that was zero, infinity if it changed."""
    changed, norm = sums
    if not norm:
        return 0.0 if not changed else float("inf")
    return float((changed / norm) ** 0.5)
