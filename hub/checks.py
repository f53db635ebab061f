"""
The checks that a folder must pass before it is published: its files, its card, its checkpoint, and whether a copy of
what would be published loads and runs in a clean process, offline, by the Auto classes of the installed transformers.
"""

import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..convert.export.card import card_problems
from ..convert.export.model_types import auto_class_of
from ..convert.inspect import inspect_checkpoint
from ..convert.storage.errors import CheckpointError, Problem, VerificationError
from ..convert.storage.files import read_json
from ..convert.storage.sources import PROVENANCE
from ..convert.verify.outputs import TOLERANCE, link_or_copy, relative_difference, run_in_clean_process
from ..exporters.checks import onnx_problems
from .files import file_problems, published_files


HALF_TOLERANCE = 2e-2  # relative, of outputs in 16 bits, whose sums depend on their order


class PublishError(ValueError):
    """A folder that must not be published, for the reasons in `problems`."""

    def __init__(self, folder: str, problems: list[Problem]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{folder}: not published: {problems[0]}{more}")


def check_before_publish(
    folder: str | Path, repo: str | None = None, *, log: Callable[[str], None] = lambda line: None
) -> list[Problem]:
    """
    Return all problems that block publishing a folder.

    Args:
        folder: As it would be published, README.md included.
        repo: OWNER/NAME that it would have.
        log: Called with each progress message.

    Raises:
        CheckpointError: There is no such folder, or no config.json that can be read in it.
    """
    folder = Path(folder)
    check_folder(folder)
    config = read_json(folder / "config.json")
    problems = file_problems(folder, repo.split("/")[0] if repo else None)
    problems += card_problems(folder)
    if auto_class_of(folder) != "onnx":
        problems += [*_checkpoint_problems(folder), *_load_problems(folder, config, log)]
    if (folder / "onnx").is_dir():
        problems += onnx_problems(folder, log)
    return list(dict.fromkeys(problems))


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if there is no such folder, or no config.json in it."""
    if not (folder / "config.json").is_file():
        reason = "no config.json in it" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {reason}: give a folder that `sailvit convert` or save_pretrained wrote")


def _checkpoint_problems(folder: Path) -> Iterator[Problem]:
    try:
        yield from inspect_checkpoint(folder, deep=True).problems
    except CheckpointError as error:
        yield Problem("layout", "weights", str(error))
    provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    if provenance and not provenance.get("verification"):
        yield Problem("tokens", PROVENANCE, "this conversion was not verified: convert again without --no-verify")


def _load_problems(folder: Path, config: dict[str, Any], log: Callable[[str], None]) -> Iterator[Problem]:
    """Run what would be published by its own code, and by this package's classes where it has those."""
    here, ours = f"transformers {version('transformers')}", config.get("model_type") in ("sailvit", "sailvl")
    auto_class = auto_class_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in published_files(folder).items():
            link_or_copy(path, Path(scratch) / name)
        try:
            outputs = run_in_clean_process(Path(scratch), auto_class, generate=True, compare_with_package=ours)
        except VerificationError as error:
            yield Problem("load", here, f"{auto_class}: {error}: fix that, or convert again")
            return
    name = "this package" if ours else here
    reference = {key.removeprefix("package."): outputs.pop(key) for key in [*outputs] if key.startswith("package.")}
    for what, expected in (reference or outputs).items():  # without a reference still a check for NaN
        output = outputs[what]
        if output.shape != expected.shape:
            shapes = f"expected shape {[*expected.shape]}, as by {name}, got {[*output.shape]}"
            yield Problem("tokens", here, f"{what}: {shapes}: convert again")
            continue
        difference = relative_difference(output, expected)
        tolerance = HALF_TOLERANCE if output.dtype.itemsize == 2 else TOLERANCE
        if not difference <= tolerance:
            message = f"{what} differ from those of {name} by {difference:.1e} (relative), expected at most {tolerance}"
            yield Problem("tokens", here, f"{message}: convert again")
        elif what in ("tokens", "logits"):
            log(f"{here} loads it in a clean process; {what} match those of {name} within {difference:.0e}")
