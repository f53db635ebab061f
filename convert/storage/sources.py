"""Sources of checkpoints: a file, a folder, or a repository on the Hub; and which of their files are the weights."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError
from .files import first_line


PROVENANCE = "provenance.json"
ADAPTER = "adapter_config.json"  # of peft
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks for them

# Weights of a folder, in the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

# Files that are read too where one file of weights was named.
SIDECAR_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", PROVENANCE, "training.json", "README.md",
)  # fmt: skip

# Files of a training run with the suffix of weights.
NON_MODEL_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|pytorch_model_fsdp).*")

# Entries that stand for several files: those of DeepSpeed, those of torch.distributed.checkpoint.
ZERO_PATTERN = "*_states.pt"
DCP_METADATA = ".metadata"
ENGINE_ENTRIES = (ZERO_PATTERN, DCP_METADATA)

# Files next to the folder that a training framework wrote its shards into.
ROOT_MARKERS = ("latest", "trainer_state.json", "config.json", ADAPTER)

LICENCE_KEYS = ("license", "license_name", "license_link")  # of a model card

HEADER_BLOCK = 1 << 17  # bytes of one range request, where only headers are read

# Errors of huggingface_hub, the more special ones first.
HUB_ERRORS = {
    "GatedRepoError": "access is granted on request: ask for it on the model's page, then `hf auth login`",
    "RepositoryNotFoundError": "no such folder here, and no such model on the Hub (private ones need `hf auth login`)",
    "RevisionNotFoundError": "no revision {revision!r} on the Hub",
    "OfflineModeIsEnabled": "no such folder here, and the Hub cannot be reached (offline)",
    "LocalEntryNotFoundError": "no such folder here, and the Hub cannot be reached (offline)",
}


class Source(ABC):
    """Files of a checkpoint."""

    name: str  # for messages: a path or the name of a repository
    revision: str | None = None  # the commit of a repository
    files: list[str]  # names of all files, with slashes
    headers_only = False  # whether safetensors files have headers but no data

    @abstractmethod
    def path(self, file: str) -> Path:
        """The local file, after downloading it if necessary; with headers_only only the name of a safetensors file."""

    def open_remote(self, file: str) -> BinaryIO | None:
        """A safetensors file that is not downloaded, if headers_only."""
        return None


class LocalFolder(Source):
    """A local folder, or some of its files; `requested` is what the user named: it, or a file or folder in it."""

    def __init__(self, folder: Path, only: tuple[str, ...] | None = None, requested: Path | None = None):
        self.folder, self.requested, self.name = folder, requested or folder, str(folder)
        paths = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
        names = sorted(path.relative_to(folder).as_posix() for path in paths)
        self.files = [name for name in names if only is None or name in only]

    def path(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing: copy or download it again")
        return path


class HubRepository(Source):
    """A model repository at one commit; with `headers_only`, safetensors files are read by range requests."""

    def __init__(self, name: str, revision: str | None, headers_only: bool = False):
        from huggingface_hub import HfApi

        self.name, self.headers_only, self.requested_revision = name, headers_only, revision
        with _hub_errors(name, revision):
            info = HfApi().model_info(name, revision=revision)
        self.revision = info.sha
        self.files = sorted(sibling.rfilename for sibling in info.siblings or [])

    def path(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        if file not in self.files:
            raise CheckpointError(f"{self.name}: the repository has no file {file}")
        if self.headers_only and file.endswith(".safetensors"):
            return Path(self.name, file)
        with _hub_errors(self.name, self.revision):
            path = Path(hf_hub_download(self.name, file, revision=self.requested_revision))
        if self.revision not in path.parts:
            raise CheckpointError(f"{self.name}: it was changed while it was downloaded: try again")
        return path

    def open_remote(self, file: str) -> BinaryIO | None:
        from huggingface_hub import HfFileSystem

        if not self.headers_only:
            return None
        with _hub_errors(self.name, self.revision):
            return HfFileSystem().open(f"{self.name}/{file}", "rb", revision=self.revision, block_size=HEADER_BLOCK)


def find_source(source: str, revision: str | None = None, headers_only: bool = False) -> tuple[Source, str]:
    """
    The files of a file, a folder, or a repository (at a branch, tag or commit, its `revision`), and the entry file of
    the weights. With `headers_only`, only the headers of a repository's safetensors files are read. Raises a
    CheckpointError if it does not exist, has no weights, or several among which the user has to choose.
    """
    path = Path(source)
    check_name(source)
    if path.exists() and revision is not None:
        raise CheckpointError(f"{source}: --revision is for names on the Hub, this is a local path")
    if path.is_file():
        # the files that belong to it; WEIGHTS are a whole model, even next to an adapter
        files = (path.name, *SIDECAR_FILES, *(() if path.name in WEIGHTS else (ADAPTER,)))
        return LocalFolder(path.parent, None if path.name.endswith(".index.json") else files, path), path.name
    folder = open_folder(source, revision, headers_only)
    entry, parent = _choose_weights(folder), path.resolve().parent
    is_shard_folder = path.is_dir() and entry in ENGINE_ENTRIES and not {*ROOT_MARKERS} & {*folder.files}
    if is_shard_folder and any((parent / file).is_file() for file in ROOT_MARKERS):
        return LocalFolder(parent, requested=path), f"{path.resolve().name}/{entry}"
    return folder, entry


def open_folder(name: str, revision: str | None = None, headers_only: bool = False) -> Source:
    """All files of a folder or of a repository on the Hub, offline of those in the cache; errors as of find_source."""
    from huggingface_hub import constants, snapshot_download

    if Path(name).is_dir():
        return LocalFolder(Path(name))
    if not constants.HF_HUB_OFFLINE:
        return HubRepository(name, revision, headers_only)
    with _hub_errors(name, revision):
        folder = LocalFolder(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    folder.name, folder.revision = name, folder.folder.name
    return folder


def check_name(source: str) -> None:
    """Raise a CheckpointError unless it is an existing path or a possible name on the Hub."""
    try:
        exists = bool(source.strip()) and Path(source).exists()
    except OSError:  # too long for a path
        exists = False
    if not exists and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        name = source[:200] if source.strip() else "an empty name"
        raise CheckpointError(f"{name}: no such file or folder, and no name on the Hub (OWNER/NAME)")


def check_separate(out: Path, sources: Iterable[Source]) -> None:
    """Raise CheckpointError if `out` is a source, contains one, or is inside one."""
    for source in sources:
        if isinstance(source, LocalFolder):
            folder, given, target = source.folder.resolve(), source.requested.resolve(), out.resolve()
            contains = target in (folder, *folder.parents)
            if contains or given in (target, *target.parents):
                verb = "contains" if contains else "is inside"
                raise CheckpointError(f"{out} {verb} the source {source.requested}: choose another output folder")


def public_name(source: Source) -> str:
    """The name of a repository, or the last part of a path: local paths are not published."""
    return source.name if source.revision else Path(source.name).resolve().name


def without_local_path(name: str) -> str:
    """The last part of a local path; the name of a repository unchanged."""
    is_path = Path(name).is_absolute() or "\\" in name or name.startswith((".", "~")) or Path(name).exists()
    return Path(name).resolve().name if is_path else name


def describe_source(source: Source) -> dict[str, Any]:
    """Name, revision and licence of a source, for provenance.json."""
    return {"name": public_name(source), "revision": source.revision, **licence_of(source)}


def licence_of(source: Source) -> dict[str, Any]:
    """The licence fields of the source's model card."""
    from huggingface_hub import ModelCard

    if "README.md" not in source.files:
        return {}
    try:
        data = ModelCard.load(source.path("README.md"), ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # no YAML
        return {}
    return {key: data[key] for key in LICENCE_KEYS if data.get(key)}


def weight_files(source: Source) -> list[str]:
    """Top-level files of model weights; none where a training framework saved shards."""
    if find_engine(source):
        return []
    top = [file for file in source.files if "/" not in file and file.endswith(WEIGHT_SUFFIXES)]
    return [file for file in top if not NON_MODEL_FILES.fullmatch(file)]


def find_engine(source: Source) -> str | None:
    """
    The entry of shards that a training framework saved: FOLDER/*_states.pt (DeepSpeed) or FOLDER/.metadata
    (torch.distributed.checkpoint), without FOLDER/ at the top. Next to weights in one file, which may be rounded, they
    are preferred if they have the names that trainers use. Raises a CheckpointError if there are several, or if
    DeepSpeed's `latest` names none of them.
    """
    suffixes = ("_model_states.pt", ".distcp")
    zero, dcp = ({f.rpartition("/")[0] for f in source.files if f.endswith(suffix)} for suffix in suffixes)
    tag = source.path("latest").read_text("utf-8", "replace").strip() if "latest" in source.files else None
    if tag is not None and (zero or tag.startswith(("global_step", "/", "."))):
        if tag not in zero:
            raise CheckpointError(f"{source.name}: `latest` names {tag!r}, no folder of DeepSpeed: copy or correct it")
        return f"{tag}/{ZERO_PATTERN}"
    if {*WEIGHTS} & {*source.files}:
        zero = {folder for folder in zero if re.fullmatch(r"global_step\d+", folder)}
        dcp = {folder for folder in dcp if folder.startswith("pytorch_model_fsdp")}
    entries = [f"{folder}/{ZERO_PATTERN}".lstrip("/") for folder in zero]
    entries += [f"{folder}/{DCP_METADATA}".lstrip("/") for folder in dcp if not folder.startswith("optim")]
    if len(entries) > 1:
        several = ", ".join(sorted(entry.rpartition("/")[0] or "." for entry in entries))
        raise CheckpointError(f"{source.name}: several folders of training engines ({several}): name one")
    return entries[0] if entries else None


def _choose_weights(source: Source) -> str:
    if engine := find_engine(source):
        return engine
    for name in (*(ADAPTER_WEIGHTS if ADAPTER in source.files else ()), *WEIGHTS):
        if name in source.files:
            return name
    indices = [file for file in source.files if "/" not in file and file.endswith(".index.json")]
    choices = indices or weight_files(source)
    if len(choices) == 1:
        return choices[0]
    steps = sorted({file.split("/")[0] for file in source.files if re.match(r"(checkpoint|global_step)-?\d+/", file)})
    if steps and not choices:
        raise CheckpointError(f"{source.name}: a run with several steps ({', '.join(steps)}): name one of them")
    if not choices and any(file.endswith(".onnx") for file in source.files):
        fix = "only `sailvit encode` and `sailvit push` take it: give the folder that it was made from"
        raise CheckpointError(f"{source.name}: an ONNX folder, which has no weights for torch; {fix}")
    what = f"several ({', '.join(choices)}): name the file" if choices else "no weights"
    raise CheckpointError(f"{source.name}: {what}; names found automatically: {', '.join(WEIGHTS)}")


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Convert errors of the Hub's client to a CheckpointError that names the repository and the fix."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        what = f"no such folder here, and the Hub does not answer: {first_line(error)}"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            what = "the Hub denies access to this token, or to no token: `hf auth login`"
        for kind, hint in HUB_ERRORS.items():
            if isinstance(error, getattr(errors, kind)):
                what = hint.format(revision=revision)
                break
        raise CheckpointError(f"{name}: {what}") from error
