"""The configuration of an AIMv2 encoder, from its tensors and config.json, and where they contradict each other."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt, prod
from typing import Any

from ..export.runtimes import ENCODER_FIELDS, SIZE_NAMES
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.sources import PROVENANCE
from ..storage.tensors import StoredTensor
from .aimv2_names import PATCHES, POSITIONS, AIMv2Dimensions, match_aimv2
from .checks import config_problem, contradictions, invalid_values, is_integer, square_side
from .name_tables import Match, MatchedTensors


MLP_WIDTHS = {768: 2048, 1024: 2816, 1536: 4096, 2048: 5632, 3072: 8192}

HEAD_WIDTH = 128  # of every published AIMv2 (arXiv 2411.14402, table 1)

TIMM_NAME = re.compile(r"aimv2_(large|huge|1b|3b)_patch(\d+)_(\d+)(\..*)?")

# Arguments of timm's model that do not change its outputs, or that follow from the tensors.
TIMM_HARMLESS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "proj_bias",
    "num_classes", "global_pool", "act_layer", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate",
}  # fmt: skip


def infer_dimensions(matched: MatchedTensors) -> tuple[AIMv2Dimensions, list[Problem]]:
    """
    Return the dimensions of an encoder, and its missing, unexpected, empty and wrongly shaped tensors.

    Raises:
        CheckpointError: The dimensions are unknown, as the patch convolution is missing, empty or no convolution.
    """
    try:
        dimensions = _infer(matched)
    except CheckpointError:
        raise_if_any(matched.problems())  # the cause, if there is one
        raise
    return dimensions, matched.problems(dimensions)


def _infer(matched: MatchedTensors) -> AIMv2Dimensions:
    scheme, prefix, block = matched.match.scheme, matched.match.prefix, "trunk.blocks.{}."
    patches = scheme.names_of(PATCHES)[0] + ".weight"
    shape = width, channels, patch, other = matched.required_shape(patches, 4)
    if patch != other or not prod(shape):
        raise CheckpointError(f"{prefix}{patches}: expected square patches, got shape {list(shape)}")
    use_bias = matched.has(".bias", block + "mlp.fc1")
    if use_bias != matched.has(".bias", block + "attn.proj"):
        where = prefix + scheme.names_of(block + "norm_1")[0].split("{}")[0]
        raise CheckpointError(f"{where}*: expected biases in attention and mlp or in neither, got them in one only")
    return AIMv2Dimensions(
        hidden_size=width,
        intermediate_size=matched.common_rows(block + "mlp.fc1") or MLP_WIDTHS.get(width, 1),
        num_hidden_layers=matched.count_blocks(block + "norm_1"),
        num_channels=channels,
        patch_size=patch,
        grid_size=_grid_size(matched, width),
        qkv_bias=matched.has(".bias", block + "attn.qkv"),
        use_bias=use_bias,
    )


def _grid_size(matched: MatchedTensors, width: int) -> int | None:
    name = matched.match.scheme.names_of(POSITIONS)[0]
    if name not in matched.tensors:
        return None
    shape = matched.tensors[name].shape
    positions = prod(shape) // width or 1
    if isqrt(positions) ** 2 != positions:
        raise CheckpointError(f"{matched.match.prefix}{name}: expected a square grid, got shape {list(shape)}")
    return isqrt(positions)


def read_aimv2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the fields of the vision encoder in a config.json, under the names of SAILViTConfig: released SAILViT's and
    SAIL-VL's, Apple's, transformers' (aimv2, ovis2), Ovis2's own, timm's. Empty if it describes no tower.

    Raises:
        CheckpointError: It is timm's, with arguments that change the encoder in ways that are not supported.
    """
    if "architecture" in config:
        return _read_timm_config(config)
    for path in (("vision_config",), ("visual_tokenizer_config", "backbone_config")):
        inner: Any = config
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return _read_fields(inner)
    is_tower = "patch_size" in config or str(config.get("model_type")).startswith(("aimv2_vision", "sailvit"))
    return _read_fields(config) if is_tower else {}


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: config[key] for key in ENCODER_FIELDS if config.get(key) is not None}
    if "mlp_bias" in config:
        fields["use_bias"] = config["mlp_bias"]
    if config.get("model_type") == "aimv2_vision_model" or "is_native" in config:
        fields["pos_embed_type"] = "sincos" if config.get("is_native") else "absolute"
    return {key: square_side(value) if key in ("image_size", "patch_size") else value for key, value in fields.items()}


def _read_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    match = TIMM_NAME.fullmatch(str(config["architecture"]))
    if not match:
        return {}
    widths = {name: width for width, name in SIZE_NAMES.items()}
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"config.json: model_args: expected a JSON object, got {arguments!r}")
    unknown = arguments.keys() - TIMM_HARMLESS
    if unknown:
        raise CheckpointError(
            f"config.json: model_args: {', '.join(sorted(unknown))} not supported in an AIMv2 encoder"
        )
    width = arguments.get("embed_dim", widths[match[1]])
    return {
        "hidden_act": arguments.get("act_layer", "silu"),
        "hidden_size": width,
        "num_hidden_layers": arguments.get("depth", 24),
        "num_attention_heads": arguments.get("num_heads", widths[match[1]] // HEAD_WIDTH),
        "patch_size": arguments.get("patch_size", int(match[2])),
        "image_size": square_side(arguments.get("img_size", int(match[3]))),
        "pos_embed_type": "absolute",
    }


def tower_fields(dimensions: AIMv2Dimensions, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """
    Return the fields of SAILViTConfig for an encoder, and where its configuration contradicts its tensors.

    Args:
        config: As read_aimv2_config returns it; it decides what the tensors do not show.
    """
    fields = {key: value for key, value in asdict(dimensions).items() if key != "grid_size"}
    if dimensions.grid_size is None:
        fields |= {"pos_embed_type": "sincos", "image_size": config.get("image_size", 448)}
    else:
        fields |= {"pos_embed_type": "absolute", "image_size": dimensions.grid_size * dimensions.patch_size}
    heads = config.get("num_attention_heads")
    if heads is None and _is_published(dimensions):
        heads = dimensions.hidden_size // HEAD_WIDTH
    problems = [
        *contradictions(fields, config),
        *_depth_problems(dimensions, config),
        *invalid_values(config, ("rms_norm_eps", "attention_dropout", "projection_dropout", "initializer_range")),
        *_head_problems(dimensions, heads),
    ]
    if not is_integer(factor := config.get("pixel_shuffle_factor", 2)):
        problems.append(config_problem("pixel_shuffle_factor", "a positive integer", factor))
    return {**config, **fields, "num_attention_heads": heads}, problems


def _depth_problems(dimensions: AIMv2Dimensions, config: Mapping[str, Any]) -> list[Problem]:
    depth = dimensions.num_hidden_layers
    if not depth:
        return [Problem("missing", "num_hidden_layers", "expected at least one block, got none")]
    if "num_hidden_layers" in config or not _is_published(dimensions) or size_name(dimensions):
        return []
    size, expected = SIZE_NAMES[dimensions.hidden_size], _published_depth(dimensions)
    what = f"expected {expected} blocks as in AIMv2 {size}, got {depth}: set it in config.json if that is right"
    return [Problem("missing", "num_hidden_layers", what)]


def _head_problems(dimensions: AIMv2Dimensions, heads: Any) -> list[Problem]:
    """Check the number of heads, which no tensor shows; the heads of published sizes are known."""
    width = dimensions.hidden_size
    if not is_integer(heads) or width % heads:
        fix = "tensors do not show it; set it in config.json, or convert with --base"
        return [config_problem("num_attention_heads", f"a divisor of the width {width}", heads, fix)]
    if _is_published(dimensions) and heads != width // HEAD_WIDTH:
        return [config_problem("num_attention_heads", f"{width // HEAD_WIDTH} as in AIMv2 {SIZE_NAMES[width]}", heads)]
    return []


def _is_published(dimensions: AIMv2Dimensions) -> bool:
    return MLP_WIDTHS.get(dimensions.hidden_size) == dimensions.intermediate_size


def _published_depth(dimensions: AIMv2Dimensions) -> int:
    return 12 if SIZE_NAMES[dimensions.hidden_size] == "base" else 24


def size_name(dimensions: AIMv2Dimensions) -> str | None:
    """Return the published size of this width and depth, if there is one."""
    if not _is_published(dimensions) or dimensions.num_hidden_layers != _published_depth(dimensions):
        return None
    return SIZE_NAMES[dimensions.hidden_size]


@dataclass(frozen=True)
class Tower:
    """
    A tower in a checkpoint.

    Attributes:
        match: Its names.
        dimensions: As its tensors show them.
        fields: Of SAILViTConfig.
        tensors: Name in the layout, without prefix -> tensor.
        problems: What is wrong with it.
    """

    match: Match
    dimensions: AIMv2Dimensions
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    problems: list[Problem]

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype -> number of tensors."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()))


def find_aimv2(checkpoint: Checkpoint, layout: str | None = None, prefix: str | None = None) -> Tower:
    """
    Return the encoder of a checkpoint; only the files that hold its tensors are opened.

    Args:
        layout: Its layout, if it is known.
        prefix: Prefix of its names, if it is known.

    Raises:
        CheckpointError: There is none, or one of its files is missing or broken.
    """
    try:
        match = match_aimv2(checkpoint.weight_map, layout, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source.name}: {error}") from error
    tensors = {name: checkpoint[stored] for name, stored in match.names.items()}
    matched = MatchedTensors(match, tensors)
    dimensions, problems = infer_dimensions(matched)
    fields, config_problems = tower_fields(dimensions, read_source_config(checkpoint))
    problems += [*config_problems, *_record_problems(checkpoint), *matched.dtype_problems()]
    problems += [problem for file in checkpoint.opened for problem in checkpoint.name_problems(file)]
    return Tower(match, dimensions, fields, tensors, problems)


def read_source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of the source's tower, from config.json or else from the provenance.json of a conversion."""
    return read_aimv2_config(checkpoint.document("config.json")) or _recorded_tower(checkpoint)


def _recorded_tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Return the fields of the encoder in the provenance.json of a conversion.

    Raises:
        CheckpointError: They are no JSON object.
    """
    recorded = checkpoint.document(PROVENANCE).get("tower", {})
    if not isinstance(recorded, dict):
        raise CheckpointError(
            f"{PROVENANCE}: tower: expected a JSON object, got {recorded!r}: remove the file if it is wrong"
        )
    return recorded


def _record_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Fields that no tensor shows, where config.json and provenance.json differ."""
    config, recorded = read_source_config(checkpoint), _recorded_tower(checkpoint)
    return [
        config_problem(key, f"{recorded[key]!r} as in {PROVENANCE}", config[key], "fix config.json, or that file")
        for key in ("num_attention_heads", "rms_norm_eps", "hidden_act")
        if key in config and key in recorded and config[key] != recorded[key]
    ]
