"""Checkpoints: named tensors and the JSON files next to them, read on demand; checks of their values."""

import hashlib
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from .deepspeed_zero import MASTERS, read_zero
from .errors import CheckpointError, Problem, raise_if_any
from .files import is_number, read_index, read_json
from .safetensors_io import DOWNLOAD, read_safetensors
from .sources import ADAPTER, DCP_METADATA, ENGINE_ENTRIES, PROVENANCE, ZERO_PATTERN, Source, without_local_path
from .tensors import StoredTensor, is_finite
from .torch_dcp import read_dcp
from .torch_pickle import read_pickle, unpickling_errors
from .training_record import read_training


TRAINER_STATE = "trainer_state.json"


class Checkpoint(ABC):
    """Named tensors in weight files, and JSON files next to them."""

    source: Source  # its files
    entry: str  # the only weight file, the index of the shards, or one of ENGINE_ENTRIES
    trust_pickle: bool  # whether pickles may name unknown classes
    weight_map: Mapping[str, str]  # tensor name -> weight file
    opened: Mapping[str, dict[str, StoredTensor]]  # weight files that were opened -> their tensors
    documents: Mapping[str, dict[str, Any]]  # JSON files that were read -> their content

    @abstractmethod
    def __getitem__(self, name: str) -> StoredTensor: ...

    @abstractmethod
    def open(self, file: str) -> dict[str, StoredTensor]:
        """The tensors of a weight file; raises a CheckpointError if it is missing or corrupt."""

    @abstractmethod
    def document(self, file: str) -> dict[str, Any]:
        """The content of a JSON file next to the weights; empty if there is none."""

    @property
    @abstractmethod
    def training_metadata(self) -> dict[str, Any]:
        """For provenance.json: engine, ranks, step, epoch, tokens seen, base, as far as they are known."""

    def default_dtype(self, names: Collection[str] = ()) -> str | None:
        """The torch dtype for some tensors, or all, if the user names none and they have several by nature."""
        return None

    def name_problems(self, file: str) -> list[Problem]:
        """Differences between the index and the names in an opened file."""
        return []

    @property
    def sources(self) -> list[Source]:
        return [self.source]

    @property
    def files(self) -> list[str]:
        """The weight files that there should be."""
        return sorted(set(self.weight_map.values()))

    def shard_problems(self) -> list[Problem]:
        """Open all weight files; report those that are missing or corrupt, and name_problems."""
        problems = []
        for file in self.files:
            try:
                self.open(file)
                problems += self.name_problems(file)
            except CheckpointError as error:
                problems.append(Problem("file", file, str(error).split(": ", 1)[-1]))
        return problems


class EngineFiles(NamedTuple):
    """The tensors in the shards of a training framework, by name, and metadata of the training."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]


class FileCheckpoint(Checkpoint):
    """A checkpoint in one source; weight files are opened when one of their tensors is asked for."""

    def __init__(self, source: Source, entry: str, trust_pickle: bool = False):
        self.source, self.entry, self.trust_pickle = source, entry, trust_pickle
        self.opened: dict[str, dict[str, StoredTensor]] = {}
        self.documents: dict[str, dict[str, Any]] = {}

    @cached_property
    def weight_map(self) -> dict[str, str]:
        if self.entry.endswith(".index.json"):
            return read_index(self.source.path(self.entry))
        return dict.fromkeys(self.open(self.entry), self.entry)

    @cached_property
    def engine_files(self) -> EngineFiles:
        """What the shards of a training framework hold; nothing for other entries."""
        with unpickling_errors(f"{self.source.name}/{self.entry}"):
            for suffix, read in ((ZERO_PATTERN, read_zero), (DCP_METADATA, read_dcp)):
                if self.entry.endswith(suffix):
                    return EngineFiles(*read(self.source, self.entry.removesuffix(suffix), self.trust_pickle))
        return EngineFiles({}, {})

    def open(self, file: str) -> dict[str, StoredTensor]:
        if file not in self.opened:
            if file.endswith(ENGINE_ENTRIES):
                self.opened[file] = self.engine_files.tensors
            elif file.endswith(".safetensors"):
                self.opened[file] = read_safetensors(self.source.path(file), self.source.open_remote(file))
            else:
                self.opened[file] = read_pickle(self.source.path(file), self.trust_pickle)
        return self.opened[file]

    def document(self, file: str) -> dict[str, Any]:
        if file not in self.documents:
            self.documents[file] = read_json(self.source.path(file)) if file in self.source.files else {}
        return self.documents[file]

    def __getitem__(self, name: str) -> StoredTensor:
        file = self.weight_map[name]
        tensors = self.open(file)
        if name not in tensors:
            raise CheckpointError(f"{self.entry} lists {name} in {file}, which does not contain it")
        return tensors[name]

    def name_problems(self, file: str) -> list[Problem]:
        named = {name for name, its_file in self.weight_map.items() if its_file == file}
        stored = self.opened[file].keys()
        lost = f"{self.entry} lists it in {file}, which does not contain it"
        extra = f"in {file}, but not in {self.entry}"
        return [Problem("shard", name, lost if name in named else extra) for name in sorted(named ^ stored)]

    def default_dtype(self, names: Collection[str] = ()) -> str | None:
        """float32, where fp32 master weights are next to rounded frozen parameters."""
        tensors = self.engine_files.tensors
        dtypes = {tensors[name].dtype for name in names or tensors if name in tensors}
        return "float32" if "F32" in dtypes and dtypes <= {"F32", "BF16", "F16"} and len(dtypes) > 1 else None

    @property
    def training_metadata(self) -> dict[str, Any]:
        """From the engine's files, trainer_state.json, and training.json or an earlier provenance.json."""
        metadata = read_training(self.document)
        metadata |= {
            key: value for key, value in self.engine_files.metadata.items() if key != MASTERS and _is_plain(value)
        }
        if state := self.document(TRAINER_STATE):
            metadata.setdefault("engine", "transformers Trainer")
        for key, its_key in {"step": "global_step", "epoch": "epoch", "tokens_seen": "num_input_tokens_seen"}.items():
            value = state.get(its_key)
            if is_number(value) and (value or key != "tokens_seen"):
                metadata[key] = value
        base_of_adapter = self.document(ADAPTER).get("base_model_name_or_path")
        base = base_of_adapter or self.document("config.json").get("_name_or_path")
        # without a training, _name_or_path of config.json is where a copy was loaded from
        if (metadata or base_of_adapter) and isinstance(base, str) and base:
            metadata["trained_from"] = without_local_path(base)
        return metadata


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a short text such as a version: files of engines may hold anything."""
    return type(value) in (int, float) or (isinstance(value, str) and bool(re.fullmatch(r"[\w.+ -]{1,40}", value)))


def recorded_hashes(provenance: Mapping[str, Any], section: str) -> dict[str, str]:
    """Map names in the "tensors" or "files" of provenance.json to their sha256; other forms raise a CheckpointError."""
    try:
        return {name: entry["sha256"] for name, entry in provenance.get(section, {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{PROVENANCE}: its {section} are no map of hashes: remove the file") from error


def check_values(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> None:
    """Raise a CheckpointError for a tensor that differs from the source's provenance.json or its file's checksum."""
    hashes = recorded_hashes(checkpoint.document(PROVENANCE), "tensors")
    if hashes or any(_has_checksum(tensor) for tensor in stored.values()):
        raise_if_any(value_problems(stored, hashes), checkpoint.source.name)


def value_problems(
    tensors: Mapping[str, StoredTensor],
    hashes: Mapping[str, str],
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """
    Read every tensor (by its name in the checkpoint), and the checksums of torch.save's archives; compare with `hashes`
    (sha256 in hexadecimal). `on_progress` is called with the number of bytes read since the last call.
    """
    problems = []
    for file in {tensor.file for tensor in tensors.values() if _has_checksum(tensor)}:
        with zipfile.ZipFile(file) as archive:
            if member := archive.testzip():
                problems.append(Problem("values", file.name, f"{member} in it is corrupt: {DOWNLOAD}"))
    for name, tensor in tensors.items():
        digest, finite = hashlib.sha256(), True
        for chunk in tensor.chunks():
            finite = finite and is_finite(chunk, tensor.dtype)
            if name in hashes:
                digest.update(chunk)
            on_progress(len(chunk))
        if not finite:
            problems.append(Problem("values", name, "holds NaN or infinity"))
        if name in hashes and digest.hexdigest() != hashes[name]:
            what = f"is not what {PROVENANCE} recorded: {DOWNLOAD}, or remove that file if it was changed"
            problems.append(Problem("sha256", name, what))
    return problems


def _has_checksum(tensor: StoredTensor) -> bool:
    """Whether its file may be an archive of torch.save; those of training frameworks are too large to read whole."""
    return not tensor.file.name.endswith((".safetensors", DCP_METADATA, "_states.pt"))
