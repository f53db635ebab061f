"""Conversion of AIMv2 state dicts in memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.tensors import StoredTensor, load_float32
from .aimv2_config import infer_dimensions
from .aimv2_names import AIMV2, plan_layout
from .name_tables import match_names


if TYPE_CHECKING:
    import torch


def compute_positions(learned: StoredTensor | None, width: int, grid_size: int) -> "torch.Tensor":
    """
    Return position embeddings for another grid, (1, grid_size ** 2, width) in float32: learned ones resampled (bicubic,
    antialiased), or the 2-D sine-cosine ones of `native` encoders if there are none.
    """
    from ...modeling_sailvit import resample_position_embeddings, sincos_position_embeddings

    grid = (grid_size, grid_size)
    if learned is None:
        return sincos_position_embeddings(grid, width)
    return resample_position_embeddings(load_float32(learned).reshape(1, -1, width), grid)


def convert_tensors(tensors: "Mapping[str, torch.Tensor]", to_layout: str) -> "dict[str, torch.Tensor]":
    """
    Convert the state dict of an encoder from any layout to another. Tensors that only change names are not copied;
    values are not validated, and keep their dtypes.

    Args:
        tensors: Of a whole tower, under any prefix; heads and other models are left out.
        to_layout: A key of LAYOUTS.

    Raises:
        CheckpointError: They are no whole tower, or have sine-cosine position embeddings, which the layout lacks, or
            there is no such layout.
    """
    import torch

    target, match = AIMV2.scheme(to_layout), match_names(tensors, AIMV2).read(tensors)
    dimensions, problems = infer_dimensions(match)
    if dimensions.grid_size is None and not target.has_sincos:
        what = "needs learned position embeddings, got sine-cosine ones, and no grid to compute them for"
        problems.append(Problem("layout", target.name, what))
    raise_if_any(problems)
    converted = {}
    for one in plan_layout(match.scheme, target, dimensions, dimensions.grid_size):
        slices = [match.tensors[name].reshape(-1)[start:stop] for name, start, stop in one.sources]
        if len(dtypes := {str(part.dtype) for part in slices}) > 1:
            raise CheckpointError(f"{one.target.canonical}: expected one dtype, got {', '.join(sorted(dtypes))}")
        whole = slices[0] if len(slices) == 1 else torch.cat(slices)
        converted[target.prefix + one.target.name] = whole.reshape(one.target.shape)
    return converted
