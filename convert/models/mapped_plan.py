"""Conversions that copy intervals of elements under new names; what those of InternViT and InternLM2 share."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..export.card import write_conversion_card
from ..export.image_settings import center_crops, has_normalization
from ..export.model_types import auto_class_of
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint, check_values
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.files import write_json
from ..storage.tensors import NewTensor, StoredTensor, cast_stream, torch_name
from ..verify.outputs import run_in_clean_process
from .name_tables import (
    Dimensions,
    Match,
    ModelFamily,
    NamingScheme,
    TensorSource,
    match_names,
    plan_tensors,
    tensor_specs,
)


# Sections of a multimodal config.json, by component.
SECTIONS = {"vision": ("vision_config",), "language": ("llm_config", "text_config", "language_config")}


@dataclass(kw_only=True)
class MappedPlan(ConversionPlan):
    """A model to write under the names of another scheme, `layout`; the dimensions are those of the source."""

    match: Match
    dimensions: Dimensions
    layout: NamingScheme

    def sources(self) -> list[TensorSource]:
        """Return where the elements of every tensor to write come from."""
        own, target = (tensor_specs(scheme, self.dimensions) for scheme in (self.match.scheme, self.layout))
        return plan_tensors(own, target)

    def tensors(self) -> list[NewTensor]:
        prefix, dtype = self.layout.prefix, self.dtype
        return [
            NewTensor(prefix + one.target.name, dtype, one.target.shape, lambda one=one: self.chunks(one))
            for one in self.sources()
        ]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return self.match.tensors.values()

    def chunks(self, source: TensorSource) -> Iterator[np.ndarray]:
        """Yield the bytes (uint8) of a tensor to write."""
        for name, start, stop in source.sources:
            yield from cast_stream(self.match.tensors[name], self.match.names[name], self.dtype, start, stop)

    def source_record(self, dropped: str) -> dict[str, Any]:
        """Return "source" of provenance.json; `dropped` is the kind of tensors that the scheme drops."""
        match, others = self.match, {dropped: self.match.dropped, "others": self.match.others}
        record = {"layout": match.scheme.name, "prefix": match.prefix, "recognised": match.reason}
        return {**record, "dropped": others}


def find_model(
    checkpoint: Checkpoint, family: ModelFamily, scheme: str | None = None, prefix: str | None = None
) -> Match:
    """
    Return the model of a family in a checkpoint, with its tensors; only the files that hold them are opened. `scheme`,
    a key of the family's, and `prefix`, of the names, are detected by default.

    Raises:
        CheckpointError: There is no such model or scheme, more than one model, or a file of it is missing or corrupt.
    """
    try:
        match = match_names(checkpoint.weight_map, family, scheme, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source.name}: {error}") from error
    return match.read(checkpoint)


def index_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return the differences between the index and the names in the opened files."""
    return [problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)]


def checked_dtype(checkpoint: Checkpoint, match: Match, problems: list[Problem], options: Options) -> str:
    """Return the dtype to write; raise CheckpointError for problems but a mixed dtype, if the options choose one."""
    source, accepted = checkpoint.source.name, ("mixed",) if options.dtype else ()
    raise_if_any([problem for problem in problems if problem.kind not in accepted], source)
    return output_dtype(options.dtype, match.tensors, source)


def match_notes(match: Match, kind: str) -> list[str]:
    """Return messages about a match; `kind` is that of the tensors that the scheme drops."""
    notes = [match.reason]
    if match.wrappers:
        notes.append(f"removed from the names: {', '.join(match.wrappers)}")
    if match.dropped:
        notes.append(f"dropped {kind}: {len(match.dropped)} tensors ({match.dropped[0]}, ...)")
    others = f"not part of the {match.family.title}, not converted"
    return notes + [f"{others}: {name} ({count} tensors)" for name, count in match.others.items()]


def image_notes(checkpoint: Checkpoint) -> list[str]:
    """Return differences between the source's image preprocessing and the one that is written."""
    notes = []
    if not has_normalization(checkpoint):
        notes.append("no image_mean and image_std in the source: ImageNet's, as for SAILViT, are assumed")
    if center_crops(checkpoint):
        notes.append("the source center-crops images; the folder resizes them to a square, as SAILViT does")
    return notes


def read_source(checkpoint: Checkpoint, family: ModelFamily, prefix: str | None) -> tuple[Match, Mapping[str, Any]]:
    """
    Return a model and its original configuration: its section of config.json, or all of it without sections. Raises
    CheckpointError if there is none, a file of it is missing or broken, names have no mapping, or tensors are empty.
    """
    source, match = checkpoint.source.name, find_model(checkpoint, family, prefix=prefix)
    raise_if_any(index_problems(checkpoint) + match.problems(), source)
    config = checkpoint.document("config.json")
    section = next((key for key in SECTIONS[family.component] if key in config), None)
    if section and not isinstance(config[section], Mapping):
        raise CheckpointError(f"{source}: {section} in config.json: expected a JSON object, got {config[section]!r}")
    return match, config[section] if section else config


def check_source(
    checkpoint: Checkpoint, match: Match, dimensions: Dimensions, problems: list[Problem], options: Options
) -> str:
    """
    Return the dtype to write; `problems` are those of the configuration. Raises CheckpointError if there are any, or
    tensors of other dimensions, or values whose recorded hashes differ.
    """
    problems = problems + sorted(match.problems(dimensions), key=lambda problem: problem.location)
    dtype = checked_dtype(checkpoint, match, problems + match.dtype_problems(), options)
    check_values(checkpoint, match.stored)
    return dtype


@dataclass(kw_only=True)
class InternVLPlan(MappedPlan):
    """The conversion of an InternViT or an InternLM2."""

    config: dict[str, Any] = field(repr=False)  # config.json, without the dtype
    files: dict[str, str | dict[str, Any]] = field(repr=False)  # text or JSON of the others, without weights and card
    details: dict[str, Any] = field(default_factory=dict)  # entries of provenance.json

    def write_folder(self, folder: Path) -> None:
        config, dtype, family = self.config, torch_name(self.dtype), self.match.family
        for name, content in {"config.json": {**config, "dtype": dtype}, **self.files}.items():
            if isinstance(content, str):
                (folder / name).write_text(content, encoding="utf-8")
            else:
                write_json(folder / name, content)
        facts = [f"An {family.title}", f"{config['num_hidden_layers']} blocks of width {config['hidden_size']}"]
        if "image_size" in config:
            facts.append(f"{config['image_size'][0]} pixels with a class token first")
        description = f"{', '.join([*facts, dtype])}, as transformers' {self.layout.name}."
        tags = ["vision"] if family.component == "vision" else []
        write_conversion_card(folder, [self.checkpoint.source], description, tags)

    def verify(self, folder: Path) -> dict[str, Any]:
        """Load the folder strictly in a clean process; raises VerificationError if it does not load."""
        run_in_clean_process(folder, auto_class_of(folder))
        return {"reference": "strict load in a clean process", "loaded": self.layout.name}

    def provenance(self) -> dict[str, Any]:
        record = {"source": self.source_record("buffers"), "part": self.match.family.component}
        return {**record, "layout": self.layout.name, "shape": asdict(self.dimensions), **self.details}
