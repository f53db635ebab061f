"""The components of a SAIL-VL: check one, or convert it to a folder of its own."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..export.card import write_conversion_card
from ..export.image_settings import clip_settings
from ..export.model_types import auto_class_of
from ..export.sailvl_files import tower_config
from ..export.tokenizer_files import VOCABULARIES, copy_tokenizer, padding_notes, write_generation_config
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint
from ..storage.errors import Problem, raise_if_any
from ..storage.files import write_json
from ..storage.names import strip_wrapper_prefixes, text_fields
from ..storage.tensors import NewTensor, StoredTensor, load_float32, torch_name
from ..verify.outputs import compare_outputs, run_in_clean_process
from .sailvl import CONNECTOR, PREFIXES, is_sailvl, match_names, renamed_tensors
from .sailvl_config import (
    build_meta_component,
    connector_shape,
    model_problems,
    shape_problems,
    vision_fields,
    without_converted,
)


AIMV2_TYPES = ("sailvit", "aimv2")  # what the model types of an AIMv2 start with

CARDS = {"language": ("The language model", ()), "vision": ("The vision encoder", ("vision",))}  # title, tags

VISION_FIELDS = {"hidden_size", "num_hidden_layers", "image_size", "patch_size"}


@dataclass(frozen=True)
class Component:
    """
    A component of a SAIL-VL, in it or in a folder of its own.

    Attributes:
        part: One of COMPONENTS.
        names: Name without the prefix -> name in the checkpoint.
        prefix: Prefix in the checkpoint.
        config: Its section of config.json; all of it for a connector, or in a folder of its own.
    """

    checkpoint: Checkpoint
    part: str
    names: dict[str, str]
    prefix: str
    config: Mapping[str, Any] = field(repr=False)


def find_component(checkpoint: Checkpoint, part: str) -> Component:
    config, names = checkpoint.document("config.json"), match_names(checkpoint.weight_map)
    if part == "connector":
        return Component(checkpoint, part, names.under(CONNECTOR), names.prefix + CONNECTOR, config)
    if not is_sailvl(checkpoint.weight_map, config):
        return Component(checkpoint, part, names.under(""), names.prefix, config)
    section = vision_fields(config) if part == "vision" else text_fields(config)
    return Component(checkpoint, part, names.under(PREFIXES[part]), names.prefix + PREFIXES[part], section)


def is_connector(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether there is a SAIL-VL, or its connector alone."""
    is_alone = bool(names) and all(strip_wrapper_prefixes(name).startswith(CONNECTOR) for name in names)
    return is_alone or is_sailvl(names, config)


def is_language_model(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether there is a SAIL-VL, or a causal language model by config.json."""
    architectures = config.get("architectures")
    return is_sailvl(names, config) or (
        isinstance(architectures, list) and f"{architectures}".endswith("ForCausalLM']")
    )


def is_vision_encoder(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether config.json, of a SAIL-VL or of a vision encoder alone, has the model type of one that is no AIMv2."""
    is_part = is_sailvl(names, config)
    fields = vision_fields(config) if is_part else config
    is_other = not str(fields.get("model_type", "sailvit")).startswith(AIMV2_TYPES)
    return is_other and (is_part or fields.keys() >= VISION_FIELDS)


def component_problems(checkpoint: Checkpoint, part: str) -> list[Problem]:
    """
    Compare a component with the model that config.json describes; a connector with the widths of config.json, or of its
    own first matrix.

    Raises:
        CheckpointError: transformers does not have the model.
    """
    found = find_component(checkpoint, part)
    if part != "connector":
        _, model = build_meta_component(checkpoint.source.name, part, found.config)
        problems = model_problems(checkpoint, found.names, model, found.prefix)
        return without_converted(problems, model.config.model_type)
    out, width = _matrix_shape(found)
    config_width, config_out = connector_shape(found.config)
    out, width = config_out or out or 0, config_width or width or 0
    expected = {"0.weight": (width,), "0.bias": (width,), "1.weight": (out, width), "1.bias": (out,),
                "3.weight": (out, out), "3.bias": (out,)}  # fmt: skip
    problems = [*shape_problems(checkpoint, found.names, expected, found.prefix)]
    return sorted(problems, key=lambda problem: problem.location)


def _matrix_shape(connector: Component) -> tuple[int | None, int | None]:
    name = connector.names.get("1.weight")
    return (*(connector.checkpoint[name].shape if name else ()), None, None)[:2]


def component_facts(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return what a report says about a component."""
    found = find_component(checkpoint, part)
    tensors, config = [checkpoint[stored_name] for stored_name in found.names.values()], found.config
    if part == "connector":
        out, width = _matrix_shape(found)
        facts: dict[str, Any] = {"in": width, "out": out}
    else:
        architectures = config.get("architectures") or [config.get("model_type")]
        keys = ("hidden_size", "num_hidden_layers", "image_size" if part == "vision" else "vocab_size")
        facts = {"architecture": architectures[0], **{key: config.get(key) for key in keys}}
    if part == "language":
        facts["tied"] = bool(config.get("tie_word_embeddings", False))
    facts["parameters"] = sum(prod(tensor.shape) for tensor in tensors)
    return {**facts, "dtypes": dict(Counter(torch_name(tensor.dtype) for tensor in tensors))}


@dataclass(kw_only=True)
class ComponentPlan(ConversionPlan):
    """
    Writes one component of a SAIL-VL.

    Attributes:
        names: Written name -> name in the checkpoint.
        part: One of COMPONENTS.
        prefix: In the source.
        config: Its config.json; empty for a connector, which nothing loads alone.
    """

    names: dict[str, str]
    part: str
    prefix: str
    config: dict[str, Any]

    def tensors(self) -> list[NewTensor]:
        return renamed_tensors(self.checkpoint, self.names, self.dtype)

    def source_tensors(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.names.values())

    def write_folder(self, folder: Path) -> None:
        if self.part == "connector":
            rows, columns = self.checkpoint[self.names[CONNECTOR + "1.weight"]].shape
            what = (
                f"The connector of a SAIL-VL, {torch_name(self.dtype)}: from {columns} numbers, those of a square of "
                f"visual tokens, to the {rows} of its language model. It is part of a model: nothing loads it alone."
            )
            write_conversion_card(folder, [self.checkpoint.source], what, ["sailvl"])
            return
        write_json(folder / "config.json", {**self.config, "dtype": torch_name(self.dtype)})
        if self.part == "vision":
            settings = clip_settings(self.checkpoint, self.config["image_size"])
            write_json(folder / "preprocessor_config.json", settings)
        elif copy_tokenizer(self.checkpoint, folder):
            write_generation_config(self.checkpoint, folder)
        title, tags = CARDS[self.part]
        description = f"{title} of a SAIL-VL: {self.config['model_type']}, {torch_name(self.dtype)}."
        write_conversion_card(folder, [self.checkpoint.source], description, tags)

    def verify(self, folder: Path) -> dict[str, Any] | None:
        if self.part == "vision":
            return _verify_vision(folder, self)
        if self.part == "connector":
            return None
        parameters = int(run_in_clean_process(folder, auto_class_of(folder))["parameters"])
        return {"loaded": self.config["architectures"][0], "parameters": parameters}

    def provenance(self) -> dict[str, Any]:
        return {"source": {"layout": "sailvl", "prefix": self.prefix}, "part": self.part}


def plan_component(checkpoint: Checkpoint, options: Options, part: str) -> ComponentPlan:
    """Raises CheckpointError if the component is not complete, contradicts config.json, or transformers lacks it."""
    source, found = checkpoint.source.name, find_component(checkpoint, part)
    raise_if_any(component_problems(checkpoint, part), source)
    names, config, title = found.names, {}, "the connector"
    if part == "connector":
        names = {CONNECTOR + name: stored_name for name, stored_name in names.items()}
    else:
        loaded, model = build_meta_component(source, part, found.config)
        title = type(model).__name__
        config = {**tower_config(loaded, found.config), "architectures": [title]}
    stored = {name: checkpoint[stored_name] for name, stored_name in names.items()}
    dtype = output_dtype(options.dtype, stored, source)
    plan = ComponentPlan(checkpoint=checkpoint, dtype=dtype, names=names, part=part, prefix=found.prefix, config=config)
    plan.notes.append(f"{len(names)} of {len(checkpoint.weight_map)} names are under {found.prefix}: {title}")
    if part == "language":
        if not VOCABULARIES & {*checkpoint.source.files}:
            plan.notes.append("there is no tokenizer next to the weights: none is written")
        plan.notes += padding_notes(checkpoint)
    return plan


def _verify_vision(folder: Path, plan: ComponentPlan) -> dict[str, Any]:
    """Compare the folder's outputs on a test image, in a clean process, with those of the source's weights."""
    import torch
    from transformers import AutoModel, __version__

    outputs = run_in_clean_process(folder, auto_class_of(folder))
    config, _ = build_meta_component(plan.checkpoint.source.name, "vision", plan.config)
    model = AutoModel.from_config(config).float().eval()
    model.load_state_dict(
        {name: load_float32(plan.checkpoint[stored], plan.dtype) for name, stored in plan.names.items()}
    )
    with torch.inference_mode():
        expected = model(outputs["pixel_values"]).last_hidden_state
    return compare_outputs(outputs["tokens"], expected, f"{type(model).__name__} of transformers {__version__}")
