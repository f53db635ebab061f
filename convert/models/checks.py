"""Checks of tensors against a model's names and shapes, and of config.json against the tensors."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from ..storage.errors import Problem


ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "mish")

UNSEEN = "tensors do not show it; set it in config.json, or convert with --base"


def tensor_problems(
    tensors: Mapping[str, Any],
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    prefix: str,
    foreign: str,
    declared: str = "",
) -> list[Problem]:
    """
    Return the empty, missing, wrongly shaped and unexpected tensors of a model.

    Args:
        tensors: Name in the model -> tensor.
        names: Name in the model -> name in the checkpoint.
        expected: Name in the model -> shape.
        prefix: Prefix in the checkpoint, for the names of missing tensors.
        foreign: Message about a tensor that the model does not have.
        declared: Where the shapes are declared, such as " in config.json".
    """
    shapes, problems = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, []
    for name, shape in shapes.items():
        if name in expected and not prod(shape):
            what = f"empty, shape {list(shape)}: saved under ZeRO-3 without gathering? Save the full tensor"
            problems.append(Problem("empty", names[name], what))
    for name, shape in expected.items():
        own = shapes.get(name)
        if own is None:
            problems.append(Problem("missing", prefix + name, f"missing; expected shape {list(shape)}{declared}"))
        elif prod(own) and own != shape:
            problems.append(Problem("shape", names[name], f"expected shape {list(shape)}{declared}, got {list(own)}"))
    return problems + [unexpected_tensor(names[name], foreign) for name in shapes if name not in expected]


def is_lora(name: str) -> bool:
    return "lora_" in name or ".base_layer." in name


def unexpected_tensor(name: str, what: str) -> Problem:
    """Return the problem of a tensor that a model does not have; of a LoRA adapter, that it has to be merged."""
    lora = "part of a LoRA adapter: merge it first (peft's merge_and_unload)"
    return Problem("unexpected", name, lora if is_lora(name) else what)


def contradictions(inferred: Mapping[str, Any], config: Mapping[str, Any]) -> list[Problem]:
    """Return the fields whose values differ from those of the tensors; [448, 448] equals 448."""
    problems = []
    for key, value in inferred.items():
        declared = square_side(config.get(key))
        if declared is not None and (declared != value or isinstance(declared, bool) != isinstance(value, bool)):
            problems += config_problems(key, False, f"{value!r} as in the tensors", config[key])
    return problems


def square_side(value: Any) -> Any:
    """Return the side of a square that is given as a list, any other value as it is."""
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def invalid_values(config: Mapping[str, Any], fractions: Iterable[str]) -> list[Problem]:
    """Return an unknown hidden_act, and those `fractions` that are no number from 0 to below 1."""
    problems, activation = [], config.get("hidden_act", "silu")
    for key in fractions:
        value = config.get(key, 0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        problems += config_problems(key, is_number and 0 <= value < 1, "a number from 0 to below 1", value)
    return problems + config_problems(
        "hidden_act", activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}", activation
    )


def head_problems(heads: Any, width: int) -> list[Problem]:
    is_valid = is_integer(heads) and width % heads == 0
    return config_problems("num_attention_heads", is_valid, f"a divisor of the width {width}", heads, UNSEEN)


def config_problems(key: str, is_valid: bool, expected: str, value: Any, fix: str = "fix config.json") -> list[Problem]:
    """Return the problem of a field of config.json, if it is not valid."""
    return [] if is_valid else [Problem("config", key, f"expected {expected}, got {value!r}: {fix}")]


def is_integer(value: Any, lowest: int = 1) -> bool:
    return type(value) is int and value >= lowest
