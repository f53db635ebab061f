# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""YAML files and validated settings; an error is one line: the field, what is expected, and what was given."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Settings that cannot be changed and have no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Loader(yaml.SafeLoader):
    """
    YAML whose numbers may be written 1e-5, as in YAML 1.2; PyYAML itself reads that as a string, and keeps the last of
    two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """The inverse: a string that looks like such a number is quoted."""


for _class in (Loader, Dumper):
    _number = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """
    Return the value of a YAML text.

    Raises:
        ValueError: It is not YAML, or not one document.
    """
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-31
        raise ValueError(f"no valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    options = {"default_flow_style": True, "sort_keys": False, "width": 10**6, "allow_unicode": True}
    return yaml.dump([value], Dumper=Dumper, **options).strip()[1:-1]


def read_mapping(path: str | Path, keys: str) -> tuple[dict[str, Any], str]:
    """
    Return the mapping of a YAML file, and the text of the file.

    Args:
        keys: Some that it has, for the error message.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text("utf-8")
        value = parse_yaml(text)
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping with {keys}, got {type(value).__name__}")
    return value, text


def first_error(error: ValidationError, document: Any, fields_at: Mapping[tuple[str, ...], Iterable[str]]) -> str:
    """
    Return the first problem, an unknown field before all others: its field, what is expected, what was given.

    Args:
        error: Of pydantic.
        document: What was validated.
        fields_at: Names of parents -> the fields that are known there; the indices of lists are left out.
    """
    problems = error.errors(include_url=False, include_context=False)
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    *parents, last = _path_in(document, problem["loc"]) or [""]
    location = ".".join(map(str, [*parents, last]))
    if problem["type"] == "extra_forbidden":
        known = fields_at[tuple(part for part in parents if isinstance(part, str))]
        return f"{location}: unknown field; {suggest(str(last), known)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    got = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r:.80}"
    return f"{location}: {message}{got}".removeprefix(": ")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean X?" for the nearest known name, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def _path_in(document: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """Return a location of pydantic without the names of types and of alternatives that it has in it."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        found = part in document if isinstance(document, Mapping) else isinstance(part, int)
        if found or (index == len(location) - 1 and isinstance(document, Mapping) and part != "[key]"):
            path.append(part)
        if found:
            document = document[part]
    return path
