"""Composite checkpoints: a training checkpoint over its base model; the average of several checkpoints of a run."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import TRAINER_STATE, Checkpoint
from .errors import CheckpointError
from .names import find_ends, is_tied, strip_wrapper_prefixes
from .sources import ADAPTER, DCP_METADATA, PROVENANCE, WEIGHT_SUFFIXES, Source, describe_source
from .tensors import CHUNK, FLOAT_BITS, ITEM_SIZES, ComputedTensor, StoredTensor, cast, read_bytes, rounds_to, spans


# Files of one checkpoint only: a base's do not replace missing ones.
NOT_SHARED = (PROVENANCE, TRAINER_STATE, ADAPTER, "README.md", "latest", DCP_METADATA)

MODEL_PREFIXES = ("", "model.", "base_model.model.")  # that tools add to all names of a model
ONE_RUN = "--average is for checkpoints of one run"


class CompositeSource(Source):
    """
    The files of several sources: those of the first under their own names, those of all others with a prefix. Top-level
    files of the others, except weights, also replace those that the first lacks.
    """

    def __init__(self, sources: Mapping[str, Source]):
        self.sources, self.name, self.revision = sources, sources[""].name, sources[""].revision
        files = [(prefix, file) for prefix, source in sources.items() for file in source.files]
        weights = (*WEIGHT_SUFFIXES, ".index.json")
        shared = (each for each in files if "/" not in each[1] and each[1] not in NOT_SHARED)
        self.locations = {file: (prefix, file) for prefix, file in shared if not file.endswith(weights)}
        self.locations |= {prefix + file: (prefix, file) for prefix, file in files}
        self.files = sorted(self.locations)

    def path(self, file: str) -> Path:
        prefix, name = self.locations.get(file, ("", file))
        return self.sources[prefix].path(name)


class CompositeCheckpoint(Checkpoint):
    """A checkpoint made of several: `parts`, by the prefix of their files, empty for the first."""

    def __init__(self, parts: Mapping[str, Checkpoint]):
        self.parts, first = parts, parts[""]
        self.source = CompositeSource({prefix: part.source for prefix, part in parts.items()})
        self.entry, self.trust_pickle = first.entry, first.trust_pickle

    @property
    def opened(self) -> dict[str, dict[str, StoredTensor]]:
        return {prefix + file: opened for prefix, part in self.parts.items() for file, opened in part.opened.items()}

    @property
    def documents(self) -> dict[str, dict[str, Any]]:
        return {prefix + file: read for prefix, part in self.parts.items() for file, read in part.documents.items()}

    @property
    def sources(self) -> list[Source]:
        return [source for part in self.parts.values() for source in part.sources]

    def open(self, file: str) -> dict[str, StoredTensor]:
        return {name: self[name] for name, its_file in self.weight_map.items() if its_file == file}

    def document(self, file: str) -> dict[str, Any]:
        """Of provenance.json only its source: its hashes are of other tensors. An adapter is merged."""
        if file == ADAPTER:
            return {}
        prefix, name = self.source.locations.get(file, ("", file))
        content = self.parts[prefix].document(name)
        return {key: content[key] for key in ("source",) if key in content} if file == PROVENANCE else content


class Overlay(CompositeCheckpoint):
    """A trained checkpoint; its base has the tensors that it lacks, or has rounded without changing them."""

    def __init__(self, trained: Checkpoint, base: Checkpoint):
        super().__init__({"": trained, "base/": base})
        self.trained, self.base = trained, base
        self.exact: dict[str, bool] = {}  # rounded tensors that were compared -> whether the base has them exact

    @cached_property
    def from_base(self) -> dict[str, str]:
        """Name in the trained checkpoint's naming -> name in the base, for all tensors of the base."""
        names = _match_names(self.trained, self.base)
        ends = find_ends([*names, *self.trained.weight_map])
        if ends is None or ends.head in self.trained.weight_map:
            return names
        tied = is_tied(self.document("config.json"))
        if tied and ends.embeddings in self.trained.weight_map:  # a tied head follows the trained embeddings
            return {name: stored_name for name, stored_name in names.items() if name != ends.head}
        if not tied and ends.head not in names and is_tied(self.base.document("config.json")):
            return {**names, ends.head: names[ends.embeddings]}  # the base's head is its embeddings
        return names

    @cached_property
    def weight_map(self) -> dict[str, str]:
        files = {name: "base/" + self.base.weight_map[stored_name] for name, stored_name in self.from_base.items()}
        return files | {name: f"trained/{file}" for name, file in self.trained.weight_map.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.trained.weight_map:
            return self.base[self.from_base[name]]
        tensor = self.trained[name]
        if name not in self.from_base or not (0 in tensor.shape or tensor.dtype in ("BF16", "F16")):
            return tensor
        original = self.base[self.from_base[name]]
        if 0 in tensor.shape:  # ZeRO-3 may save a frozen parameter empty
            return original
        if ITEM_SIZES[original.dtype] <= ITEM_SIZES[tensor.dtype] or original.shape != tensor.shape:
            return tensor
        if name not in self.exact:
            self.exact[name] = rounds_to(original, tensor)
        return original if self.exact[name] else tensor

    def default_dtype(self, names: Collection[str] = ()) -> str | None:
        return self.trained.default_dtype(names)

    @property
    def training_metadata(self) -> dict[str, Any]:
        rounded = sorted(name for name, exact in self.exact.items() if not exact)
        base = origin_of_base(self.base) | {"exact": sum(self.exact.values())}
        return self.trained.training_metadata | {"base": base | ({"rounded": rounded} if rounded else {})}


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name, revision, licence and training_metadata, for the provenance.json of what is made of it."""
    return describe_source(checkpoint.source) | checkpoint.training_metadata


def origin_of_base(base: Checkpoint) -> dict[str, Any]:
    before = base.document(PROVENANCE).get("source")
    return origin_of(base) | ({"source": before} if before else {})


def _match_names(trained: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """Name in the trained checkpoint's naming -> name in the base; wrappers and one of MODEL_PREFIXES may differ."""
    own = {strip_wrapper_prefixes(name): name for name in trained.weight_map}
    others = {strip_wrapper_prefixes(name): name for name in base.weight_map}

    prefix, other, most = "", "", 0
    for one, two in product(MODEL_PREFIXES, repeat=2):
        shared = sum(name.startswith(one) and two + name.removeprefix(one) in others for name in own)
        if shared > most:
            prefix, other, most = one, two, shared
    if not most:
        raise CheckpointError(f"{base.source.name}: it has no name of {trained.source.name}: it cannot be its base")
    names = {prefix + short.removeprefix(other): name for short, name in others.items() if short.startswith(other)}
    return {own.get(short, short): name for short, name in names.items()}


class Average(CompositeCheckpoint):
    """The mean of checkpoints of one run; refuses those with different names."""

    def __init__(self, checkpoints: Sequence[Checkpoint]):
        super().__init__({f"average-{index}/" if index else "": each for index, each in enumerate(checkpoints)})
        first, *others = checkpoints
        for other in others:
            if different := sorted(first.weight_map.keys() ^ other.weight_map.keys()):
                owner = first if different[0] in first.weight_map else other
                raise CheckpointError(f"{other.source.name}: {different[0]} is in {owner.source.name} only: {ONE_RUN}")

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return {name: f"mean/{file}" for name, file in self.parts[""].weight_map.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        tensors = [part[name] for part in self.parts.values()]
        first = tensors[0]
        for part, tensor in zip(self.parts.values(), tensors, strict=True):
            if tensor.shape != first.shape:
                what = f"{name} is {list(tensor.shape)}, {list(first.shape)} in {self.source.name}"
                raise CheckpointError(f"{part.source.name}: {what}: {ONE_RUN}")
            if tensor.dtype not in FLOAT_BITS:
                raise CheckpointError(f"{part.source.name}: {name} is {tensor.dtype}: there is no mean of such numbers")
        return ComputedTensor(first.file, "F32", first.shape, read=partial(_mean, tensors), parents=tuple(tensors))

    @property
    def training_metadata(self) -> dict[str, Any]:
        return {"mean_of": [origin_of(part) for part in self.parts.values()]}


def _mean(tensors: Sequence[StoredTensor], start: int, stop: int) -> Iterator[np.ndarray]:
    """The mean of tensors of one shape: summed in float64, rounded once to float32."""
    for first, last in spans(start, stop, CHUNK // 8):
        total = np.zeros(last - first, np.float64)
        for tensor in tensors:
            total += cast(read_bytes(tensor, first, last), tensor.dtype, "F64").view(np.float64)
        yield (total / len(tensors)).astype(np.float32).view(np.uint8)
