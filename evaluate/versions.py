"""What figures depend on besides models and data: releases of libraries, the commit of this package."""

import importlib.util
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path


def library_versions() -> dict[str, str]:
    """Return the releases of the libraries that compute pixels and features."""
    names = ("torch", "torchvision", "transformers", "timm", "pillow")
    return {name: version(name) for name in names if importlib.util.find_spec(name.replace("pillow", "PIL"))}


def package_commit() -> str | None:
    """Return the commit of this package with "-dirty" if files differ from it; None if it is no git checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
