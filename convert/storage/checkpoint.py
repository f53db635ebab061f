"""Folders that training engines leave, in which the weights lie in pieces."""

from functools import cached_property
from typing import Any

from .deepspeed_zero import ZeroCheckpoint
from .errors import CheckpointError, Problem
from .files import read_index, read_json
from .safetensors_io import read_safetensors
from .sources import ENGINE_ENTRIES, ZERO_PATTERN, HubHeaders, Source
from .tensors import StoredTensor
from .torch_dcp import read_distributed
from .torch_pickle import explained, read_pickle


class Checkpoint:
    """
    The tensors of a source, by name; their shards are opened when they are asked for.

    Attributes:
        source: The folder or repository it lies in.
        entry: Name of the file that stands for it: the one file of weights, or the index of the shards.
        opened: Every file of weights that was opened -> the tensors in it.
        documents: Every JSON file beside them that was asked for -> its content.
        engine: What a training engine's files say of the training, once they are opened.
    """

    def __init__(self, source: "Source", entry: str, trust_pickle: bool = False):
        self.source = source
        self.entry = entry
        self.trust_pickle = trust_pickle
        self.opened: dict[str, dict[str, StoredTensor]] = {}
        self.documents: dict[str, dict[str, Any]] = {}
        self.engine: dict[str, Any] = {}

    @property
    def headers_only(self) -> bool:
        """Whether no tensor can be read, but only what the headers say of it."""
        return isinstance(self.source, HubHeaders)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> name of the file that holds it."""
        if self.entry.endswith(".index.json"):
            return read_index(self.source.path(self.entry))
        return dict.fromkeys(self.open(self.entry), self.entry)

    @property
    def files(self) -> list[str]:
        """The files of weights there should be."""
        return sorted(set(self.weight_map.values()))

    def open(self, file: str) -> dict[str, StoredTensor]:
        """
        The tensors of one of the files, by its header.

        Raises:
            CheckpointError: The file is missing or broken.
        """
        if file not in self.opened and file.endswith(ENGINE_ENTRIES):
            # which knows this module

            self.opened[file], self.engine = read_engine(self.source, file, self.trust_pickle)
        if file not in self.opened:
            path = self.source.path(file)
            if file.endswith(".safetensors"):
                self.opened[file] = read_safetensors(path, self.source.open(file))
            else:
                self.opened[file] = read_pickle(path, self.trust_pickle)
        return self.opened[file]

    def document(self, file: str) -> dict[str, Any]:
        """
        A JSON file beside the weights; empty if there is none.

        Raises:
            CheckpointError: It is not a JSON object.
        """
        if file not in self.documents:
            self.documents[file] = read_json(self.source.path(file)) if file in self.source.files else {}
        return self.documents[file]

    def __getitem__(self, name: str) -> StoredTensor:
        file = self.weight_map[name]
        tensors = self.open(file)
        if name not in tensors:
            raise CheckpointError(f"{self.entry} says that {name} is in {file}, which does not hold it")
        return tensors[name]

    def shard_problems(self) -> list[Problem]:
        """What is wrong with the files themselves: all of them are opened."""
        problems = []
        for file in self.files:
            try:
                self.open(file)
            except CheckpointError as error:
                problems.append(Problem("file", file, str(error).split(": ", 1)[-1]))
                continue
            problems += self.name_problems(file)
        return problems

    def name_problems(self, file: str) -> list[Problem]:
        """Where the index and one of its files, which is open, name different tensors."""
        named, held = {name for name, place in self.weight_map.items() if place == file}, self.opened[file].keys()
        return [
            *(
                Problem("shard", name, f"{self.entry} says it is in {file}, which does not hold it")
                for name in named - held
            ),
            *(Problem("shard", name, f"in {file}, but {self.entry} does not say so") for name in sorted(held - named)),
        ]


def read_engine(source: Source, entry: str, trust: bool) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """
    The tensors of an engine's folder, and what it says of the training.

    Args:
        source: What the folder lies in.
        entry: As sources.find_engine names it.
        trust: Whether pickles may name what is no object of the engine.

    Raises:
        CheckpointError: A file is missing, broken, of another run, or names what could run code.
    """
    with explained(f"{source.name}/{entry}"):
        if entry.endswith(ZERO_PATTERN):
            return ZeroCheckpoint(source, entry.removesuffix(ZERO_PATTERN), trust).read()
        return read_distributed(source, entry.removesuffix(".metadata"), trust)
