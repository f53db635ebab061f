"""Checkpoints made of several: what a training left, over the base it began with; the mean of some steps."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .checkpoint import Checkpoint
from .errors import CheckpointError, Problem
from .names import strip_wrapper_prefixes
from .sources import ADAPTER, PROVENANCE, WEIGHT_SUFFIXES, Source
from .tensors import CHUNK, FLOAT_BITS, ITEM_SIZES, StoredTensor, cast, read_bytes
from .tied_embeddings import find_ends, is_tied, untied


TRAINER_STATE = "trainer_state.json"

NOT_LENT = (PROVENANCE, TRAINER_STATE, ADAPTER, "README.md", "latest", ".metadata")  # true of one checkpoint alone

PREFIXES = ("", "model.", "base_model.model.")  # what tools put before all names of a model


class CompositeSource:
    """
    The files of several sources: those of the first under their own names, those of the others with a prefix. What is
    no weights of the others stands in for what the first lacks.
    """

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = sources
        first, *others = sources.values()
        self.name, self.revision = first.name, first.revision
        lent = {
            file: source for source in others for file in source.files
            if "/" not in file and not file.endswith((*WEIGHT_SUFFIXES, ".index.json")) and file not in NOT_LENT
        }  # fmt: skip
        self.places = {file: (source, file) for file, source in lent.items()}
        for prefix, source in sources.items():
            self.places |= {prefix + file: (source, file) for file in source.files}
        self.files = sorted(self.places)

    def path(self, file: str) -> Path:
        source, name = self.places.get(file, (next(iter(self.sources.values())), file))
        return source.path(name)

    def open(self, file: str) -> BinaryIO:
        return self.path(file).open("rb")


class CompositeCheckpoint(Checkpoint):
    """
    A checkpoint made of several.

    Attributes:
        parts: Prefix of its files -> each of them; that of the first is empty.
    """

    def __init__(self, parts: Mapping[str, Checkpoint]):
        self.parts = parts
        first = parts[""]
        super().__init__(CompositeSource({prefix: part.source for prefix, part in parts.items()}), first.entry)
        self.trust_pickle = first.trust_pickle

    @property
    def opened(self) -> dict[str, dict[str, StoredTensor]]:
        """Every file of any of them that was opened."""
        return {prefix + file: held for prefix, part in self.parts.items() for file, held in part.opened.items()}

    @opened.setter
    def opened(self, value: Any) -> None:
        """Each of them keeps its own."""

    @property
    def documents(self) -> dict[str, dict[str, Any]]:
        """Every JSON file of any of them that was asked for."""
        return {prefix + file: read for prefix, part in self.parts.items() for file, read in part.documents.items()}

    @documents.setter
    def documents(self, value: Any) -> None:
        """Likewise."""

    def open(self, file: str) -> dict[str, StoredTensor]:
        return {name: self[name] for name, place in self.weight_map.items() if place == file}

    def document(self, file: str) -> dict[str, Any]:
        """Of provenance.json only where it came from: its hashes are of other tensors. An adapter is merged."""
        if file == ADAPTER:
            return {}
        source, name = self.source.places.get(file, (None, file))
        owner = next((part for part in self.parts.values() if part.source is source), self.parts[""])
        content = owner.document(name)
        return {key: content[key] for key in ("source",) if key in content} if file == PROVENANCE else content

    def name_problems(self, file: str) -> list[Problem]:
        return []


class Overlay(CompositeCheckpoint):
    """A trained checkpoint, and its base for what it lacks, or has rounded and not changed."""

    def __init__(self, trained: Checkpoint, base: Checkpoint):
        super().__init__({"": trained, "base/": base})
        self.trained, self.base = trained, base
        self.exact: dict[str, bool] = {}  # rounded tensors that were compared -> whether they are the base's

    @cached_property
    def from_base(self) -> dict[str, str]:
        """Name, as the trained checkpoint would have it -> name in the base, for all that the base has."""
        return self._with_ends(_match_names(self.trained, self.base))

    def _with_ends(self, lent: dict[str, str]) -> dict[str, str]:
        """As config.json ties embeddings and head, or not: what was trained is not paired with what it was before."""
        ends = find_ends([*lent, *self.trained.weight_map])
        if ends is None or ends.head in self.trained.weight_map:
            return lent
        tied = is_tied(self.document("config.json"))
        if tied and ends.embeddings in self.trained.weight_map:
            return {name: place for name, place in lent.items() if name != ends.head}
        if not tied and ends.head not in lent and is_tied(self.base.document("config.json")):
            return {**lent, ends.head: lent[ends.embeddings]}  # the base's head is its embeddings
        return lent

    @cached_property
    def weight_map(self) -> dict[str, str]:
        lent = {name: "base/" + self.base.weight_map[place] for name, place in self.from_base.items()}
        return lent | {name: f"trained/{file}" for name, file in self.trained.weight_map.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        place = self.from_base.get(name)
        if name not in self.trained.weight_map:
            return self.base[place]
        tensor = self.trained[name]
        if place is not None and 0 in tensor.shape:  # there in name only, as ZeRO-3 may leave it
            return self.base[place]
        if place is None or tensor.dtype not in ("BF16", "F16"):
            return tensor
        original = self.base[place]
        if ITEM_SIZES[original.dtype] <= ITEM_SIZES[tensor.dtype] or original.shape != tensor.shape:
            return tensor
        if name not in self.exact:
            self.exact[name] = _rounds_to(original, tensor)
        return original if self.exact[name] else tensor


def _match_names(trained: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """
    Name, as the trained checkpoint has or would have it -> name in the base; wrappers and a prefix of all may differ.

    Raises:
        CheckpointError: They have no name in common.
    """
    own = {strip_wrapper_prefixes(name): name for name in trained.weight_map}
    others = {strip_wrapper_prefixes(name): name for name in base.weight_map}
    best: tuple[int, str, str] = (0, "", "")
    for mine in PREFIXES:
        short = {name.removeprefix(mine) for name in own if name.startswith(mine)}
        for theirs in PREFIXES:
            shared = len(short & {name.removeprefix(theirs) for name in others if name.startswith(theirs)})
            if shared > best[0]:
                best = (shared, mine, theirs)
    shared, mine, theirs = best
    if not shared:
        raise CheckpointError(f"{base.source.name}: it has no name of {trained.source.name}: it cannot be its base")
    matched = {}
    for name, place in others.items():
        if name.startswith(theirs):
            wanted = mine + name.removeprefix(theirs)
            matched[own.get(wanted, wanted)] = place
    return matched


def _rounds_to(original: StoredTensor, rounded: StoredTensor) -> bool:
    """Whether a tensor is another one, rounded."""
    step, count = CHUNK // 8, math.prod(rounded.shape)
    for start in range(0, count, step):
        stop = min(start + step, count)
        if not np.array_equal(cast(read_bytes(original, start, stop), original.dtype, rounded.dtype),
                              read_bytes(rounded, start, stop)):  # fmt: skip
            return False
    return True


@dataclass(frozen=True)
class MeanTensor(StoredTensor):
    """
    The mean of tensors of one shape, in float32: they are summed in float64 and rounded once.

    Attributes:
        tensors: At least one.
    """

    tensors: tuple[StoredTensor, ...] = field(default=(), repr=False, compare=False)

    def pieces(self) -> Iterable[StoredTensor]:
        return chain.from_iterable(tensor.pieces() for tensor in self.tensors)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        stop = math.prod(self.shape) if stop is None else stop
        for first in range(start, stop, CHUNK // 8):
            last = min(first + CHUNK // 8, stop)
            total = np.zeros(last - first, np.float64)
            for tensor in self.tensors:
                total += cast(read_bytes(tensor, first, last), tensor.dtype, "F64").view(np.float64)
            yield (total / len(self.tensors)).astype(np.float32).view(np.uint8)


class Average(CompositeCheckpoint):
    """
    The mean of checkpoints of one run.

    Raises:
        CheckpointError: Their names differ.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]):
        super().__init__({f"average-{index}/" if index else "": each for index, each in enumerate(checkpoints)})
        first, *others = checkpoints
        for other in others:
            if odd := sorted(first.weight_map.keys() ^ other.weight_map.keys()):
                where = first if odd[0] in first.weight_map else other
                what = f"{odd[0]} is in {where.source.name} only: a mean is of checkpoints of one run"
                raise CheckpointError(f"{other.source.name}: {what}")

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return {name: f"mean/{file}" for name, file in self.parts[""].weight_map.items()}

    def document(self, file: str) -> dict[str, Any]:
        """config.json ties embeddings and head only if it does in all of them."""
        content = super().document(file)
        if file != "config.json" or not any(isinstance(part, CompositeCheckpoint) for part in self.parts.values()):
            return content
        return content if all(is_tied(part.document(file)) for part in self.parts.values()) else untied(content)

    def __getitem__(self, name: str) -> StoredTensor:
        tensors = [part[name] for part in self.parts.values()]
        first = tensors[0]
        for part, tensor in zip(self.parts.values(), tensors, strict=True):
            if tensor.shape != first.shape:
                what = f"{name} is {list(tensor.shape)}, {list(first.shape)} in {self.source.name}"
                raise CheckpointError(f"{part.source.name}: {what}: a mean is of checkpoints of one run")
            if tensor.dtype not in FLOAT_BITS:
                raise CheckpointError(f"{part.source.name}: {name} is {tensor.dtype}: there is no mean of such numbers")
        return MeanTensor(first.file, "F32", first.shape, tensors=tuple(tensors))
