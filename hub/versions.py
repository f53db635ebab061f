"""Other releases of transformers than the installed one, in environments of their own above this one's packages."""

import json
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path


class VersionError(RuntimeError):
    """A release of transformers that cannot be had here."""


def supported() -> str:
    """
    What the package asks of transformers, as pip takes it.

    Raises:
        VersionError: The package is not installed, so nothing says it.
    """
    try:
        wanted = requires("sailvit") or []
    except PackageNotFoundError:
        raise VersionError("the package is not installed, so nothing says what it supports: pip install it") from None
    return next(requirement.partition(";")[0] for requirement in wanted if requirement.startswith("transformers"))


def oldest() -> str:
    """A requirement that the oldest supported release meets."""
    from packaging.requirements import Requirement

    lowest = next(spec.version for spec in Requirement(supported()).specifier if spec.operator == ">=")
    return f"transformers=={lowest}.*"


def newest() -> str:
    """
    A requirement that the newest supported release meets.

    Raises:
        VersionError: No registry tells which it is.
    """
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    report = json.loads(_pip(sys.executable, *options, supported()))
    return f"transformers=={report['install'][0]['metadata']['version']}"


def is_installed(requirement: str) -> bool:
    from packaging.requirements import Requirement

    return version("transformers") in Requirement(requirement).specifier


def make_environment(folder: Path, requirement: str) -> str:
    """
    An environment that sees this one's packages, transformers and what it pins excepted.

    Returns:
        Its Python.

    Raises:
        VersionError: pip does not get it.
    """
    venv.create(folder, with_pip=False)
    below = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    above = sysconfig.get_path("purelib")
    (below / "parent.pth").write_text(f"import site; site.addsitedir({above!r})\n", encoding="utf-8")
    python = sysconfig.get_path("scripts", vars={"base": str(folder)}) + "/python"
    _pip(python, requirement)
    return python


def _pip(python: str, *arguments: str) -> str:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "30"]
    command = [python, "-m", "pip", "install", *quiet, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")]
        raise VersionError((lines or done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: "))
    return done.stdout
