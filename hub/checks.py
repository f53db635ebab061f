"""
The gate: whether a folder may be published. Its files are looked over, and a copy of it is loaded by a stranger: in a
clean process, offline, by the Auto classes of the installed transformers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.export.card import card_problems
from ..convert.export.model_types import LANGUAGE, MULTIMODAL, Kind, model_type_of
from ..convert.inspect import inspect_checkpoint
from ..convert.storage.errors import CheckpointError, Problem
from ..convert.storage.files import copy_file, link_files, read_json
from ..convert.storage.output_folder import check_space
from ..convert.storage.sources import PROVENANCE
from ..convert.verify.outputs import PICTURE, TOLERANCE
from .files import file_problems, published_files


if TYPE_CHECKING:
    import torch

    Shown = dict[str, torch.Tensor]

HUB_LOADER_SCRIPT = Path(__file__).with_name("load_folder.py")

HALF_TOLERANCE = 2e-2  # relative, where numbers of 16 bits are added up in another order

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")


class PublishError(ValueError):
    """
    A folder that must not be published.

    Attributes:
        problems: Why.
    """

    def __init__(self, folder: str, problems: list[Problem]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{folder}: not published: {problems[0]}{more}")


def check_before_publish(
    folder: str | Path,
    repo: str | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> list[Problem]:
    """
    Everything that speaks against publishing a folder; nothing, if the list is empty.

    Args:
        folder: As it would be published, README.md included.
        repo: OWNER/NAME that it would have.
        log: Called with each progress message.

    Raises:
        CheckpointError: There is no such folder, or no config.json that can be read in it.
    """
    folder = Path(folder)
    check_folder(folder)
    kind = model_type_of(read_json(folder / "config.json"))
    problems = file_problems(folder, repo.split("/")[0] if repo else None)
    problems += [*card_problems(folder), *_checkpoint_problems(folder), *_unverified(folder)]
    with _scratch_next_to(folder) as scratch:
        problems += _load_problems(folder, kind, scratch, log)
    return list(dict.fromkeys(problems))


def check_folder(folder: Path) -> None:
    """
    Raises:
        CheckpointError: There is no such folder, or no config.json in it.
    """
    if not (folder / "config.json").is_file():
        what = "there is no config.json in it" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}: give a folder that `sailvit convert` or save_pretrained wrote")


@contextmanager
def _scratch_next_to(folder: Path) -> Iterator[Path]:
    """A folder where links to a folder's files can be made, if possible. What a kill has left is cleared away."""
    parent, prefix = folder.resolve().parent, f".{folder.resolve().name}.gate-"
    parent = parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
    for left in parent.iterdir():
        if left.name.startswith(prefix) and not _is_running(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    scratch = parent / f"{prefix}{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def _checkpoint_problems(folder: Path) -> list[Problem]:
    try:
        return inspect_checkpoint(folder, deep=True).problems
    except CheckpointError as error:
        return [Problem("layout", "weights", str(error))]


def _unverified(folder: Path) -> Iterator[Problem]:
    """A conversion that nobody has held against its source."""
    record = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    if record and not record.get("verification"):
        yield Problem("tokens", PROVENANCE, "it was never held against its source: convert again, without --no-verify")


def _load_problems(folder: Path, kind: Kind, scratch: Path, log: Callable[[str], None]) -> list[Problem]:
    copy = scratch / "model"  # without a dot, which would be one of a module's name
    for name, path in published_files(folder).items():
        if path.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if not link_files({copy / name: path}, hard=True):  # it is only read, and gone thereafter
                check_space(scratch, path.stat().st_size)
                copy_file(path, copy / name)
    here = f"transformers {version('transformers')}"
    ours = read_json(copy / "config.json").get("model_type") in ("sailvit", "sailvl")
    problems, shown = _try(copy, kind, here, *(["sailvit"] if ours else []))
    if shown is None:
        return problems
    reference = {name.removeprefix("sailvit."): shown.pop(name) for name in [*shown] if name.startswith("sailvit.")}
    name = "this package" if ours else here
    measure = OutputComparison(reference or shown, name, _tolerance(copy, kind), log)
    return measure.differences(shown, here)


def _try(copy: Path, kind: Kind, who: str, *package: str) -> "tuple[list[Problem], Shown | None]":
    """What a process of its own sees, or why it sees nothing."""
    from safetensors import safe_open

    scratch, out = copy.parent, copy.with_name("shown.safetensors")
    out.unlink(missing_ok=True)
    script = "import sys; exec(compile(open(sys.argv[1]).read(), sys.argv.pop(1), 'exec'))"  # without this folder
    command = [
        sys.executable,
        "-c",
        script,
        str(HUB_LOADER_SCRIPT),
        str(copy),
        str(PICTURE),
        str(out),
        kind.auto_class,
        *package,
    ]
    options = {"cwd": scratch, "env": _environment(scratch), "stdin": subprocess.DEVNULL, "capture_output": True}
    done = subprocess.run(command, text=True, **options)
    if done.returncode or not out.exists():
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        said = said.replace(str(copy), "the folder")
        what = f"does not load it by {kind.auto_class} in a clean process: {said}: mend that, or convert again"
        return [Problem("load", who, what)], None
    with safe_open(out, "pt") as file:
        return [], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _environment(scratch: Path) -> dict[str, str]:
    """Offline, with caches of its own, and without a token."""
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    home = {"HF_HOME": str(scratch / "home"), "HF_MODULES_CACHE": str(scratch / "modules")}
    return {**kept, **home, "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}


def _tolerance(copy: Path, kind: Kind) -> float:
    config = read_json(copy / "config.json")
    halves = kind in (MULTIMODAL, LANGUAGE) and config.get("dtype", config.get("torch_dtype")) != "float32"
    return HALF_TOLERANCE if halves else TOLERANCE


@dataclass(frozen=True)
class OutputComparison:
    """
    What every stranger has to see.

    Attributes:
        reference: The picture and what came of it, in float32.
        name: Whose it is.
        tolerance: Relative.
        log: Called with each progress message.
    """

    reference: "Shown"
    name: str
    tolerance: float
    log: Callable[[str], None]

    def differences(self, shown: "Shown", release: str) -> list[Problem]:
        """Where a stranger sees something else than arithmetic explains."""
        problems = []
        for what, wanted in self.reference.items():
            found = shown[what]
            if found.shape != wanted.shape:
                said = f"{what} of shape {list(found.shape)}, {list(wanted.shape)} by {self.name}: convert again"
                problems.append(Problem("tokens", release, said))
                continue
            difference = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
            if not difference <= self.tolerance:
                said = f"{what} are {difference:.1e} from those of {self.name}, relative: convert again"
                problems.append(Problem("tokens", release, said))
            elif what == "tokens":
                self.log(
                    f"{release} loads it in a clean process, its tokens within {difference:.0e} of those of {self.name}"
                )
        return problems
