"""
The Python files of a folder, their version, and fixes since earlier versions. A folder on the Hub runs the code that is
in it, whatever its users have installed, until `sailvit convert --refresh-code` replaces it.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..storage.files import hash_file
from ..storage.sources import LocalFolder, Source


PACKAGE = Path(__file__).parents[2]
VERSION_FILE = "configuration_sailvit.py"  # holds CODE_VERSION; every folder with code of this package has it

# Model type -> its files, the version last: refresh_code replaces them in this order.
CODE_FILES = {
    "sailvit": ("modeling_sailvit.py", "image_processing_sailvit.py", VERSION_FILE),
    "sailvl": (
        "modeling_sailvit.py", "image_processing_sailvit.py", "configuration_sailvl.py", "modeling_sailvl.py",
        "processing_sailvl.py", "video_sailvl.py", "chat_sailvl.py", VERSION_FILE,
    ),
}  # fmt: skip
CONFIGS = ("configuration_sailvit.SAILViTConfig", "configuration_sailvl.SAILVLConfig")  # in our auto_map

# Version that does it first, model type -> what no earlier version does. Without CODE_VERSION it is version 1.
FIXES = {2: {"sailvl": "write anything on transformers >= 5.24, where `past_key_values` became `cache`"}}

# sha256 of chat_template.jinja as earlier versions wrote it.
OLD_TEMPLATES = {"ef78b73535068723bf85ded3b8e4c5a008056b13ca8f6d101d760f96c3c0bb69"}  # of version 1


@dataclass(frozen=True)
class Code:
    """The code of a folder."""

    version: int
    package: int  # version of the installed package's files
    lacks: list[str]  # what it is known not to do
    other: list[str]  # files that differ from the package's, though of the same version


def copy_code(folder: Path, model_type: str = "sailvl") -> None:
    for file in CODE_FILES[model_type]:
        shutil.copyfile(PACKAGE / file, folder / file)


def find_code(source: Source, config: Mapping[str, Any]) -> Code | None:
    """Return the code of a folder or repository with this config.json; None if it has none of this package."""
    if not is_ours(config) or VERSION_FILE not in source.files:
        return None
    version, package = read_version(source.path(VERSION_FILE).parent), package_version()
    model_type, other = config["model_type"], []
    if isinstance(source, LocalFolder) and version == package:
        present = [file for file in CODE_FILES[model_type] if file in source.files]
        other = [file for file in present if hash_file(source.path(file)) != hash_file(PACKAGE / file)]
    lacks = [fix[model_type] for since, fix in sorted(FIXES.items()) if version < since and model_type in fix]
    return Code(version, package, lacks, other)


def is_ours(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of a folder with this package's code; the releases' files have the same names."""
    auto_map = config.get("auto_map")
    named = auto_map.get("AutoConfig") if isinstance(auto_map, Mapping) else None
    return config.get("model_type") in ("sailvit", "sailvl") and named in CONFIGS


def read_version(folder: Path) -> int:
    """Return CODE_VERSION of the code in a folder."""
    path = folder / VERSION_FILE
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    match = re.search(r"^CODE_VERSION = (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else 1


def package_version() -> int:
    return read_version(PACKAGE)


def is_old_template(text: str) -> bool:
    """Return whether a chat template is the default of an earlier version."""
    return sha256(text.encode()).hexdigest() in OLD_TEMPLATES
