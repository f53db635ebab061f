"""TODO convert/storage/hashes.py."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .errors import CheckpointError, Problem, raise_if_any
from .sources import PROVENANCE
from .tensors import StoredTensor, is_finite
from .torch_pickle import broken_member


if TYPE_CHECKING:
    pass


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
        raise_if_any(value_problems(stored, hashes), checkpoint.source.name)


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
