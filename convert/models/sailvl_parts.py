"""One part of a SAIL-VL, taken out: its language model, its connector, or a tower that transformers has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.card import write_conversion_card
from ..export.image_settings import clip_settings
from ..export.sailvl_files import portable, tower_config
from ..export.tokenizer_files import VOCABULARIES, copy_tokenizer, padding_notes, write_generation_config
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.files import first_line, write_json
from ..storage.tensors import load_float32, torch_name
from ..storage.tied_embeddings import text_fields
from ..verify.outputs import compare_outputs, run_in_clean_process
from .aimv2_names import match_aimv2
from .internlm2 import is_internlm2, plan_internlm2
from .internvit import is_internvit, plan_internvit
from .sailvl import (
    CONNECTOR,
    LANGUAGE,
    VISION,
    Names,
    StoredJob,
    has_weight_conversions,
    is_sailvl,
    match_names,
    model_problems,
)


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class ComponentPlan(StoredJob):
    """
    A part that lies in a SAIL-VL under a prefix.

    Attributes:
        part: One of job.PARTS.
        prefix: In the source.
        config: Its config.json; empty where nothing loads it.
    """

    part: str
    prefix: str
    config: dict[str, Any]

    def write_folder(self, folder: Path) -> None:
        if self.config:
            write_json(folder / "config.json", {**self.config, "dtype": torch_name(self.dtype)})
        write_beside = {"language": self._write_language, "vision": self._write_tower, "connector": self._write_card}
        write_beside[self.part](folder)

    def _write_language(self, folder: Path) -> None:
        if copy_tokenizer(self.checkpoint, folder):
            write_generation_config(self.checkpoint, folder)
        description = f"The language model of a SAIL-VL: {self.config['model_type']}, {torch_name(self.dtype)}."
        write_conversion_card(folder, [self.checkpoint.source], description, [])

    def _write_tower(self, folder: Path) -> None:
        write_json(folder / "preprocessor_config.json", clip_settings(self.checkpoint, self.config["image_size"]))
        description = f"The vision encoder of a SAIL-VL: {self.config['model_type']}, {torch_name(self.dtype)}."
        write_conversion_card(folder, [self.checkpoint.source], description)

    def _write_card(self, folder: Path) -> None:
        rows, columns = self.checkpoint[self.names[CONNECTOR + "1.weight"]].shape
        description = (
            f"The connector of a SAIL-VL, {torch_name(self.dtype)}: from {columns} numbers, those of a square of "
            f"visual tokens, to the {rows} of its language model. It is part of a model: nothing loads it alone."
        )
        write_conversion_card(folder, [self.checkpoint.source], description, ["sailvl"])

    def verify(self, folder: Path) -> dict[str, Any] | None:
        if self.part == "vision":
            return verify_tower(folder, self)
        if self.part == "connector":
            return None
        parameters = int(run_in_clean_process(folder)["parameters"])
        return {"loaded": self.config["architectures"][0], "parameters": parameters}

    def record(self) -> dict[str, Any]:
        return {"source": {"layout": "sailvl", "prefix": self.prefix}, "part": self.part}


def plan_language(checkpoint: Checkpoint, asked: Options) -> ConversionPlan:
    """
    Raises:
        CheckpointError: There is no whole language model, or one that transformers does not have.
    """
    if is_internlm2(checkpoint.weight_map):
        return plan_internlm2(checkpoint, asked)
    job = _plan_part(checkpoint, asked, "language", LANGUAGE, text_fields(checkpoint.document("config.json")))
    if not VOCABULARIES & {*checkpoint.source.files}:
        job.notes.append("there is no tokenizer beside the weights: none is written")
    job.notes += padding_notes(checkpoint)
    return job


def plan_other_tower(checkpoint: Checkpoint, asked: Options) -> ComponentPlan:
    """
    Raises:
        CheckpointError: It is not whole, or is to become what it cannot.
    """
    fields = checkpoint.document("config.json").get("vision_config") or {}
    for option in ("to_layout", "image_size"):
        if getattr(asked, option) is not None:
            raise CheckpointError(
                f"{checkpoint.source.name}: the tower is {fields.get('model_type')!r}, no AIMv2: it is taken out as it "
                f"is, without --{option.replace('_', '-')}"
            )
    return _plan_part(checkpoint, asked, "vision", VISION, fields)


def has_other_tower(checkpoint: Checkpoint) -> bool:
    """Whether a SAIL-VL has a tower that is no AIMv2."""
    if not is_sailvl(checkpoint):
        return False
    fields = checkpoint.document("config.json").get("vision_config") or {}
    try:
        match_aimv2(checkpoint.weight_map)
    except CheckpointError:
        return fields.get("model_type", "sailvit") not in ("sailvit", "aimv2")
    return False


def _plan_part(
    checkpoint: Checkpoint, asked: Options, part: str, prefix: str, fields: Mapping[str, Any]
) -> ComponentPlan:
    source, names = checkpoint.source.name, match_names(checkpoint.weight_map)
    own = names.under(prefix)
    if not own:
        raise CheckpointError(f"{source}: no name starts with {prefix}, as --part {part} of a SAIL-VL wants")
    config, model = build_meta_model(source, part, fields)
    raise_if_any(_problems_of(checkpoint, own, model, names.prefix + prefix), source)
    dtype = output_dtype(asked.dtype, {name: checkpoint[place] for name, place in own.items()}, source)
    written = {"architectures": [type(model).__name__], **tower_config(config, fields)}
    job = ComponentPlan(
        checkpoint=checkpoint, dtype=dtype, names=own, part=part, prefix=names.prefix + prefix,
        config={**written, "architectures": [type(model).__name__]},
    )  # fmt: skip
    job.notes = [f"{len(own)} of {len(checkpoint.weight_map)} names are under {job.prefix}: {type(model).__name__}"]
    return job


def part_problems(checkpoint: Checkpoint, part: str, prefix: str, fields: Mapping[str, Any]) -> list[Problem]:
    """
    What is missing from a part, too much or of another shape: a connector by config.json, a language model or a tower
    by the class that it is of.

    Raises:
        CheckpointError: transformers does not have it.
    """
    names = match_names(checkpoint.weight_map)
    if part == "connector":
        return connector_problems(checkpoint, names)
    finds, plan = (is_internvit, plan_internvit) if part == "vision" else (is_internlm2, plan_internlm2)
    if finds(checkpoint.weight_map):
        plan(checkpoint, Options())
        return []
    _, model = build_meta_model(checkpoint.source.name, part, fields)
    return _problems_of(checkpoint, names.under(prefix), model, names.prefix + prefix)


def _problems_of(checkpoint: Checkpoint, own: Mapping[str, str], model: "nn.Module", prefix: str) -> list[Problem]:
    problems = model_problems(checkpoint, own, model, prefix)
    fused = has_weight_conversions(model.config.model_type)
    return [problem for problem in problems if not fused or problem.kind == "values"]


def part_fields(checkpoint: Checkpoint, part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of a part: a connector by its first matrix, another by its configuration."""
    if part == "connector":
        place = match_names(checkpoint.weight_map).under(CONNECTOR).get("1.weight")
        rows, columns = (*(checkpoint[place].shape if place else ()), None, None)[:2]
        return {"in": columns, "out": rows}
    named = fields.get("architectures") or [fields.get("model_type")]
    told = {"architecture": named[0], **{key: fields.get(key) for key in ("hidden_size", "num_hidden_layers")}}
    if part == "vision":
        return {**told, "image_size": fields.get("image_size")}
    return {**told, "vocab_size": fields.get("vocab_size"), "tied": bool(fields.get("tie_word_embeddings", False))}


def build_meta_model(source: str, part: str, fields: Mapping[str, Any]) -> "tuple[PretrainedConfig, nn.Module]":
    """
    The configuration of a tower or a language model, and the model without numbers.

    Raises:
        CheckpointError: transformers does not have it.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    kind, auto = fields.get("model_type"), AutoModel if part == "vision" else AutoModelForCausalLM
    if not fields:
        what = f"config.json says nothing of the {part} model: put the one of the model there, or convert with --base"
        raise CheckpointError(f"{source}: {what}")
    if kind not in CONFIG_MAPPING:
        what = f"config.json: the {part} model is {kind!r}, which the installed transformers does not know"
        raise CheckpointError(f"{source}: {what}: install a newer one, or correct model_type")
    try:
        config = CONFIG_MAPPING[kind](**{key: value for key, value in portable(fields).items() if key != "model_type"})
        with torch.device("meta"):
            model = auto.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json: {first_line(error)}") from error
    model.tie_weights()
    return config, model


def plan_connector(checkpoint: Checkpoint, asked: Options) -> ComponentPlan:
    """
    Raises:
        CheckpointError: It is not whole, or not of the shape that config.json asks for.
    """
    source, names = checkpoint.source.name, match_names(checkpoint.weight_map)
    raise_if_any(connector_problems(checkpoint, names), source)
    own = {CONNECTOR + name: place for name, place in names.under(CONNECTOR).items()}
    dtype = output_dtype(asked.dtype, {name: checkpoint[place] for name, place in own.items()}, source)
    job = ComponentPlan(
        checkpoint=checkpoint, dtype=dtype, names=own, part="connector", prefix=names.prefix + CONNECTOR, config={}
    )
    job.notes = [f"{len(own)} of {len(checkpoint.weight_map)} names are under {job.prefix}: the connector"]
    return job


def connector_problems(checkpoint: Checkpoint, names: Names) -> list[Problem]:
    """What is missing, too much or of a wrong shape, by config.json where it says, else among the tensors."""
    found = {name: checkpoint[place].shape for name, place in names.under(CONNECTOR).items()}
    width, folded = (*found.get("1.weight", ()), 0, 0)[:2]
    said_folded, said_width = connector_shape(checkpoint.document("config.json"))
    width, folded = said_width or width, said_folded or folded
    wanted = {"0.weight": (folded,), "0.bias": (folded,), "1.weight": (width, folded), "1.bias": (width,),
              "3.weight": (width, width), "3.bias": (width,)}  # fmt: skip
    stored, prefix = names.under(CONNECTOR), names.prefix + CONNECTOR
    problems = [
        Problem("missing", prefix + name, "missing from the connector") for name in wanted.keys() - found.keys()
    ]
    problems += [
        Problem("unexpected", stored[name], "not part of the connector") for name in found.keys() - wanted.keys()
    ]
    problems += [
        Problem("shape", stored[name], f"is {list(shape)}, by config.json {list(wanted[name])}")
        for name, shape in found.items()
        if name in wanted and shape != wanted[name]
    ]
    return sorted(problems, key=lambda problem: problem.location)


def connector_shape(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Numbers in and out of a connector, as far as config.json tells."""
    vision = config.get("vision_config")
    width = vision.get("hidden_size") if isinstance(vision, Mapping) else None
    ratio = config.get("downsample_ratio")
    factor = round(1 / ratio) if isinstance(ratio, float) and ratio else config.get("pixel_shuffle_factor", 2)
    known = type(width) is int and type(factor) is int
    out = text_fields(config).get("hidden_size")
    return (factor**2 * width if known else None), (out if type(out) is int else None)


def verify_tower(folder: Path, job: ComponentPlan) -> dict[str, Any]:
    """
    Loads the folder in a fresh process and compares its tokens with those of the source's weights.

    Raises:
        VerificationError: It does not load, or its tokens differ.
    """
    import torch
    from transformers import AutoModel, __version__

    alone = run_in_clean_process(folder)
    config, _ = build_meta_model(job.checkpoint.source.name, "vision", job.config)
    model = AutoModel.from_config(config).float()
    model.load_state_dict({name: load_float32(job.checkpoint[place], job.dtype) for name, place in job.names.items()})
    with torch.inference_mode():
        tokens = model.eval()(alone["pixel_values"]).last_hidden_state
    return compare_outputs(alone["tokens"], tokens, f"{type(model).__name__} of transformers {__version__}")
