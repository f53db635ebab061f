"""Checks of tensor values: NaN, infinities, recorded hashes, checksums of archives."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .errors import CheckpointError, Problem, raise_if_any
from .sources import PROVENANCE
from .tensors import StoredTensor, is_finite
from .torch_pickle import corrupt_member


def recorded_hashes(provenance: Mapping[str, Any], section: str) -> dict[str, str]:
    """
    Map the names in a section of provenance.json ("tensors" or "files") to their sha256.

    Raises:
        CheckpointError: The section has another form.
    """
    try:
        return {name: entry["sha256"] for name, entry in provenance.get(section, {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{PROVENANCE}: its {section} are no map of hashes: remove the file") from error


def check_values(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> None:
    """
    Check tensors against the source's provenance.json and their files' checksums, where there are any.

    Args:
        stored: By their names in the checkpoint.

    Raises:
        CheckpointError: A tensor was changed.
    """
    hashes = recorded_hashes(checkpoint.document(PROVENANCE), "tensors")
    if hashes or any(_has_checksum(tensor) for tensor in stored.values()):
        raise_if_any(value_problems(stored, hashes), checkpoint.source.name)


def value_problems(
    tensors: Mapping[str, StoredTensor],
    hashes: Mapping[str, str],
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """
    Read every tensor, and the checksums of torch.save's archives.

    Args:
        tensors: By their names in the checkpoint.
        hashes: Name -> expected sha256 in hexadecimal, as far as it is known.
        on_progress: Called with the number of bytes read since the last call.
    """
    problems = []
    for file in {tensor.file for tensor in tensors.values() if _has_checksum(tensor)}:
        if member := corrupt_member(file):
            problems.append(Problem("values", file.name, f"{member} in it is corrupt: copy or download it again"))
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
            fix = "copy or download it again, or remove that file if it was changed"
            problems.append(Problem("sha256", name, f"is not what {PROVENANCE} recorded: {fix}"))
    return problems


def _has_checksum(tensor: StoredTensor) -> bool:
    """Whether its file may be an archive of torch.save. Those of DeepSpeed are too large to read whole."""
    return tensor.file.suffix != ".safetensors" and not tensor.file.name.endswith("_states.pt")
