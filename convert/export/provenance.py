"""TODO convert/export/provenance.py."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.files import hash_file
from ..storage.sources import PROVENANCE, licence_of, public_name
from ..storage.tensors import torch_name


if TYPE_CHECKING:
    from ..plan import ConversionPlan

    pass


def write_provenance(
    folder: Path,
    job: "ConversionPlan",
    asked: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
) -> None:
    """
    Args:
        asked: The options of the conversion.
        files: Name -> sha256 and bytes of every file that was read.
        digests: Name -> sha256 of every tensor that was written.
    """
    source, record = job.checkpoint.source, job.provenance()
    before, training = job.checkpoint.document(PROVENANCE).get("source"), job.checkpoint.training_metadata()
    said = {
        "name": public_name(source),
        "revision": source.revision,
        **record.pop("source", {}),
        **licence_of(source),
        "files": files,
        **({"source": before} if before else {}),
    }
    kept = {name: {"sha256": files[original]["sha256"]} for name, original in record.pop("kept", {}).items()}
    content = {
        "source": said,
        **({"training": training} if training else {}),
        "options": asked,
        "dtype": torch_name(job.dtype),
        **record,
        "verification": job.verification,
    }
    save_record(folder, content, kept, digests)


def save_record(folder: Path, content: Mapping[str, Any], kept: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """
    Writes provenance.json: what is given, versions, and the hashes of what lies in the folder.

    Args:
        kept: Name -> {"sha256": ...} of files whose hashes are known.
        digests: Name -> sha256 of every tensor that was written.
    """
    others = [path for path in sorted(folder.glob("*")) if _is_recorded(path)]
    provenance = {
        **content,
        "versions": {"python": platform.python_version(), **versions()},
        "files": {**{path.name: {"sha256": hash_file(path)} for path in others}, **kept},
        "tensors": {name: {"sha256": digest} for name, digest in digests.items()},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def _is_recorded(path: Path) -> bool:
    return path.suffix in (".py", ".json", ".jinja", ".txt", ".model") and path.name != PROVENANCE


def versions() -> dict[str, str]:
    """Of the packages that what is written depends on."""
    found = {}
    for package in ("sailvit", "torch", "transformers", "timm", "huggingface_hub", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
