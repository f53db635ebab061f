"""What is done to the numbers of a checkpoint: looked at, cast, and, where positions are wanted elsewhere, computed."""

import hashlib
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from .problems import CheckpointError, Problem, raise_first
from .readers import FLOAT_BITS, PROVENANCE, TORCH_DTYPES, Checkpoint, StoredTensor, broken_member


if TYPE_CHECKING:
    import torch


def is_finite(chunk: np.ndarray, dtype: str) -> bool:
    """Whether the bytes of a chunk hold no NaN and no infinity; what is not floating point does not."""
    if dtype not in FLOAT_BITS or not len(chunk):
        return True
    bits, magnitude, infinity = FLOAT_BITS[dtype]
    return int((chunk.view(bits) & bits(magnitude)).max()) < infinity


def torch_name(dtype: str) -> str:
    """ "F32" -> "float32"."""
    return next(name for name, key in TORCH_DTYPES.items() if key == dtype)


def cast(chunk: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """The bytes of a chunk in another dtype, rounded to nearest even."""
    if dtype == wanted:
        return chunk
    if (dtype, wanted) == ("F32", "BF16") and is_finite(chunk, dtype):  # without torch, which is large
        bits = chunk.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)
    if (dtype, wanted) == ("BF16", "F32"):
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    import torch

    numbers = torch.from_numpy(chunk).view(getattr(torch, torch_name(dtype)))
    return to_bytes(numbers.to(getattr(torch, torch_name(wanted))))


def to_bytes(tensor: "torch.Tensor") -> np.ndarray:
    """A tensor's elements, row-major, as bytes (uint8)."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def is_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, by their bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        a is not None and b is not None and np.array_equal(a, b) for a, b in zip_longest(one.chunks(), other.chunks())
    )


def load(stored: StoredTensor, rounded_to: str = "F32") -> "torch.Tensor":
    """A stored tensor in float32, its values rounded to those that another dtype has."""
    import torch

    chunks = [cast(cast(chunk, stored.dtype, rounded_to), rounded_to, "F32") for chunk in stored.chunks()]
    return torch.from_numpy(np.concatenate(chunks)).view(torch.float32).reshape(stored.shape)


def compute_positions(learned: StoredTensor | None, width: int, grid_size: int) -> "torch.Tensor":
    """
    Positions for another grid, (1, grid_size ** 2, width) in float32: learned ones resampled (bicubic, antialiased), or
    the 2-D sine-cosine of `native` towers where there are none.
    """
    from ..modeling_sailvit import resample_position_embeddings, sincos_position_embeddings

    grid = (grid_size, grid_size)
    if learned is None:
        return sincos_position_embeddings(grid, width)
    return resample_position_embeddings(load(learned).reshape(1, -1, width), grid)


def recorded_hashes(provenance: Mapping[str, Any], what: str) -> dict[str, str]:
    """
    Name -> sha256 of the "tensors" or the "files" that a provenance.json has.

    Raises:
        CheckpointError: It has them in another form.
    """
    entries = provenance.get(what, {})
    try:
        return {name: entry["sha256"] for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{PROVENANCE}: its {what} are no map of hashes: remove the file") from error


def check_values(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> None:
    """
    Holds tensors against the provenance.json beside them, and against checksums of their files, where there are.

    Args:
        stored: By their names in the checkpoint.

    Raises:
        CheckpointError: They are not what was recorded.
    """
    hashes = recorded_hashes(checkpoint.document(PROVENANCE), "tensors")
    if hashes or any(tensor.mapped is not None for tensor in stored.values()):
        raise_first(value_problems(stored, hashes), checkpoint.source.name)


def value_problems(
    tensors: Mapping[str, StoredTensor],
    hashes: Mapping[str, str],
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """
    Reads every tensor, and holds files of torch.save against their own checksums.

    Args:
        tensors: By their names in the checkpoint.
        hashes: Name -> sha256 they should have, in hexadecimal, where that is known.
        on_progress: Called with the number of bytes read since the last call.
    """
    problems = []
    for file in {tensor.file for tensor in tensors.values() if tensor.mapped is not None}:
        if broken := broken_member(file):
            problems.append(Problem("values", file.name, f"{broken} in it is broken: copy or download it again"))
    for name, tensor in tensors.items():
        digest, finite = hashlib.sha256(), True
        for chunk in tensor.chunks():
            finite = finite and is_finite(chunk, tensor.dtype)
            if name in hashes:
                digest.update(chunk)
            on_progress(len(chunk))
        if not finite:
            problems.append(Problem("values", name, "holds NaN or infinity"))
        if name in hashes and digest.hexdigest() != hashes[name]:
            what = (
                f"is not what {PROVENANCE} recorded: copy or download it again, or remove that file if it was changed"
            )
            problems.append(Problem("sha256", name, what))
    return problems
