"""TODO convert/models/aimv2_state_dict.py."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.tensors import StoredTensor, load_float32
from .aimv2_names import get_layout, match_aimv2, plan_tensors


if TYPE_CHECKING:
    import torch


def compute_positions(learned: StoredTensor | None, width: int, grid_size: int) -> "torch.Tensor":
    """
    Positions for another grid, (1, grid_size ** 2, width) in float32: learned ones resampled (bicubic, antialiased), or
    the 2-D sine-cosine of `native` towers where there are none.
    """
    from ...modeling_sailvit import resample_position_embeddings, sincos_position_embeddings

    grid = (grid_size, grid_size)
    if learned is None:
        return sincos_position_embeddings(grid, width)
    return resample_position_embeddings(load_float32(learned).reshape(1, -1, width), grid)


def convert_tensors(tensors: "Mapping[str, torch.Tensor]", to_layout: str) -> "dict[str, torch.Tensor]":
    """
    A state dict in any layout -> the same tower's in another, without copies where a name is all that changes. The
    numbers are not looked at, and keep their dtypes.

    Args:
        tensors: Of a whole tower, with any prefix; heads and other parts are left out.
        to_layout: A key of LAYOUTS.

    Raises:
        CheckpointError: They are no tower, or not a whole one, or have sine-cosine positions, which the layout lacks;
            there is no such layout.
    """
    import torch

    from .aimv2_config import measure

    target, found = get_layout(to_layout), match_aimv2(tensors)
    shape, problems = measure(found, {short: tuple(tensors[name].shape) for short, name in found.names.items()})
    if shape.grid_size is None and not target.has_sincos:
        problems.append(Problem("layout", target.name, "has no sine-cosine positions, and no grid is known here"))
    raise_if_any(problems)
    converted = {}
    for move in plan_tensors(found.layout, target, shape, shape.grid_size):
        runs = [tensors[found.names[name]].reshape(-1)[start:stop] for name, start, stop in move.sources]
        if len({run.dtype for run in runs}) > 1:
            raise CheckpointError(f"{move.target.released}: its parts have different dtypes")
        whole = runs[0] if len(runs) == 1 else torch.cat(runs)
        converted[target.prefix + move.target.name] = whole.reshape(move.target.shape)
    return converted
