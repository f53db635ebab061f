"""Configuration of a SAIL-VL: read config.json, build the models that it describes, check tensors against them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from ..export.sailvl_files import portable
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.files import first_line
from ..storage.names import text_fields
from ..storage.tensors import is_same


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from ...configuration_sailvl import SAILVLConfig

MODEL_TYPES = ("sailvl", "internvl_chat")


def vision_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of the vision encoder in the config.json of a SAIL-VL."""
    fields = config.get("vision_config")
    return fields if isinstance(fields, Mapping) else {}


def connector_shape(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the input and output width of the connector by config.json, None where it does not have it."""
    ratio, width, out = config.get("downsample_ratio"), *map(_width, (vision_fields(config), text_fields(config)))
    factor = round(1 / ratio) if isinstance(ratio, float) and ratio else config.get("pixel_shuffle_factor", 2)
    return (factor**2 * width if width and type(factor) is int else None), out


def _width(fields: Mapping[str, Any]) -> int | None:
    width = fields.get("hidden_size")
    return width if type(width) is int else None


@contextmanager
def _config_errors(source: str, fix: str = "") -> Iterator[None]:
    """Turn an exception of a configuration or model class into a CheckpointError in one line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json: {first_line(error)}{fix}") from error


def read_config(checkpoint: Checkpoint, **changes: Any) -> "SAILVLConfig":
    """Raises CheckpointError if config.json is missing, describes no language model, or is invalid."""
    from ...configuration_sailvl import SAILVLConfig

    fields = checkpoint.document("config.json")
    if not text_fields(fields):
        what = "has no section of a language model" if fields else "is missing"
        fix = "put the model's config.json next to the weights, or convert with --base"
        raise CheckpointError(f"{checkpoint.source.name}: config.json {what}: {fix}")
    with _config_errors(checkpoint.source.name, " (--part vision, connector or language converts one component)"):
        return SAILVLConfig.from_dict({**fields, **changes, "model_type": SAILVLConfig.model_type})


def build_meta_model(config: "SAILVLConfig", source: str) -> "nn.Module":
    """Return the model on the meta device; raises CheckpointError if transformers does not have a component."""
    import torch

    from ...modeling_sailvl import SAILVLForConditionalGeneration

    with _config_errors(source), torch.device("meta"):
        model = SAILVLForConditionalGeneration(config)
    model.tie_weights()
    return model


def build_meta_component(source: str, part: str, fields: Mapping[str, Any]) -> "tuple[PretrainedConfig, nn.Module]":
    """
    Return the configuration of a vision encoder or language model, and the model on the meta device.

    Args:
        part: "vision" or "language".
        fields: Its section of config.json.

    Raises:
        CheckpointError: transformers does not have it.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    model_type, auto_class = fields.get("model_type"), AutoModel if part == "vision" else AutoModelForCausalLM
    if not fields:
        fix = "put the model's config.json there, or convert with --base"
        raise CheckpointError(f"{source}: config.json has no section of the {part} model: {fix}")
    if model_type not in CONFIG_MAPPING:
        what = f"expected a {part} model type that the installed transformers has, got {model_type!r}"
        raise CheckpointError(f"{source}: config.json: {what}: install a newer transformers, or correct model_type")
    kept = {key: value for key, value in portable(fields).items() if key != "model_type"}
    with _config_errors(source), torch.device("meta"):
        config = CONFIG_MAPPING[model_type](**kept)
        model = auto_class.from_config(config)
    model.tie_weights()
    return config, model


def model_problems(
    checkpoint: Checkpoint, names: Mapping[str, str], model: "nn.Module", prefix: str = ""
) -> list[Problem]:
    """
    Compare names and shapes of a checkpoint's tensors with a model's, and the values of tensors that it ties.

    Args:
        names: Name in the model -> name in the checkpoint.
        prefix: Prefix in the checkpoint, for the names of missing tensors.
    """
    first: dict[int, str] = {}  # id of a parameter -> its first name; another one is tied to that
    parameters = model.named_parameters(remove_duplicate=False)
    tied = {name: other for name, each in parameters if (other := first.setdefault(id(each), name)) != name}
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {name: shape for name, shape in state.items() if name in names or name not in tied}
    problems = [problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)]
    problems += shape_problems(checkpoint, names, expected, prefix)
    for name, other in () if checkpoint.source.headers_only else tied.items():
        if name in names and other in names and not is_same(checkpoint[names[name]], checkpoint[names[other]]):
            what = f"differs from {other}, to which config.json ties it: correct tie_word_embeddings"
            problems.append(Problem("values", names[name], what))
    return sorted(problems, key=lambda problem: problem.location)


def shape_problems(
    checkpoint: Checkpoint, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]], prefix: str
) -> Iterator[Problem]:
    """Compare names and shapes; arguments as in model_problems, expected: name -> shape."""
    for name, shape in expected.items():
        if name not in names:
            yield Problem("missing", prefix + name, f"missing; expected {list(shape)}")
    for name, stored_name in names.items():
        shape = checkpoint[stored_name].shape
        if name not in expected and ("lora_" in name or ".base_layer." in name):
            what = "belongs to an adapter: merge it first (peft's merge_and_unload)"
            yield Problem("unexpected", stored_name, what)
        elif name not in expected:
            yield Problem("unexpected", stored_name, "what config.json describes has no such tensor")
        elif not prod(shape):
            yield Problem(
                "empty", stored_name, f"empty, {list(shape)}: saved under ZeRO-3 without gathering it? Save it gathered"
            )
        elif shape != expected[name]:
            yield Problem("shape", stored_name, f"expected {list(expected[name])} by config.json, got {list(shape)}")


def without_converted(problems: list[Problem], model_type: str, prefix: str = "") -> list[Problem]:
    """
    Leave out what names and shapes cannot show: transformers (>= 5) fuses or splits some models' tensors on load.

    Args:
        model_type: Of the component whose names have the prefix.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers < 5
        return problems
    if not get_checkpoint_conversion_mapping(model_type):
        return problems
    return [problem for problem in problems if prefix not in problem.location or problem.kind == "values"]
