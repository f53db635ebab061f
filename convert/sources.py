"""Where a checkpoint comes from: a file, a folder, or a repository on the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .problems import CheckpointError


# What the weights of a folder are called, in the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What else is read where one file of weights is named.
BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json", "provenance.json", "README.md")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Files of training runs that end like weights.
COMPANIONS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*")


class Source(Protocol):
    """
    Files under names.

    Attributes:
        name: What to call it in reports.
        revision: The commit, of a repository.
        files: Names of all files in it, those of subfolders with slashes.
    """

    name: str
    revision: str | None
    files: list[str]

    def path(self, file: str) -> Path:
        """The local file, downloaded if need be."""


class LocalFolder:
    """A folder on this machine, or some of its files."""

    def __init__(self, folder: Path, only: tuple[str, ...] | None = None):
        self.folder = folder
        self.name = str(folder)
        self.revision: str | None = None
        found = (file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file())
        names = sorted(file.relative_to(folder).as_posix() for file in found)
        self.files = [name for name in names if only is None or name in only]

    def path(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing: copy or download it again")
        return path


class HubRepository:
    """A model repository on the Hub, at one commit."""

    def __init__(self, name: str, revision: str | None):
        from huggingface_hub import HfApi

        self.name = name
        with _hub_errors(name, revision):
            info = HfApi().model_info(name, revision=revision)
        self.revision, self.asked = info.sha, revision
        self.files = sorted(sibling.rfilename for sibling in info.siblings or [])

    def path(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        if file not in self.files:
            raise CheckpointError(f"{self.name}: the repository has no file {file}")
        with _hub_errors(self.name, self.revision):
            path = Path(hf_hub_download(self.name, file, revision=self.asked))
        if self.revision not in path.parts:
            raise CheckpointError(f"{self.name}: it was changed while it was downloaded: try again")
        return path


def _from_hub(name: str, revision: str | None) -> Source:
    """A repository; where the Hub is not to be reached, what is cached of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return HubRepository(name, revision)
    except CheckpointError as error:
        if not isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise
        try:
            folder = LocalFolder(Path(snapshot_download(name, revision=revision, local_files_only=True)))
        except errors.LocalEntryNotFoundError:
            raise error from None
        folder.name, folder.revision = name, folder.folder.name
        return folder


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub's client raises into one line that names the repository and the mend."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        what = "access is granted on request: ask for it on the model's page, then `hf auth login`"
        raise CheckpointError(f"{name}: {what}") from error
    except errors.RepositoryNotFoundError as error:
        what = "no such folder here, and no such model on the Hub (a private one needs `hf auth login`)"
        raise CheckpointError(f"{name}: {what}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no revision {revision!r} on the Hub") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{name}: no such folder here, and the Hub is not reached (offline)") from error
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name}: no such folder here, and the Hub does not answer: {reason}") from error


def find_source(source: str, revision: str | None = None) -> tuple[Source, str]:
    """
    A file, a folder or the name of a repository -> where its files are, and the file that stands for its weights.

    Raises:
        CheckpointError: It does not exist, holds no weights, or several that nothing chooses between.
    """
    path = Path(source)
    if not source.strip():
        raise CheckpointError(f"{source}: no such file or folder: an empty name")
    if path.exists() and revision is not None:
        raise CheckpointError(f"{source}: --revision is for names on the Hub, this is here")
    if path.is_file():
        beside = None if path.name.endswith(".index.json") else (path.name, *BESIDE)
        return LocalFolder(path.parent, beside), path.name
    if path.is_dir():
        found: Source = LocalFolder(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        found = _from_hub(source, revision)
    else:
        raise CheckpointError(f"{source}: no such file or folder, and no name on the Hub (OWNER/MODEL)")
    return found, _choose_weights(found)


def weight_files(source: Source) -> list[str]:
    """Files at the top of a source that end like weights, those of training runs left out."""
    return [
        file
        for file in source.files
        if "/" not in file and file.endswith(WEIGHT_SUFFIXES) and not COMPANIONS.fullmatch(file)
    ]


def _choose_weights(source: Source) -> str:
    for name in WEIGHTS:
        if name in source.files:
            return name
    indices = [file for file in source.files if "/" not in file and file.endswith(".index.json")]
    choices = indices or weight_files(source)
    if len(choices) != 1:
        what = f"several ({', '.join(choices)}): name the file" if choices else "no weights"
        raise CheckpointError(f"{source.name}: {what}; {', '.join(WEIGHTS)} would be found by themselves")
    return choices[0]
