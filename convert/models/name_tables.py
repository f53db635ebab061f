"""
Tables of parameter names: which tensors a model has under each naming scheme, and which scheme a checkpoint uses.

A naming scheme's table maps each canonical module ("{}" is the block index) to its name, or to the names that share its
rows: query, key and value. So each tensor is a few intervals of elements of one canonical tensor, and a conversion
between two schemes copies intervals.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import prod
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.names import strip_wrapper_prefixes, without_wrapper_prefixes
from ..storage.tensors import FLOAT_BITS
from .checks import is_lora, tensor_problems, unexpected_tensor


MAX_BLOCKS = 1000
MIN_RIVAL_NAMES = 8  # other models share a name or two with a table


class Dimensions(ABC):
    """The dimensions of a model, which determine the shape of each of its tensors."""

    hidden_size: int
    num_hidden_layers: int

    @property
    def qkv_groups(self) -> tuple[int, tuple[int, ...]]:
        """Number of groups in a fused qkv, one after the other; rows of query, key and value in each."""
        return 1, (self.hidden_size,) * 3

    @abstractmethod
    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Return (canonical module, suffix of the parameter) -> shape of the tensor."""


@dataclass(frozen=True)
class NamingScheme:
    """The names under which a model is stored."""

    name: str  # a key, as on the command line
    title: str  # for messages
    # Canonical module -> its name in the scheme, or the names that share its rows.
    modules: Mapping[str, str | tuple[str, ...]] = field(repr=False)
    prefix: str = ""  # of the names that are written; any prefix is read
    ignored: str = r"(?!)"  # regular expression of names that belong to the scheme and are dropped: heads, buffers
    squeezed: tuple[str, ...] = ()  # canonical modules whose tensors are stored without their first dimension, 1
    has_sincos: bool = True  # whether position embeddings may be absent, to be computed

    def names_of(self, module: str) -> tuple[str, ...]:
        names = self.modules[module]
        return (names,) if isinstance(names, str) else names


@dataclass(frozen=True)
class ModelFamily:
    """Models whose tensors follow from the same Dimensions."""

    title: str
    component: str  # the part of a multimodal model that it can be, one of plan.PARTS
    schemes: Mapping[str, NamingScheme] = field(repr=False)  # in which it is recognised, by name
    anchors: tuple[str, ...] = field(repr=False)  # canonical modules whose names no other family has
    largest: Dimensions = field(repr=False)  # with every optional parameter

    def scheme(self, name: str) -> NamingScheme:
        """Raises CheckpointError if no scheme has this name."""
        if name not in self.schemes:
            raise CheckpointError(f"layout: expected one of {', '.join(self.schemes)}, got {name!r}")
        return self.schemes[name]

    def pattern(self, scheme: NamingScheme) -> re.Pattern[str]:
        """Match any name of a scheme behind any prefix; groups "prefix" and, for an anchor, "anchor"."""
        templates: dict[bool, set[str]] = {True: set(), False: set()}
        for module, suffix in self.largest.parameters():
            for name in scheme.names_of(module):
                template = re.escape(name).replace(r"\{\}", r"\d+") + re.escape(suffix)
                templates[module in self.anchors].add(template)
        anchors, others = ("|".join(sorted(templates[key])) for key in (True, False))
        return re.compile(rf"(?P<prefix>(?:.*?\.)??)(?:(?P<anchor>{anchors})|{others})")

    def is_in(self, names: Iterable[str]) -> bool:
        """Return whether one of the family's anchors is among the names, under any prefix."""
        patterns, cleaned = [*map(self.pattern, self.schemes.values())], map(strip_wrapper_prefixes, names)
        return any((match := pattern.fullmatch(name)) and match["anchor"] for name in cleaned for pattern in patterns)

    def fits(self, names: Iterable[str]) -> bool:
        """Return whether match_names finds a model of this family, perhaps without its anchors, or several."""
        try:
            match_names(names, self)
        except CheckpointError as error:
            return isinstance(error, AmbiguousMatchError)
        return True


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a naming scheme; its elements are intervals (first, last + 1) of the canonical tensor, in order."""

    name: str
    shape: tuple[int, ...]
    canonical: str
    intervals: tuple[tuple[int, int], ...]


def tensor_specs(scheme: NamingScheme, dimensions: Dimensions) -> list[TensorSpec]:
    """Return every tensor of a model, without the scheme's prefix: modules outside the blocks first, then by block."""
    blocks, parameters, specs = (None, *range(dimensions.num_hidden_layers)), dimensions.parameters().items(), []
    for block, ((module, suffix), shape) in product(blocks, parameters):
        if ("{}" in module) == (block is not None):
            names, row = scheme.names_of(module), prod(shape[1:])
            groups, rows = dimensions.qkv_groups if len(names) > 1 else (1, shape[:1])
            slices = qkv_group_slices(groups, [count * row for count in rows])
            for name, count, intervals in zip(names, rows, slices, strict=True):
                own = shape[1:] if module in scheme.squeezed else (groups * count, *shape[1:])
                full, canonical = name.format(block) + suffix, module.format(block) + suffix
                specs.append(TensorSpec(full, own, canonical, tuple(intervals)))
    return specs


def qkv_group_slices(groups: int, sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """
    Return the intervals (first element, last + 1) of query, key and value in a fused tensor, one per group.

    Args:
        groups: Number of groups, one after the other.
        sizes: Elements of query, key and value in one group, in their order.
    """
    ends = list(accumulate(sizes))
    return [
        [(group * ends[-1] + end - size, group * ends[-1] + end) for group in range(groups)]
        for end, size in zip(ends, sizes, strict=True)
    ]


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write, and its elements in the source: (name, first element, last + 1), in order."""

    target: TensorSpec
    sources: tuple[tuple[str, int, int], ...]


def plan_tensors(source: Iterable[TensorSpec], target: Iterable[TensorSpec]) -> list[TensorSource]:
    """Return where the elements of every target tensor come from; nowhere, if the source lacks its canonical tensor."""
    stored: dict[str, list[tuple[int, int, str, int]]] = {}  # canonical -> first, last + 1, name, first in that tensor
    for spec in source:
        offset = 0
        for start, stop in spec.intervals:
            stored.setdefault(spec.canonical, []).append((start, stop, spec.name, offset))
            offset += stop - start
    return [TensorSource(spec, _overlaps(spec, sorted(stored.get(spec.canonical, [])))) for spec in target]


def _overlaps(target: TensorSpec, stored: list[tuple[int, int, str, int]]) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (name, offset + max(first, start) - start, offset + min(last, stop) - start)
        for first, last in target.intervals
        for start, stop, name, offset in stored
        if start < last and first < stop
    )


class AmbiguousMatchError(CheckpointError):
    """More than one model of a family among the names of a checkpoint."""


@dataclass(frozen=True)
class Match:
    """A model among the names of a checkpoint, and its tensors."""

    family: ModelFamily
    scheme: NamingScheme
    prefix: str  # of the names in the checkpoint
    wrappers: list[str]  # segments that were removed from the names
    names: dict[str, str] = field(default_factory=dict)  # name in the scheme, without prefix -> in the checkpoint
    dropped: list[str] = field(default_factory=list)  # names that the scheme drops
    unmapped: list[str] = field(default_factory=list)  # names under the prefix that the scheme does not have
    others: Counter[str] = field(default_factory=Counter)  # first segments of the names outside the prefix
    tensors: dict[str, Any] = field(default_factory=dict, repr=False)  # name in the scheme -> stored, or of torch

    @property
    def reason(self) -> str:
        """The evidence for the scheme and the prefix."""
        total = len(self.names) + len(self.dropped) + len(self.unmapped) + sum(self.others.values())
        where = f"under the prefix {self.prefix!r}" if self.prefix else "without a prefix"
        return f"{len(self.names)} of {total} names, {where}, match {self.scheme.title}"

    def read(self, stored: Mapping[str, Any] | Checkpoint) -> "Match":
        """Return this match with its tensors; stored: name in the checkpoint -> tensor."""
        return replace(self, tensors={name: stored[stored_name] for name, stored_name in self.names.items()})

    @property
    def stored(self) -> dict[str, Any]:
        """Name in the checkpoint -> tensor."""
        return {self.names[name]: tensor for name, tensor in self.tensors.items()}

    def problems(self, dimensions: Dimensions | None = None) -> list[Problem]:
        """Return names without a mapping and empty tensors; with dimensions, missing, unexpected, misshapen ones."""
        unmapped = [unexpected_tensor(name, f"has no mapping in {self.scheme.title}") for name in self.unmapped]
        expected = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if dimensions:
            expected = {spec.name: spec.shape for spec in tensor_specs(self.scheme, dimensions)}
        foreign = f"not part of an {self.family.title} of these dimensions"
        return unmapped + tensor_problems(self.tensors, self.names, expected, self.prefix, foreign)

    def dtype_problems(self) -> list[Problem]:
        """Return tensors that are not floating point ("dtype") or not of the most frequent dtype ("mixed")."""
        dtypes = {name: tensor.dtype for name, tensor in self.stored.items()}
        common = Counter(dtypes.values()).most_common(1)[0][0]
        what = f"expected {common} as in most of the {self.family.title}, got"
        return [
            Problem("mixed", name, f"{what} {dtype}: choose with --dtype")
            if dtype in FLOAT_BITS
            else Problem("dtype", name, f"expected a floating point dtype, got {dtype}")
            for name, dtype in dtypes.items()
            if dtype != common or dtype not in FLOAT_BITS
        ]

    def required_shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of a tensor, or raise CheckpointError if it is missing or has not `ndim` dimensions."""
        where, title = self.prefix + name, self.family.title
        if name not in self.tensors:
            raise CheckpointError(f"{where}: missing; without it the dimensions of the {title} are unknown")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != ndim:
            raise CheckpointError(f"{where}: expected {ndim} dimensions, got shape {list(shape)}")
        return shape

    def patch_shape(self, name: str) -> tuple[int, int, int]:
        """Return width, channels and side of the weight of a patch convolution; raise CheckpointError for others."""
        shape = width, channels, patch, other = self.required_shape(name, 4)
        if patch != other or not prod(shape):
            raise CheckpointError(f"{self.prefix}{name}: expected square patches, got shape {list(shape)}")
        return width, channels, patch

    def count_blocks(self, module: str) -> int:
        """Return the number of blocks, or raise CheckpointError for MAX_BLOCKS and more."""
        start = self.scheme.names_of(module)[0].split("{}")[0]
        pattern = re.compile(re.escape(start) + r"(\d+)\.")
        last = max((int(block[1]) for block in map(pattern.match, self.tensors) if block), default=-1)
        if last >= MAX_BLOCKS:
            raise CheckpointError(f"{self.prefix}{start}{last}: expected a block index below {MAX_BLOCKS}")
        return last + 1

    def common_rows(self, module: str) -> int | None:
        """Return the most frequent first dimension of a module's weights, so that a block that differs is reported."""
        shapes = [tensor.shape for tensor in self._tensors_of(module, ".weight")]
        rows = Counter(shape[0] for shape in shapes if shape and prod(shape))
        return rows.most_common(1)[0][0] if rows else None

    def has(self, suffix: str, *modules: str) -> bool:
        """Return whether any block has this parameter in one of these modules."""
        return any(self._tensors_of(module, suffix) for module in modules)

    def _tensors_of(self, module: str, suffix: str) -> list[Any]:
        ends = tuple(name.split("{}")[-1] + suffix for name in self.scheme.names_of(module))
        return [tensor for name, tensor in self.tensors.items() if name.endswith(ends)]


def match_names(
    names: Iterable[str], family: ModelFamily, scheme: str | None = None, prefix: str | None = None
) -> Match:
    """
    Find the model of a family among the names of a checkpoint, under a scheme and a prefix if they are given.

    Raises:
        CheckpointError: There is none, or more than one (AmbiguousMatchError), two names are equal without wrappers, or
            the family has no such scheme.
    """
    if prefix and not prefix.endswith("."):
        prefix += "."
    cleaned, wrappers = without_wrapper_prefixes(names)
    schemes = [family.scheme(scheme)] if scheme is not None else [*family.schemes.values()]
    candidates = _candidates(cleaned, family, schemes, prefix)
    if not candidates:
        where = f" under the prefix {prefix!r}" if prefix is not None else ""
        known = schemes[0].title if len(schemes) == 1 else "a known layout"
        found = f"none of the {len(cleaned)} names ({', '.join(sorted(cleaned)[:3]) or 'none'}, ...) is one of {known}"
        raise CheckpointError(f"no {family.title}{where}: {found}")
    rivals = [one for one in candidates if one[0] and one[1] >= MIN_RIVAL_NAMES]
    if len(rivals) > 1:
        listed = ", ".join(f"{own.name} under {where!r}" for _, _, own, where in rivals)
        option = " or --from-layout" if len(schemes) > 1 else ""
        raise AmbiguousMatchError(f"more than one {family.title}: {listed}; choose with --prefix{option}")
    match = Match(family, *candidates[0][2:], wrappers)
    _sort_names(cleaned, match)
    foreign = [name for name in match.unmapped if not is_lora(name)]
    if len(foreign) > len(match.names):
        raise CheckpointError(f"no {family.title}: only {match.reason}; {', '.join(foreign[:3])}, ... do not")
    return match


def _candidates(
    names: Iterable[str], family: ModelFamily, schemes: Iterable[NamingScheme], prefix: str | None
) -> list[tuple[bool, int, NamingScheme, str]]:
    """Return (has an anchor, number of names, scheme, prefix), the best first. Of schemes with equal names, the one
    that is written with this prefix."""
    found: dict[tuple[int, str], tuple[bool, int, NamingScheme, str]] = {}
    for scheme in schemes:
        matches = [match for match in map(family.pattern(scheme).fullmatch, names) if match]
        anchored = {match["prefix"] for match in matches if match["anchor"]}
        for own, count in Counter(match["prefix"] for match in matches).items():
            key = id(scheme.modules), own
            if prefix in (None, own) and (key not in found or scheme.prefix == own):
                found[key] = own in anchored, count, scheme, own
    return sorted(found.values(), key=lambda one: one[:2], reverse=True)


def _sort_names(cleaned: Mapping[str, str], match: Match) -> None:
    """Add each name of a checkpoint, by its name without wrappers, to the list of the match that it belongs to."""
    pattern, ignored = match.family.pattern(match.scheme), re.compile(match.scheme.ignored)
    for short, name in cleaned.items():
        inside = short.removeprefix(match.prefix)
        if not short.startswith(match.prefix):
            match.others[short.split(".")[0]] += 1
        elif (own := pattern.fullmatch(inside)) and not own["prefix"]:
            match.names[inside] = name
        elif ignored.fullmatch(inside):
            match.dropped.append(name)
        else:
            match.unmapped.append(name)
