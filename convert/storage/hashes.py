"""Checks of tensor values: NaN, infinities, recorded hashes, checksums of archives."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .errors import CheckpointError, Problem, raise_if_any
from .safetensors_io import DOWNLOAD
from .sources import DCP_METADATA, PROVENANCE
from .tensors import StoredTensor, is_finite


def recorded_hashes(provenance: Mapping[str, Any], section: str) -> dict[str, str]:
    """Map names in the "tensors" or "files" of provenance.json to their sha256; other forms raise a CheckpointError."""
    try:
        return {name: entry["sha256"] for name, entry in provenance.get(section, {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{PROVENANCE}: its {section} are no map of hashes: remove the file") from error


def check_values(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> None:
    """
    Raise a CheckpointError if a tensor, by its name in the checkpoint, is not what the source's provenance.json or the
    checksum of its file recorded, where there are any.
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
    Read every tensor (by its name in the checkpoint), and the checksums of torch.save's archives; compare with `hashes`
    (sha256 in hexadecimal). `on_progress` is called with the number of bytes read since the last call.
    """
    problems = []
    for file in {tensor.file for tensor in tensors.values() if _has_checksum(tensor)}:
        with zipfile.ZipFile(file) as archive:
            if member := archive.testzip():
                problems.append(Problem("values", file.name, f"{member} in it is corrupt: {DOWNLOAD}"))
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
            what = f"is not what {PROVENANCE} recorded: {DOWNLOAD}, or remove that file if it was changed"
            problems.append(Problem("sha256", name, what))
    return problems


def _has_checksum(tensor: StoredTensor) -> bool:
    """Whether its file may be an archive of torch.save; those of training frameworks are too large to read whole."""
    return not tensor.file.name.endswith((".safetensors", DCP_METADATA, "_states.pt"))
