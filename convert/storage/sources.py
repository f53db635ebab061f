"""Where a checkpoint comes from: a file, a folder, or a repository on the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from .errors import CheckpointError


# What the weights of a folder are called, in the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)

# What else is read where one file of weights is named.
BESIDE = (
    "config.json", "preprocessor_config.json", "processor_config.json", "provenance.json", "training.json", "README.md",
)  # fmt: skip

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

# Files of training runs that end like weights.
NON_MODEL_FILES = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|pytorch_model_fsdp)[\w.-]*"
)

# What stands for the weights where an engine saved them in pieces: DeepSpeed's files, torch's distributed checkpoint.
ZERO_PATTERN = "*_states.pt"

ENGINE_ENTRIES = (ZERO_PATTERN, ".metadata")

HEADER = 1 << 17  # bytes that are asked for at a time, where only headers are wanted

ADAPTER = "adapter_config.json"  # of peft

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks for them

# What a folder has if an engine's folder in it is one of its parts.
ROOT = ("latest", "trainer_state.json", "config.json", ADAPTER)


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

    def open(self, file: str) -> BinaryIO:
        """The file, of which parts may be read."""


class LocalFolder:
    """
    A folder on this machine, or some of its files.

    Attributes:
        folder: Where they are.
        given: What was named: the folder, a file in it, or the folder of an engine in it.
    """

    def __init__(self, folder: Path, only: tuple[str, ...] | None = None, given: Path | None = None):
        self.folder = folder
        self.given = given or folder
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

    def open(self, file: str) -> BinaryIO:
        return self.path(file).open("rb")


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

    def open(self, file: str) -> BinaryIO:
        return self.path(file).open("rb")


class HubHeaders(HubRepository):
    """A model repository of which only the headers of safetensors are wanted: these are asked for by ranges."""

    def path(self, file: str) -> Path:
        """Of safetensors the name alone: there is no such file here."""
        is_there = file.endswith(".safetensors") and file in self.files
        return Path(self.name, file) if is_there else super().path(file)

    def open(self, file: str) -> BinaryIO:
        from huggingface_hub import HfFileSystem

        if not file.endswith(".safetensors"):
            return super().open(file)
        with _hub_errors(self.name, self.revision):
            return HfFileSystem().open(f"{self.name}/{file}", "rb", revision=self.revision, block_size=HEADER)


def _from_hub(name: str, revision: str | None, headers_only: bool) -> Source:
    """A repository; where the Hub is not to be reached, what is cached of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return HubHeaders(name, revision) if headers_only else HubRepository(name, revision)
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
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise CheckpointError(
                f"{name}: the Hub does not let this token, or none, see it: `hf auth login`"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name}: no such folder here, and the Hub does not answer: {reason}") from error


def find_source(source: str, revision: str | None = None, headers_only: bool = False) -> tuple[Source, str]:
    """
    A file, a folder or the name of a repository -> where its files are, and the file that stands for its weights.

    Args:
        revision: Branch, tag or commit of a repository.
        headers_only: Whether nothing but the headers of a repository's safetensors will be read.

    Raises:
        CheckpointError: It does not exist, holds no weights, or several that nothing chooses between.
    """
    path = Path(source)
    check_name(source)
    if path.exists() and revision is not None:
        raise CheckpointError(f"{source}: --revision is for names on the Hub, this is here")
    if path.is_file():
        return LocalFolder(path.parent, _read_with(path.name), path), path.name
    if path.is_dir():
        found: Source = LocalFolder(path)
        if entry := _parent_of_shard_folder(found):
            return LocalFolder(path.resolve().parent, given=path), entry
    else:
        found = _from_hub(source, revision, headers_only)
    return found, _choose_weights(found)


def check_name(source: str) -> None:
    """
    Raises:
        CheckpointError: It is neither a path that exists nor a name that the Hub could have.
    """
    try:
        exists = bool(source.strip()) and Path(source).exists()
    except OSError:  # too long for a name
        exists = False
    if not exists and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        name = source[:200] if source.strip() else "an empty name"
        raise CheckpointError(f"{name}: no such file or folder, and no name on the Hub (OWNER/NAME)")


def _read_with(name: str) -> tuple[str, ...] | None:
    """Files that are read where one file of weights is named; None for all. A whole model's by its name is no
    adapter's."""
    if name.endswith(".index.json"):
        return None
    return (name, *BESIDE, *(() if name in WEIGHTS else (ADAPTER,)))


def public_name(source: Source) -> str:
    """A name on the Hub, or the last part of a path: where it lies here is nobody's business."""
    return source.name if source.revision else Path(source.name).resolve().name


def licence_of(source: Source) -> dict[str, Any]:
    """The licence that the source's card names."""
    from huggingface_hub import ModelCard

    if "README.md" not in source.files:
        return {}
    try:
        data = ModelCard.load(source.path("README.md"), ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # no YAML in it
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def weight_files(source: Source) -> list[str]:
    """Files at the top of a source that end like weights, those of training runs left out; none beside an engine's."""
    if find_engine(source):
        return []
    return [
        file
        for file in source.files
        if "/" not in file and file.endswith(WEIGHT_SUFFIXES) and not NON_MODEL_FILES.fullmatch(file)
    ]


def find_engine(source: Source) -> str | None:
    """
    What stands for the weights, if a training engine saved them in pieces: FOLDER/*_states.pt for DeepSpeed's files,
    FOLDER/.metadata for a distributed checkpoint; at the top there is no FOLDER. Where the weights are there in one
    piece too, those of the engine, which are not rounded, come first if they have the names that trainers give them.

    Raises:
        CheckpointError: There are several, or DeepSpeed's `latest` names none of them.
    """
    folders = {file.rpartition("/")[0] for file in source.files if file.endswith("_model_states.pt")}
    tag = source.path("latest").read_text("utf-8", "replace").strip() if "latest" in source.files else None
    if tag is not None and (folders or tag.startswith(("global_step", "/", "."))):
        if tag not in folders:
            what = f"its file `latest` names {tag!r}, which is no folder of DeepSpeed in it: copy that, or correct it"
            raise CheckpointError(f"{source.name}: {what}")
        return f"{tag}/{ZERO_PATTERN}"
    pieces = {file.rpartition("/")[0] for file in source.files if file.endswith(".distcp")}
    if {*WEIGHTS} & {*source.files}:
        folders = {folder for folder in folders if re.fullmatch(r"global_step\d+", folder)}
        pieces = {folder for folder in pieces if folder.startswith("pytorch_model_fsdp")}
    entries = [f"{folder}/{ZERO_PATTERN}".lstrip("/") for folder in folders]
    entries += [f"{folder}/.metadata".lstrip("/") for folder in pieces if not folder.startswith("optim")]
    if len(entries) > 1:
        several = ", ".join(sorted(entry.rpartition("/")[0] or "." for entry in entries))
        raise CheckpointError(f"{source.name}: several folders of training engines ({several}): name one")
    return entries[0] if entries else None


def _parent_of_shard_folder(source: LocalFolder) -> str | None:
    """The entry in the folder above, if this one is the engine's part of what is saved there."""
    entry, above = find_engine(source), source.folder.resolve()
    if (
        entry not in ENGINE_ENTRIES
        or {*ROOT} & {*source.files}
        or not any((above.parent / file).is_file() for file in ROOT)
    ):
        return None
    return f"{above.name}/{entry}"


def _choose_weights(source: Source) -> str:
    if engine := find_engine(source):
        return engine
    for name in (*(ADAPTER_WEIGHTS if ADAPTER in source.files else ()), *WEIGHTS):
        if name in source.files:
            return name
    indices = [file for file in source.files if "/" not in file and file.endswith(".index.json")]
    choices = indices or weight_files(source)
    if len(choices) != 1:
        steps = sorted(
            {file.split("/")[0] for file in source.files if re.match(r"(checkpoint|global_step)-?\d+/", file)}
        )
        if steps and not choices:
            raise CheckpointError(f"{source.name}: a run with several steps ({', '.join(steps)}): name one of them")
        what = f"several ({', '.join(choices)}): name the file" if choices else "no weights"
        raise CheckpointError(f"{source.name}: {what}; {', '.join(WEIGHTS)} would be found by themselves")
    return choices[0]


PROVENANCE = "provenance.json"
