"""
The names under which AIMv2 towers are stored: one table a layout, read in both directions.

The released names, SAILViT's and Apple's AIMv2's, are the middle. A table says what a layout calls each released module
("{}" stands for the block); where it has several names for one, they hold its rows, one after the other. Every tensor
of a layout is therefore a run of elements of a released one, and moving between two layouts is a matter of intervals.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from ..storage.errors import CheckpointError
from ..storage.names import without_wrapper_prefixes


TRANSFORMERS = {
    "preprocessor.patchifier.proj": "embeddings.patch_embed",
    "preprocessor.patchifier.norm": "embeddings.rms_norm",
    "preprocessor.pos_embed": "embeddings.position_embedding.weight",
    "trunk.blocks.{}.norm_1": "encoder.layers.{}.rms_norm1",
    "trunk.blocks.{}.attn.qkv": (
        "encoder.layers.{}.attention.q_proj",
        "encoder.layers.{}.attention.k_proj",
        "encoder.layers.{}.attention.v_proj",
    ),
    "trunk.blocks.{}.attn.proj": "encoder.layers.{}.attention.out_proj",
    "trunk.blocks.{}.norm_2": "encoder.layers.{}.rms_norm2",
    "trunk.blocks.{}.mlp.fc1": "encoder.layers.{}.ffn.gate_proj",
    "trunk.blocks.{}.mlp.fc2": "encoder.layers.{}.ffn.down_proj",
    "trunk.blocks.{}.mlp.fc3": "encoder.layers.{}.ffn.up_proj",
    "trunk.post_trunk_norm": "rms_norm",
}

RELEASED = {name: name for name in TRANSFORMERS}

OVIS2_TRANSFORMERS = {**TRANSFORMERS, "preprocessor.patchifier.proj": "embeddings.patch_embedding"}

TIMM = {
    "preprocessor.patchifier.proj": "patch_embed.proj",
    "preprocessor.patchifier.norm": "patch_embed.norm",
    "preprocessor.pos_embed": "pos_embed",
    "trunk.blocks.{}.norm_1": "blocks.{}.norm1",
    "trunk.blocks.{}.attn.qkv": "blocks.{}.attn.qkv",
    "trunk.blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "trunk.blocks.{}.norm_2": "blocks.{}.norm2",
    "trunk.blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1_g",
    "trunk.blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "trunk.blocks.{}.mlp.fc3": "blocks.{}.mlp.fc1_x",
    "trunk.post_trunk_norm": "norm",
}


@dataclass(frozen=True)
class NamingScheme:
    """
    One way to store a tower.

    Attributes:
        name: What the command line calls it.
        title: What people call it.
        modules: Released module -> the layout's name for it, or names of its parts.
        prefix: What stands before the names where the layout is written. Any prefix is taken where it is read.
        heads: Starts of names that belong to the layout but not to a tower: dropped on purpose.
        flat_positions: Whether positions are stored as (N, D), not as (1, N, D).
        has_sincos: Whether it can leave the positions to be computed; else they are written out for the grid.
    """

    name: str
    title: str
    modules: Mapping[str, str | tuple[str, ...]] = field(repr=False)
    prefix: str = ""
    heads: tuple[str, ...] = ("head.",)
    flat_positions: bool = False
    has_sincos: bool = True

    def names_of(self, module: str) -> tuple[str, ...]:
        names = self.modules[module]
        return (names,) if isinstance(names, str) else names


LAYOUTS = {
    layout.name: layout
    for layout in (
        NamingScheme("sailvit", "released SAILViT, Apple's AIMv2", RELEASED),
        NamingScheme("lit", "image tower of Apple's AIMv2 lit", RELEASED, prefix="image_encoder."),
        NamingScheme("ovis2", "Ovis2, original", RELEASED, prefix="visual_tokenizer.backbone."),
        NamingScheme("transformers", "transformers' aimv2_vision_model", TRANSFORMERS, flat_positions=True),
        NamingScheme(
            "ovis2-transformers",
            "Ovis2 in transformers",
            OVIS2_TRANSFORMERS,
            prefix="model.vision_tower.transformer.",
            flat_positions=True,
            has_sincos=False,
        ),
        NamingScheme("timm", "timm's aimv2", TIMM, heads=("head.", "fc_norm."), has_sincos=False),
    )
}


def get_layout(name: str | None) -> NamingScheme:
    """
    Raises:
        CheckpointError: There is no such layout.
    """
    if name not in LAYOUTS:
        raise CheckpointError(f"layout {name!r}: there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


@dataclass(frozen=True)
class TowerShape:
    """The dimensions of a tower that its tensors show, under the names of SAILViTConfig; grid_size is the side of the
    square of learned positions, None where there are none (sine-cosine)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_channels: int
    patch_size: int
    grid_size: int | None
    qkv_bias: bool = False
    use_bias: bool = False

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(released module, "{}" for the block; parameter of it) -> shape of the tensor."""
        width, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        shapes: dict[tuple[str, str], tuple[int, ...]] = {
            ("preprocessor.patchifier.proj", ".weight"): (width, self.num_channels, patch, patch),
            ("preprocessor.patchifier.proj", ".bias"): (width,),
            ("preprocessor.patchifier.norm", ".weight"): (width,),
        }
        if self.grid_size is not None:
            shapes["preprocessor.pos_embed", ""] = (1, self.grid_size**2, width)
        for part in ("norm_1", "norm_2"):
            shapes[f"trunk.blocks.{{}}.{part}", ".weight"] = (width,)
        for part, rows, columns, bias in (
            ("attn.qkv", 3 * width, width, self.qkv_bias),
            ("attn.proj", width, width, self.use_bias),
            ("mlp.fc1", mlp, width, self.use_bias),
            ("mlp.fc2", width, mlp, self.use_bias),
            ("mlp.fc3", mlp, width, self.use_bias),
        ):
            shapes[f"trunk.blocks.{{}}.{part}", ".weight"] = (rows, columns)
            if bias:
                shapes[f"trunk.blocks.{{}}.{part}", ".bias"] = (rows,)
        shapes["trunk.post_trunk_norm", ".weight"] = (width,)
        return shapes


# Every parameter a tower can have, biases included.
PARAMETERS = TowerShape(1, 1, 1, 1, 1, 1, qkv_bias=True, use_bias=True).parameters().keys()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a layout: elements `start` to `stop` of a released tensor, in the shape the layout gives them."""

    name: str
    shape: tuple[int, ...]
    released: str
    start: int
    stop: int


def tensor_specs(layout: NamingScheme, shape: TowerShape) -> list[TensorSpec]:
    """Every tensor of a tower of this shape, without the layout's prefix; whole modules first, then block by block."""
    found = []
    for block in (None, *range(shape.num_hidden_layers)):
        for (module, parameter), dimensions in shape.parameters().items():
            if ("{}" in module) == (block is not None):
                found += _module_specs(layout, module, parameter, dimensions, block)
    return found


def _module_specs(
    layout: NamingScheme, module: str, parameter: str, dimensions: tuple[int, ...], block: int | None
) -> list[TensorSpec]:
    names = layout.names_of(module)
    if layout.flat_positions and module == "preprocessor.pos_embed":
        dimensions = dimensions[1:]
    part = (dimensions[0] // len(names), *dimensions[1:])
    released = module.format(block) + parameter
    return [
        TensorSpec(name.format(block) + parameter, part, released, index * prod(part), (index + 1) * prod(part))
        for index, name in enumerate(names)
    ]


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write, and where its elements come from: (name, first element, last + 1) of tensors, in order."""

    target: TensorSpec
    sources: tuple[tuple[str, int, int], ...]


def plan_tensors(
    source: NamingScheme, target: NamingScheme, shape: TowerShape, grid_size: int | None
) -> list[TensorSource]:
    """
    How every tensor of the target layout is made of those of the source layout, names without prefixes.

    Args:
        shape: Of the source.
        grid_size: Of the target. Where it is another, the positions have no sources: they are to be computed.
    """
    stored: dict[str, list[TensorSpec]] = {}
    for piece in tensor_specs(source, shape):
        stored.setdefault(piece.released, []).append(piece)
    if grid_size != shape.grid_size:
        stored["preprocessor.pos_embed"] = []
    return [
        TensorSource(
            wanted,
            tuple(
                (piece.name, max(wanted.start, piece.start) - piece.start, min(wanted.stop, piece.stop) - piece.start)
                for piece in stored[wanted.released]
                if piece.start < wanted.stop and wanted.start < piece.stop
            ),
        )
        for wanted in tensor_specs(target, replace(shape, grid_size=grid_size))
    ]


@dataclass(frozen=True)
class AIMv2Match:
    """
    A tower found among the names of a checkpoint.

    Attributes:
        layout: Whose names it has.
        prefix: What stands before them.
        reason: Why this layout and prefix.
        names: Name in the layout, without prefix and wrappers -> name in the checkpoint.
        heads: Names that the layout drops on purpose.
        unmapped: Names in the tower's place that the layout does not know.
        others: First segments of the names outside the prefix -> how many there are.
        wrappers: Segments that were left out.
    """

    layout: NamingScheme
    prefix: str
    reason: str
    names: dict[str, str]
    heads: list[str]
    unmapped: list[str]
    others: dict[str, int]
    wrappers: list[str]


class SeveralTowersError(CheckpointError):
    """More than one AIMv2 among the names of a checkpoint."""


def is_aimv2(names: Iterable[str]) -> bool:
    """Whether there is an AIMv2 among the names of a checkpoint, or several, in any layout and behind any prefix."""
    try:
        match_aimv2(names)
    except SeveralTowersError:
        return True
    except CheckpointError:
        return False
    return True


def match_aimv2(names: Iterable[str], layout: str | None = None, prefix: str | None = None) -> AIMv2Match:
    """
    Finds the tower among the names of a checkpoint.

    Args:
        names: Every name in it.
        layout: The layout it has, if that is known.
        prefix: The prefix the tower has, if that is known.

    Raises:
        CheckpointError: There is no tower, or more than one, or two names are one when wrappers are left out.
    """
    if prefix and not prefix.endswith("."):
        prefix += "."
    if layout is not None:
        get_layout(layout)
    cleaned, wrappers = without_wrapper_prefixes(names)
    ranked = _candidates(cleaned, layout, prefix)
    if not ranked:
        shown = ", ".join(sorted(cleaned)[:3]) or "none"
        where = f" under the prefix {prefix!r}" if prefix is not None else ""
        raise CheckpointError(
            f"no AIMv2 tower{where}: none of the {len(cleaned)} names ({shown}, ...) is one of "
            f"{LAYOUTS[layout].title if layout else 'a known layout'}"
        )
    chosen, place = ranked[0][0]
    # A tower of another kind shares a name or two, a rival more.
    rivals = [entry for entry in ranked[1:] if entry[1] > 7 and _has_patches(cleaned, *entry[0])]
    if rivals and _has_patches(cleaned, chosen, place):
        found = ", ".join(f"{names.name} under {where!r}" for (names, where), _ in (ranked[0], *rivals))
        raise SeveralTowersError(f"more than one tower: {found}; choose with --prefix or --from-layout")
    return _sort_names(cleaned, wrappers, chosen, place)


def _candidates(
    names: Mapping[str, str], layout: str | None, prefix: str | None
) -> list[tuple[tuple[NamingScheme, str], int]]:
    """Layouts and prefixes with the count of names they explain: those with a patch convolution first, then by count,
    a layout that is written with this very prefix before another of the same names."""
    counts: Counter[tuple[str, str]] = Counter()
    for candidate in LAYOUTS.values() if layout is None else [LAYOUTS[layout]]:
        pattern = _pattern(candidate)
        for name in names:
            match = pattern.fullmatch(name)
            if match and prefix in (None, match["prefix"]):
                counts[candidate.name, match["prefix"]] += 1
    tables: dict[tuple[int, str], tuple[tuple[NamingScheme, str], int]] = {}
    for (name, place), count in counts.items():
        key = (id(LAYOUTS[name].modules), place)
        if key not in tables or LAYOUTS[name].prefix == place:
            tables[key] = ((LAYOUTS[name], place), count)
    return sorted(tables.values(), key=lambda entry: (_has_patches(names, *entry[0]), entry[1]), reverse=True)


def _pattern(layout: NamingScheme) -> re.Pattern[str]:
    """Any name of the layout, behind any prefix."""
    templates = {
        re.escape(name).replace(r"\{\}", r"\d+") + re.escape(parameter)
        for module, parameter in PARAMETERS
        for name in layout.names_of(module)
    }
    return re.compile(rf"(?P<prefix>(?:.*?\.)??)(?P<name>{'|'.join(sorted(templates))})")


def _has_patches(names: Mapping[str, str], layout: NamingScheme, prefix: str) -> bool:
    return prefix + layout.names_of("preprocessor.patchifier.proj")[0] + ".weight" in names


def _sort_names(cleaned: Mapping[str, str], wrappers: list[str], layout: NamingScheme, prefix: str) -> AIMv2Match:
    pattern = _pattern(layout)
    mapped: dict[str, str] = {}
    heads, unmapped, others = [], [], Counter()
    for short, name in cleaned.items():
        inside = short.removeprefix(prefix)
        if not short.startswith(prefix):
            others[short.split(".")[0]] += 1
        elif (match := pattern.fullmatch(inside)) and not match["prefix"]:
            mapped[inside] = name
        elif inside.startswith(layout.heads):
            heads.append(name)
        else:
            unmapped.append(name)
    place = f"under the prefix {prefix!r}" if prefix else "without a prefix"
    reason = f"{len(mapped)} of {len(cleaned)} names, {place}, are those of {layout.title}"
    if len(unmapped) > len(mapped):
        raise CheckpointError(f"no AIMv2 tower: only {reason}; {', '.join(unmapped[:3])}, ... are not")
    return AIMv2Match(layout, prefix, reason, mapped, heads, unmapped, dict(others), wrappers)
