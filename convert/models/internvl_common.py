"""
InternViT and InternLM2, published with code of their own, as models that transformers has: what both have in common.
No number is changed.

A table says what each module is called there. Where it has three names for one, that one holds query, key and value
rows, group by group: in InternViT one group, all queries, all keys, all values; in InternLM2 a group for each key-value
head, its query heads, its key, its value.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np

from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.hashes import check_values
from ..storage.names import strip_wrapper_prefixes, without_wrapper_prefixes
from ..storage.tensors import FLOAT_BITS, NewTensor, StoredTensor, cast_stream
from .aimv2_config import ACTIVATIONS, MOST_BLOCKS, why_empty


BUFFERS = ".rotary_emb.inv_freq"  # computed anew by every model

# Where a config.json of a multimodal model keeps those of its parts.
SECTIONS = {"vision": ("vision_config",), "language": ("llm_config", "text_config", "language_config")}


def qkv_group_slices(groups: int, sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """
    Where the parts of a grouped tensor lie in it.

    Args:
        groups: How many groups lie one after the other.
        sizes: Elements of each part in one group, in their order there.

    Returns:
        For each part, (first element, last + 1) of its piece in each group.
    """
    ends = list(accumulate(sizes))
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    return [
        [(group * sum(sizes) + start, group * sum(sizes) + end) for group in range(groups)]
        for start, end in zip(starts, ends, strict=True)
    ]


class Shape(Protocol):
    """
    The dimensions of a model.

    Attributes:
        num_hidden_layers: Its blocks.
        groups: How many groups the grouped tensor has; rows of query, key and value in each.
    """

    num_hidden_layers: int

    @property
    def groups(self) -> tuple[int, tuple[int, int, int]]: ...

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(module, "{}" for the block; parameter of it) -> shape of the tensor."""


@dataclass(frozen=True)
class Part:
    """A tensor to write, and where its elements come from: (name, first element, last + 1) of tensors, in order."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[tuple[str, int, int], ...]


def plan_parts(modules: Mapping[str, str | tuple[str, ...]], shape: Shape) -> list[Part]:
    """
    How every tensor that is written is made of those of a model of this shape; whole modules first, then block by
    block.
    """
    found = []
    for block in (None, *range(shape.num_hidden_layers)):
        for (module, parameter), dimensions in shape.parameters().items():
            if ("{}" in module) == (block is not None):
                found += _parts_of(modules[module], module, parameter, dimensions, block, shape)
    return found


def _parts_of(
    names: str | tuple[str, ...], module: str, parameter: str, dimensions: tuple[int, ...], block: int | None, of: Shape
) -> Iterator[Part]:
    source = module.format(block) + parameter
    if isinstance(names, str):
        yield Part(names.format(block) + parameter, dimensions, ((source, 0, prod(dimensions)),))
        return
    (groups, rows), columns = of.groups, prod(dimensions[1:])
    runs = qkv_group_slices(groups, [count * columns for count in rows])
    for name, count, own in zip(names, rows, runs, strict=True):
        shape = (groups * count, *dimensions[1:])
        yield Part(name.format(block) + parameter, shape, tuple((source, start, stop) for start, stop in own))


def stored_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the original model."""
    return {
        module.format(block) + parameter: dimensions
        for (module, parameter), dimensions in shape.parameters().items()
        for block in (range(shape.num_hidden_layers) if "{}" in module else (None,))
    }


@dataclass(frozen=True)
class Kind:
    """
    A model that is looked for.

    Attributes:
        title: What people call it.
        part: Of a multimodal model, one of job.PARTS.
        modules: Module -> what it is called in transformers, or the names of its parts.
        marks: A name that no other model has, behind any prefix.
    """

    title: str
    part: str
    modules: Mapping[str, str | tuple[str, ...]] = field(repr=False)
    marks: re.Pattern[str] = field(repr=False)


def finds(kind: Kind, names: Iterable[str]) -> bool:
    """Whether there is a model of a kind among the names of a checkpoint, behind whatever prefix."""
    return any(kind.marks.fullmatch(strip_wrapper_prefixes(name)) for name in names)


@dataclass(frozen=True)
class Found:
    """
    A model among the names of a checkpoint.

    Attributes:
        kind: Which.
        prefix: What stands before its names.
        names: Original name, without prefix and wrappers -> name in the checkpoint.
        dropped: Names of buffers, which are not written.
        others: First segments of the names outside the prefix -> how many there are.
        wrappers: Segments that were left out.
    """

    kind: Kind
    prefix: str
    names: dict[str, str]
    dropped: list[str]
    others: dict[str, int]
    wrappers: list[str]

    @property
    def reason(self) -> str:
        place = f"under the prefix {self.prefix!r}" if self.prefix else "without a prefix"
        count = len(self.names) + len(self.dropped) + sum(self.others.values())
        return f"{len(self.names)} of {count} names, {place}, are those of {self.kind.title}"


def match_aimv2(names: Iterable[str], kind: Kind, prefix: str | None = None) -> Found:
    """
    Finds a model among the names of a checkpoint.

    Raises:
        CheckpointError: There is none, or more than one, or two names are one when wrappers are left out.
    """
    if prefix and not prefix.endswith("."):
        prefix += "."
    cleaned, wrappers = without_wrapper_prefixes(names)
    places = {match["prefix"] for short in cleaned if (match := kind.marks.fullmatch(short))}
    chosen = sorted(places if prefix is None else places & {prefix})
    if not chosen:
        where = f" under the prefix {prefix!r}" if prefix is not None else ""
        shown = ", ".join(sorted(cleaned)[:3]) or "none"
        raise CheckpointError(f"no {kind.title}{where} among the {len(cleaned)} names ({shown}, ...)")
    if len(chosen) > 1:
        found = " and ".join(map(repr, chosen))
        raise CheckpointError(f"more than one {kind.title}, under {found}: choose with --prefix")
    inside = {short: name for short, name in cleaned.items() if short.startswith(chosen[0])}
    kept = {short.removeprefix(chosen[0]): name for short, name in inside.items() if not short.endswith(BUFFERS)}
    dropped = [name for short, name in inside.items() if short.endswith(BUFFERS)]
    others = Counter(short.split(".")[0] for short in cleaned if short not in inside)
    return Found(kind, chosen[0], kept, dropped, dict(others), wrappers)


def tensor_problems(found: Found, tensors: Mapping[str, StoredTensor], shape: Shape) -> list[Problem]:
    """What is missing, empty, of a wrong shape or type, or too much, against a model of this shape."""
    wanted, names, problems = stored_shapes(shape), found.names, []
    for name, dimensions in wanted.items():
        if name not in tensors:
            what = f"missing; {list(dimensions)} is wanted"
            problems.append(Problem("missing", found.prefix + name, what))
        elif prod(tensors[name].shape) and tensors[name].shape != dimensions:
            what = f"is {list(tensors[name].shape)}, but {list(dimensions)} in an {found.kind.title} of this shape"
            problems.append(Problem("shape", names[name], what))
    problems += [
        Problem("unexpected", names[name], _why_unexpected(name, found.kind)) for name in names.keys() - wanted
    ]
    return sorted(problems, key=lambda problem: problem.location)


def _why_unexpected(name: str, kind: Kind) -> str:
    if "lora_" in name or ".base_layer." in name:
        return "belongs to an adapter: merge it first (peft's merge_and_unload)"
    return f"not part of an {kind.title} of this shape"


def _empty_problems(found: Found, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    empty = {name: tensor.shape for name, tensor in tensors.items() if not prod(tensor.shape)}
    return [Problem("empty", found.names[name], why_empty(shape)) for name, shape in empty.items()]


def _dtype_problems(found: Found, tensors: Mapping[str, StoredTensor], asked: str | None) -> list[Problem]:
    """What is no floating point number, or, unless a dtype is asked for, of another precision than most are."""
    common, _ = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0]
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_BITS:
            what = f"is {tensor.dtype}, not a floating point number"
            problems.append(Problem("dtype", found.names[name], what))
        elif tensor.dtype != common and asked is None:
            what = f"is {tensor.dtype}, most of the {found.kind.title} {common}: mixed precision"
            problems.append(Problem("mixed", found.names[name], what))
    return problems


def read_model(
    checkpoint: Checkpoint, kind: Kind, asked: Options
) -> tuple[Found, dict[str, StoredTensor], Mapping[str, Any]]:
    """
    The names of a model, its tensors, and what config.json says of it.

    Raises:
        CheckpointError: There is none, an option means nothing for it, or a file of it is missing or broken.
    """
    source = checkpoint.source.name
    for option in ("to_layout", "from_layout", "image_size", "insert_vision"):
        if getattr(asked, option) is not None:
            what = f"--{option.replace('_', '-')} is for AIMv2 towers, this is an {kind.title}: leave it out"
            raise CheckpointError(f"{source}: {what}")
    if asked.part not in (None, kind.part):
        raise CheckpointError(f"{source}: --part {asked.part}: an {kind.title} is --part {kind.part}")
    found = match_aimv2(checkpoint.weight_map, kind, asked.prefix)
    tensors = {name: checkpoint[stored] for name, stored in found.names.items()}
    raise_if_any([problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)], source)
    raise_if_any(_empty_problems(found, tensors), source)
    return found, tensors, _section(checkpoint, kind)


def _section(checkpoint: Checkpoint, kind: Kind) -> Mapping[str, Any]:
    """What config.json says of a part: in a section of its own, or in all of it."""
    config = checkpoint.document("config.json")
    for key in SECTIONS[kind.part]:
        if key in config:
            if not isinstance(config[key], Mapping):
                raise CheckpointError(f"{checkpoint.source.name}: {key} in config.json is {config[key]!r}, not a map")
            return config[key]
    return config


def tensor_shape(tensors: Mapping[str, StoredTensor], found: Found, name: str, dimensions: int) -> tuple[int, ...]:
    """
    The shape of a tensor by which the model is measured.

    Raises:
        CheckpointError: It is missing, or has another number of dimensions.
    """
    if name not in tensors:
        raise CheckpointError(
            f"{found.prefix}{name} is missing: without it nothing can be said of the {found.kind.title}"
        )
    shape = tensors[name].shape
    if len(shape) != dimensions:
        raise CheckpointError(f"{found.names[name]} is {list(shape)}: {dimensions} dimensions are wanted")
    return shape


def count_blocks(tensors: Mapping[str, StoredTensor], found: Found, before: str) -> int:
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    blocks = max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)
    if blocks >= MOST_BLOCKS:
        raise CheckpointError(f"{found.prefix}{before}{blocks}: an {found.kind.title} has no such block")
    return blocks + 1


def common_rows(tensors: Mapping[str, StoredTensor], ending: str) -> int:
    """The first dimension that most tensors of this name have, so that the one that differs is named."""
    rows = Counter(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(ending) and tensor.shape)
    return rows.most_common(1)[0][0] if rows else 1


def has_names(tensors: Mapping[str, StoredTensor], *endings: str) -> bool:
    return any(name.endswith(endings) for name in tensors)


def contradictions(known: Mapping[str, Any], config: Mapping[str, Any]) -> list[Problem]:
    """Where config.json says something else than the tensors; a square's side may stand there twice."""
    problems = []
    for key, value in known.items():
        said = config.get(key)
        if isinstance(said, list) and len(set(map(str, said))) == 1:
            said = said[0]
        if said is not None and (said != value or isinstance(said, bool) != isinstance(value, bool)):
            what = f"config.json says {config[key]!r}, the tensors {value!r}: correct config.json"
            problems.append(Problem("config", key, what))
    return problems


def odd_numbers(config: Mapping[str, Any], below_one: Iterable[str]) -> list[Problem]:
    """Fields that are no number from 0 to 1, and an activation that nothing here knows."""
    problems = []
    for key in below_one:
        value = config.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            problems.append(Problem("config", key, f"is {value!r}, not a number from 0 to 1: correct config.json"))
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        what = f"is {config['hidden_act']!r}, not one of {', '.join(ACTIVATIONS)}: correct config.json"
        problems.append(Problem("config", "hidden_act", what))
    return problems


def is_whole(value: Any, lowest: int = 1) -> bool:
    return type(value) is int and value >= lowest


@dataclass(kw_only=True)
class InternVLPlan(ConversionPlan):
    """
    An InternViT or an InternLM2, to be written.

    Attributes:
        found: Its names.
        stored: Original name -> where it lies.
        shape: Its dimensions.
        said: Its original configuration.
        config: What is written as config.json, but for the dtype.
    """

    found: Found
    stored: dict[str, StoredTensor] = field(repr=False)
    shape: Shape
    said: Mapping[str, Any] = field(repr=False)
    config: dict[str, Any]

    def tensors(self) -> list[NewTensor]:
        return [
            NewTensor(part.name, self.dtype, part.shape, lambda own=part: self._chunks(own))
            for part in plan_parts(self.found.kind.modules, self.shape)
        ]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return self.stored.values()

    def _chunks(self, part: Part) -> Iterator[np.ndarray]:
        """The bytes of a tensor to be written."""
        for name, start, stop in part.runs:
            yield from cast_stream(self.stored[name], self.found.names[name], self.dtype, start, stop)

    def provenance(self) -> dict[str, Any]:
        return {
            "source": {
                "layout": self.found.kind.title,
                "prefix": self.found.prefix,
                "recognised": self.found.reason,
                "dropped": {"buffers": self.found.dropped, "others": self.found.others},
            },
            "part": self.found.kind.part,
            "layout": self.config["architectures"][0],
            "shape": asdict(self.shape),
        }


def check_model(
    checkpoint: Checkpoint,
    asked: Options,
    found: Found,
    tensors: Mapping[str, StoredTensor],
    shape: Shape,
    problems: list[Problem],
) -> str:
    """
    The dtype to write, once the tensors are those of the shape.

    Raises:
        CheckpointError: They are not, or there are problems already, or values that a record contradicts.
    """
    source = checkpoint.source.name
    raise_if_any(
        problems + tensor_problems(found, tensors, shape) + _dtype_problems(found, tensors, asked.dtype), source
    )
    stored = {found.names[name]: tensor for name, tensor in tensors.items()}
    check_values(checkpoint, stored)
    return output_dtype(asked.dtype, stored, source)


def describe_names(found: Found) -> list[str]:
    notes = [found.reason]
    if found.wrappers:
        notes.append(f"left out of the names: {', '.join(found.wrappers)}")
    if found.dropped:
        notes.append(f"dropped, for it is computed or tied: {len(found.dropped)} tensors ({found.dropped[0]}, ...)")
    others = [f"not of the {found.kind.title}, left: {part} ({count} tensors)" for part, count in found.others.items()]
    return notes + others
