"""InternViT and InternLM2, published with remote code, converted to transformers' classes: what both share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..export.card import write_conversion_card
from ..export.model_types import auto_class_of
from ..plan import Options
from ..storage.checkpoint import Checkpoint, check_values
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.files import write_json
from ..storage.tensors import torch_name
from ..verify.outputs import run_in_clean_process
from .mapped_plan import MappedPlan, checked_dtype, find_model, index_problems
from .name_tables import Dimensions, Match, ModelFamily


# Sections of a multimodal config.json, by component.
SECTIONS = {"vision": ("vision_config",), "language": ("llm_config", "text_config", "language_config")}


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
    """
    The conversion of an InternViT or an InternLM2.

    Attributes:
        config: config.json, without the dtype.
        files: Name -> text or JSON of the other files, without weights and card.
        details: Entries of provenance.json.
    """

    config: dict[str, Any] = field(repr=False)
    files: dict[str, str | dict[str, Any]] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)

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
