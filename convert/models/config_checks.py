"""Checks of config.json: its values, and its agreement with the dimensions that the tensors show."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..storage.errors import Problem


ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "mish")


def contradictions(inferred: Mapping[str, Any], config: Mapping[str, Any]) -> list[Problem]:
    """Return the fields whose values differ from those of the tensors; [448, 448] equals 448."""
    problems = []
    for key, value in inferred.items():
        declared = square_side(config.get(key))
        if declared is not None and (declared != value or isinstance(declared, bool) != isinstance(value, bool)):
            what = f"expected {value!r} as in the tensors, got {config[key]!r}: fix config.json"
            problems.append(Problem("config", key, what))
    return problems


def square_side(value: Any) -> Any:
    """Return the side of a square that is given as a list, any other value as it is."""
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def invalid_values(config: Mapping[str, Any], fractions: Iterable[str]) -> list[Problem]:
    """
    Return fields with impossible values.

    Args:
        fractions: Fields of numbers from 0 to below 1.
    """
    problems = []
    for key in fractions:
        value = config.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            problems.append(config_problem(key, "a number from 0 to below 1", value))
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        problems.append(config_problem("hidden_act", f"one of {', '.join(ACTIVATIONS)}", config["hidden_act"]))
    return problems


def config_problem(key: str, expected: str, value: Any, fix: str = "fix config.json") -> Problem:
    return Problem("config", key, f"expected {expected}, got {value!r}: {fix}")


def is_integer(value: Any, lowest: int = 1) -> bool:
    return type(value) is int and value >= lowest
