"""provenance.json: what a folder was made from and how, with the hashes of what was read and written."""

import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.files import hash_file
from ..storage.sources import PROVENANCE, describe_source


RECORDED_SUFFIXES = (".py", ".json", ".jinja", ".txt", ".model")


def save_record(folder: Path, content: Mapping[str, Any], kept: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """
    Write provenance.json: `content`, versions, and the hashes of what is in the folder.

    Args:
        kept: Name -> {"sha256": ...} of files whose hashes are known.
        digests: Name -> sha256 of every tensor that was written.
    """
    others = [path for path in sorted(folder.glob("*")) if path.suffix in RECORDED_SUFFIXES and path.name != PROVENANCE]
    provenance = {
        **content,
        "versions": {"python": platform.python_version(), **versions()},
        "files": {**{path.name: {"sha256": hash_file(path)} for path in others}, **kept},
        "tensors": {name: {"sha256": digest} for name, digest in digests.items()},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def source_provenance(checkpoint: Checkpoint, files: Iterable[str]) -> dict[str, Any]:
    """Return the entries about one of several sources, with the hashes of the files that were read."""
    hashes = {file: {"sha256": hash_file(checkpoint.source.path(file))} for file in files}
    return {**describe_source(checkpoint.source), "files": hashes}


def read_files(checkpoint: Checkpoint) -> list[str]:
    """Return the files of the source that were read."""
    return [file for file in (*checkpoint.opened, *checkpoint.documents) if file in checkpoint.source.files]


def versions() -> dict[str, str]:
    """Return the versions of the packages on which the output depends."""
    found = {}
    for package in ("sailvit", "torch", "transformers", "timm", "huggingface_hub", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
