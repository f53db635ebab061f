"""What a SAIL-VL is in a checkpoint: names of its tensors, configuration and components, and checks of them."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..export.sailvl_files import portable, transformers_errors
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.names import shuffle_factor, strip_wrapper_prefixes, text_fields, without_wrapper_prefixes
from ..storage.tensors import FLOAT_BITS, is_same, torch_name
from .checks import tensor_problems


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from ...configuration_sailvl import SAILVLConfig

VISION, CONNECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."
PREFIXES = {"vision": VISION, "connector": CONNECTOR, "language": LANGUAGE, "all": ""}
COMPONENT_NAME = re.compile(r"(?P<prefix>(?:.*?\.)??)(?:vision_model|mlp1|language_model)\.")

VISION_FIELDS = {"hidden_size", "num_hidden_layers", "image_size", "patch_size"}


class _Names(NamedTuple):
    """The names of a checkpoint, seen as those of a SAIL-VL."""

    stored: dict[str, str]  # name in a SAIL-VL -> name in the checkpoint
    prefix: str  # in the checkpoint
    wrappers: list[str]  # name segments that wrappers such as torch.compile added
    others: list[str]  # names in the checkpoint without the prefix


def _match_names(names: Iterable[str]) -> _Names:
    cleaned, wrappers = without_wrapper_prefixes(names)
    prefixes = Counter(match["prefix"] for short in cleaned if (match := COMPONENT_NAME.match(short)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    stored = {short.removeprefix(prefix): name for short, name in cleaned.items() if short.startswith(prefix)}
    others = [name for short, name in cleaned.items() if not short.startswith(prefix)]
    return _Names(stored, prefix, wrappers, others)


def is_sailvl(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether there are names of a language model, and of a connector unless config.json has the model type."""
    components = {name.split(".")[0] for name in _match_names(names).stored}
    return "language_model" in components and (
        "mlp1" in components or config.get("model_type") in ("sailvl", "internvl_chat")
    )


def is_component(names: Collection[str], config: Mapping[str, Any], part: str) -> bool:
    """
    Return whether there is a SAIL-VL, or the component alone: a connector by its names, others by config.json. A vision
    encoder that is an AIMv2 is none, neither alone nor in a SAIL-VL.
    """
    is_whole = is_sailvl(names, config)
    if part == "connector":
        return is_whole or (bool(names) and all(strip_wrapper_prefixes(name).startswith(CONNECTOR) for name in names))
    if part == "language":
        classes = config.get("architectures")
        return is_whole or (isinstance(classes, list) and f"{classes}".endswith("ForCausalLM']"))
    fields = vision_fields(config) if is_whole else config
    is_aimv2 = str(fields.get("model_type", "sailvit")).startswith(("sailvit", "aimv2"))
    return not is_aimv2 and (is_whole or fields.keys() >= VISION_FIELDS)


def vision_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of the vision encoder in the config.json of a SAIL-VL."""
    fields = config.get("vision_config")
    return fields if isinstance(fields, Mapping) else {}


@dataclass(frozen=True)
class Component:
    """A component of a SAIL-VL, in it or in a folder of its own, or all of them."""

    checkpoint: Checkpoint
    part: str  # one of PARTS
    # Its section of config.json; all of it for a connector, all components, or in a folder of its own.
    config: Mapping[str, Any] = field(repr=False)
    names: dict[str, str]  # name without the prefix -> name in the checkpoint
    prefix: str  # in the checkpoint
    wrappers: list[str]  # name segments that wrappers such as torch.compile added
    others: list[str]  # names that are not of a SAIL-VL

    @property
    def matrix_shape(self) -> tuple[int | None, int | None]:
        """Output and input width of the first matrix of a connector, None where it is missing."""
        name = self.names.get("1.weight")
        return (*(self.checkpoint[name].shape if name else ()), None, None)[:2]


def find_component(checkpoint: Checkpoint, part: str) -> Component:
    """Return one component, or all of them; raises CheckpointError if two names are the same without wrappers."""
    config, found = checkpoint.document("config.json"), _match_names(checkpoint.weight_map)
    is_alone = part != "connector" and not is_sailvl(checkpoint.weight_map, config)
    inner = "" if is_alone else PREFIXES[part]
    if inner in (VISION, LANGUAGE):
        config = vision_fields(config) if inner == VISION else text_fields(config)
    names = {name.removeprefix(inner): stored for name, stored in found.stored.items() if name.startswith(inner)}
    return Component(checkpoint, part, config, names, found.prefix + inner, found.wrappers, found.others)


def quantized_by(checkpoint: Checkpoint, part: str | None) -> str | None:
    """Return the method of the quantization that config.json names if weights of the part are stored as no floats."""
    quantization = checkpoint.document("config.json").get("quantization_config")
    if part is None or not isinstance(quantization, Mapping):
        return None
    dtypes = {checkpoint[name].dtype for name in find_component(checkpoint, part).names.values()}
    return None if dtypes <= FLOAT_BITS.keys() else f"{quantization.get('quant_method')}"


def read_config(checkpoint: Checkpoint, **changes: Any) -> "SAILVLConfig":
    """Raises CheckpointError if config.json is missing, describes no language model, or is invalid."""
    from ...configuration_sailvl import SAILVLConfig

    fields, where = checkpoint.document("config.json"), f"{checkpoint.source.name}: config.json"
    if not text_fields(fields):
        what = "has no section of a language model" if fields else "is missing"
        fix = "put the model's config.json next to the weights, or convert with --base"
        raise CheckpointError(f"{where} {what}: {fix}")
    with transformers_errors(where, fix=" (--part vision, connector or language converts one component)"):
        return SAILVLConfig.from_dict({**fields, **changes, "model_type": SAILVLConfig.model_type})


def build_meta_model(config: "PretrainedConfig", source: str, auto_class: Any = None) -> "nn.Module":
    """Return a SAIL-VL, or a model by its Auto class, on the meta device; raises CheckpointError if that fails."""
    import torch

    from ...modeling_sailvl import SAILVLForConditionalGeneration

    with transformers_errors(f"{source}: config.json"), torch.device("meta"):
        model = auto_class.from_config(config) if auto_class else SAILVLForConditionalGeneration(config)
    model.tie_weights()
    return model


def build_meta_component(source: str, part: str, fields: Mapping[str, Any]) -> "nn.Module":
    """Return a vision encoder or language model on the meta device; raises CheckpointError if transformers lacks it."""
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    kept, auto_class = portable(fields), AutoModel if part == "vision" else AutoModelForCausalLM
    if not fields:
        fix = "put the model's config.json there, or convert with --base"
        raise CheckpointError(f"{source}: config.json has no section of the {part} model: {fix}")
    if (model_type := kept.pop("model_type", None)) not in CONFIG_MAPPING:
        what = f"expected a {part} model type that the installed transformers has, got {model_type!r}"
        raise CheckpointError(f"{source}: config.json: {what}: install a newer transformers, or correct model_type")
    with transformers_errors(f"{source}: config.json"):
        config = CONFIG_MAPPING[model_type](**kept)
    return build_meta_model(config, source, auto_class)


def component_problems(checkpoint: Checkpoint, part: str) -> list[Problem]:
    """
    Compare a component with the model that config.json describes; a connector with the widths of config.json, or of its
    own first matrix. With "all", return the problems of the files, and only if there are none those of the tensors.

    Raises:
        CheckpointError: config.json is missing or invalid, or transformers does not have the model.
    """
    if part == "all" and (problems := checkpoint.shard_problems()):
        return problems
    found, source = find_component(checkpoint, part), checkpoint.source.name
    if part == "connector":
        problems = _shape_problems(found, _connector_shapes(found))
    elif part == "all":
        problems = _model_problems(found, build_meta_model(read_config(checkpoint), source))
    else:
        problems = _model_problems(found, build_meta_component(source, part, found.config))
    return sorted(problems, key=lambda problem: problem.location)


def _model_problems(found: Component, model: "nn.Module") -> list[Problem]:
    """Compare names and shapes with a model's, and the values of tensors that it ties."""
    checkpoint, names, first = found.checkpoint, found.names, {}  # id of a parameter -> its first name
    parameters = model.named_parameters(remove_duplicate=False)
    tied = {name: other for name, each in parameters if (other := first.setdefault(id(each), name)) != name}
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)]
    problems += _shape_problems(found, {name: state[name] for name in state if name in names or name not in tied})
    config, language = (model.config.text_config, LANGUAGE) if found.part == "all" else (model.config, "")
    if _converts_on_load(config):
        problems = [problem for problem in problems if language not in problem.location]
    for name, other in () if checkpoint.source.headers_only else tied.items():
        if name in names and other in names and not is_same(checkpoint[names[name]], checkpoint[names[other]]):
            what = f"differs from {other}, to which config.json ties it: correct tie_word_embeddings"
            problems.append(Problem("values", names[name], what))
    return problems


def _converts_on_load(config: "PretrainedConfig") -> bool:
    """Whether transformers (>= 5) fuses or splits a model's tensors on load, so that names and shapes may differ."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers < 5
        return False
    return bool(get_checkpoint_conversion_mapping(config.model_type))


def _connector_shapes(connector: Component) -> dict[str, tuple[int, ...]]:
    config, (out, width) = connector.config, connector.matrix_shape
    vision, text = (fields.get("hidden_size") for fields in (vision_fields(config), text_fields(config)))
    if type(vision) is int and type(factor := shuffle_factor(config)) is int:
        width = factor**2 * vision or width
    if type(text) is int:
        out = text or out
    out, width = out or 0, width or 0
    return {"0.weight": (width,), "0.bias": (width,), "1.weight": (out, width), "1.bias": (out,),
            "3.weight": (out, out), "3.bias": (out,)}  # fmt: skip


def _shape_problems(found: Component, expected: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    tensors = {name: found.checkpoint[stored_name] for name, stored_name in found.names.items()}
    foreign = "what config.json describes has no such tensor"
    return tensor_problems(tensors, found.names, expected, found.prefix, foreign, " by config.json")


def component_facts(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return what a report says about a component."""
    found = find_component(checkpoint, part)
    tensors, config = [checkpoint[stored_name] for stored_name in found.names.values()], found.config
    if part == "connector":
        out, width = found.matrix_shape
        facts: dict[str, Any] = {"in": width, "out": out}
    else:
        architectures = config.get("architectures") or [config.get("model_type")]
        keys = ("hidden_size", "num_hidden_layers", "image_size" if part == "vision" else "vocab_size")
        facts = {"architecture": architectures[0], **{key: config.get(key) for key in keys}}
    if part == "language":
        facts["tied"] = bool(config.get("tie_word_embeddings", False))
    facts |= {"quantized by": method} if (method := quantized_by(checkpoint, part)) else {}
    facts["parameters"] = sum(prod(tensor.shape) for tensor in tensors)
    return {**facts, "dtypes": dict(Counter(torch_name(tensor.dtype) for tensor in tensors))}
