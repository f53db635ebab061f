"""
InternViT and InternLM2, published with remote code, converted to transformers' classes: what both share.

No value changes; query, key and value of InternLM2 are stored by key-value head (name_tables.qkv_group_slices).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..export.card import write_conversion_card
from ..export.model_types import auto_class_of
from ..plan import Options, output_dtype
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.files import write_json
from ..storage.hashes import check_values
from ..storage.tensors import torch_name
from ..verify.outputs import run_in_clean_process
from .mapped_plan import MappedPlan
from .name_tables import Dimensions, MatchedTensors, ModelFamily, match_names


# Sections of a multimodal config.json, by component.
SECTIONS = {"vision": ("vision_config",), "language": ("llm_config", "text_config", "language_config")}


def read_source(
    checkpoint: Checkpoint, family: ModelFamily, options: Options
) -> tuple[MatchedTensors, Mapping[str, Any]]:
    """
    Return the tensors of a model, and its original configuration.

    Raises:
        CheckpointError: There is none, a file of it is missing or broken, names have no mapping, tensors are empty, or
            an option does not apply.
    """
    source, title = checkpoint.source.name, family.title
    for option in ("to_layout", "from_layout", "image_size", "insert_vision"):
        if getattr(options, option) is not None:
            what = f"only for AIMv2 encoders, got an {title}: leave it out"
            raise CheckpointError(f"{source}: --{option.replace('_', '-')}: {what}")
    if options.part not in (None, family.component):
        raise CheckpointError(f"{source}: --part: expected {family.component} for an {title}, got {options.part}")
    match = match_names(checkpoint.weight_map, family, prefix=options.prefix)
    matched = MatchedTensors(match, {name: checkpoint[stored] for name, stored in match.names.items()})
    raise_if_any([problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)], source)
    raise_if_any(matched.problems(), source)
    return matched, _section(checkpoint, family.component)


def _section(checkpoint: Checkpoint, component: str) -> Mapping[str, Any]:
    """Return a model's section of config.json, or all of it if it has no sections."""
    config = checkpoint.document("config.json")
    section = next((key for key in SECTIONS[component] if key in config), None)
    if section and not isinstance(config[section], Mapping):
        what = f"expected a JSON object, got {config[section]!r}"
        raise CheckpointError(f"{checkpoint.source.name}: {section} in config.json: {what}")
    return config[section] if section else config


def check_source(
    checkpoint: Checkpoint, matched: MatchedTensors, dimensions: Dimensions, options: Options, problems: list[Problem]
) -> str:
    """
    Return the dtype to write.

    Args:
        problems: Known ones.

    Raises:
        CheckpointError: There are problems, tensors that do not have these dimensions, or values whose recorded hashes
            differ.
    """
    source, accepted = checkpoint.source.name, ("mixed",) if options.dtype else ()
    problems = problems + sorted(matched.problems(dimensions), key=lambda problem: problem.location)
    raise_if_any(problems + [one for one in matched.dtype_problems() if one.kind not in accepted], source)
    stored = {matched.match.names[name]: tensor for name, tensor in matched.tensors.items()}
    check_values(checkpoint, stored)
    return output_dtype(options.dtype, stored, source)


@dataclass(kw_only=True)
class InternVLPlan(MappedPlan):
    """
    The conversion of an InternViT or an InternLM2.

    Attributes:
        config: config.json, without the dtype.
    """

    config: dict[str, Any] = field(repr=False)

    def write_config(self, folder: Path) -> None:
        write_json(folder / "config.json", {**self.config, "dtype": torch_name(self.dtype)})

    def write_card(self, folder: Path, *details: str) -> None:
        dimensions, title = self.dimensions, self.match.family.title
        size = f"{dimensions.num_hidden_layers} blocks of width {dimensions.hidden_size}"
        facts = ", ".join([f"An {title}", size, *details, torch_name(self.dtype)])
        description = f"{facts}, as transformers' {self.config['architectures'][0]}."
        tags = ["vision"] if self.match.family.component == "vision" else []
        write_conversion_card(folder, [self.checkpoint.source], description, tags)

    def verify(self, folder: Path) -> dict[str, Any]:
        """
        Load the folder strictly in a clean process.

        Raises:
            VerificationError: It does not load.
        """
        run_in_clean_process(folder, auto_class_of(folder))
        return {"reference": "strict load in a clean process", "loaded": self.config["architectures"][0]}

    def provenance(self) -> dict[str, Any]:
        return {
            "source": self.source_record("buffers"),
            "part": self.match.family.component,
            "layout": self.config["architectures"][0],
            "shape": asdict(self.dimensions),
        }
