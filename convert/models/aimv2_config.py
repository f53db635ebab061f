"""The configuration of an AIMv2 encoder, from its tensors and config.json, and where they contradict each other."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt, prod
from typing import Any

from ..export.runtimes import ENCODER_FIELDS, SIZE_NAMES
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem, raise_if_any
from ..storage.names import shuffle_factor, text_fields
from ..storage.sources import PROVENANCE
from ..storage.tensors import StoredTensor
from .aimv2_names import AIMV2, PATCHES, POSITIONS, AIMv2Dimensions
from .checks import config_problems, contradictions, head_problems, invalid_values, is_integer, square_side
from .mapped_plan import find_model, index_problems
from .name_tables import Match


MLP_WIDTHS = {768: 2048, 1024: 2816, 1536: 4096, 2048: 5632, 3072: 8192}

HEAD_WIDTH = 128  # of every published AIMv2 (arXiv 2411.14402, table 1)

TIMM_NAME = re.compile(r"aimv2_(large|huge|1b|3b)_patch(\d+)_(\d+)(\..*)?")

# Arguments of timm's model that do not change its outputs, or that follow from the tensors.
TIMM_HARMLESS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "proj_bias",
    "num_classes", "global_pool", "act_layer", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate",
}  # fmt: skip


def infer_dimensions(match: Match) -> tuple[AIMv2Dimensions, list[Problem]]:
    """
    Return the dimensions of an encoder, and the problems of its names and shapes.

    Raises:
        CheckpointError: The dimensions are unknown, as the patch convolution is missing, empty or no convolution.
    """
    try:
        dimensions = _infer(match)
    except CheckpointError:
        raise_if_any(match.problems())  # the cause, if there is one
        raise
    return dimensions, match.problems(dimensions)


def _infer(match: Match) -> AIMv2Dimensions:
    scheme, prefix, block = match.scheme, match.prefix, "trunk.blocks.{}."
    width, channels, patch = match.patch_shape(scheme.names_of(PATCHES)[0] + ".weight")
    use_bias = match.has(".bias", block + "mlp.fc1")
    if use_bias != match.has(".bias", block + "attn.proj"):
        where = prefix + scheme.names_of(block + "norm_1")[0].split("{}")[0]
        raise CheckpointError(f"{where}*: expected biases in attention and mlp or in neither, got them in one only")
    return AIMv2Dimensions(
        hidden_size=width, num_channels=channels, patch_size=patch, grid_size=_grid_size(match, width),
        intermediate_size=match.common_rows(block + "mlp.fc1") or MLP_WIDTHS.get(width, 1),
        num_hidden_layers=match.count_blocks(block + "norm_1"),
        qkv_bias=match.has(".bias", block + "attn.qkv"), use_bias=use_bias,
    )  # fmt: skip


def _grid_size(match: Match, width: int) -> int | None:
    name = match.scheme.names_of(POSITIONS)[0]
    if name not in match.tensors:
        return None
    shape = match.tensors[name].shape
    positions = prod(shape) // width or 1
    if isqrt(positions) ** 2 != positions:
        raise CheckpointError(f"{match.prefix}{name}: expected a square grid, got shape {list(shape)}")
    return isqrt(positions)


def read_aimv2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the fields of the vision encoder in a config.json, under the names of SAILViTConfig: released SAILViT's and
    SAIL-VL's, Apple's, transformers' (aimv2, ovis2), Ovis2's own, timm's. Empty if it describes no tower. Raises
    CheckpointError if timm's arguments change the encoder in ways that are not supported.
    """
    if "architecture" in config:
        return _read_timm_config(config)
    ovis2 = config.get("visual_tokenizer_config")
    sections = (config.get("vision_config"), ovis2.get("backbone_config") if isinstance(ovis2, Mapping) else None)
    is_tower = "patch_size" in config or str(config.get("model_type")).startswith(("aimv2_vision", "sailvit"))
    fields = next((each for each in sections if isinstance(each, Mapping)), config if is_tower else {})
    known = {key: fields[key] for key in ENCODER_FIELDS if fields.get(key) is not None}
    if known and text_fields(config):  # the connector's, which a SAIL-VL has at the top level
        known["pixel_shuffle_factor"] = shuffle_factor(config)
    if "mlp_bias" in fields:
        known["use_bias"] = fields["mlp_bias"]
    if fields.get("model_type") == "aimv2_vision_model" or "is_native" in fields:
        known["pos_embed_type"] = "sincos" if fields.get("is_native") else "absolute"
    return {**known, **{key: square_side(known[key]) for key in ("image_size", "patch_size") if key in known}}


def _read_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    match = TIMM_NAME.fullmatch(str(config["architecture"]))
    if not match:
        return {}
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"config.json: model_args: expected a JSON object, got {arguments!r}")
    if unknown := ", ".join(sorted(arguments.keys() - TIMM_HARMLESS)):
        raise CheckpointError(f"config.json: model_args: {unknown} not supported in an AIMv2 encoder")
    width = next(width for width, name in SIZE_NAMES.items() if name == match[1])
    return {
        "hidden_act": arguments.get("act_layer", "silu"),
        "hidden_size": arguments.get("embed_dim", width),
        "num_hidden_layers": arguments.get("depth", 24),
        "num_attention_heads": arguments.get("num_heads", width // HEAD_WIDTH),
        "patch_size": arguments.get("patch_size", int(match[2])),
        "image_size": square_side(arguments.get("img_size", int(match[3]))),
        "pos_embed_type": "absolute",
    }


def tower_fields(dimensions: AIMv2Dimensions, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the fields of SAILViTConfig, from the tensors and then from `config` (read_aimv2_config), and where these
    contradict each other."""
    fields, grid = asdict(dimensions), dimensions.grid_size
    del fields["grid_size"]
    fields["pos_embed_type"] = "sincos" if grid is None else "absolute"
    fields["image_size"] = config.get("image_size", 448) if grid is None else grid * dimensions.patch_size
    size, width, depth = _published_size(dimensions), dimensions.hidden_size, dimensions.num_hidden_layers
    heads, factor = config.get("num_attention_heads"), config.get("pixel_shuffle_factor", 2)
    if heads is None and size:
        heads = width // HEAD_WIDTH
    problems = [
        *contradictions(fields, config),
        *_depth_problems(size, depth, "num_hidden_layers" in config),
        *invalid_values(config, ("rms_norm_eps", "attention_dropout", "projection_dropout", "initializer_range")),
    ]
    wrong_heads = head_problems(heads, width)
    if size and not wrong_heads:
        expected = f"{width // HEAD_WIDTH} as in AIMv2 {size[0]}"
        wrong_heads = config_problems("num_attention_heads", heads == width // HEAD_WIDTH, expected, heads)
    shuffle = config_problems("pixel_shuffle_factor", is_integer(factor), "a positive integer", factor)
    return {**config, **fields, "num_attention_heads": heads}, [*problems, *wrong_heads, *shuffle]


def _depth_problems(size: tuple[str, int] | None, depth: int, is_declared: bool) -> list[Problem]:
    what = ""
    if not depth:
        what = "expected at least one block, got none"
    elif size and depth != size[1] and not is_declared:
        what = f"expected {size[1]} blocks as in AIMv2 {size[0]}, got {depth}: set it in config.json if that is right"
    return [Problem("missing", "num_hidden_layers", what)] if what else []


def _published_size(dimensions: AIMv2Dimensions) -> tuple[str, int] | None:
    """Return the name and the number of blocks of the published size with these widths, if there is one."""
    if MLP_WIDTHS.get(dimensions.hidden_size) != dimensions.intermediate_size:
        return None
    name = SIZE_NAMES[dimensions.hidden_size]
    return name, 12 if name == "base" else 24


def size_name(dimensions: AIMv2Dimensions) -> str | None:
    """Return the published size of these widths and this depth, if there is one."""
    size = _published_size(dimensions)
    return size[0] if size and size[1] == dimensions.num_hidden_layers else None


@dataclass(frozen=True)
class Tower:
    """A vision encoder in a checkpoint; `fields` are those of SAILViTConfig."""

    match: Match
    dimensions: AIMv2Dimensions
    fields: dict[str, Any]
    problems: list[Problem]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return self.match.tensors


def find_aimv2(checkpoint: Checkpoint, layout: str | None = None, prefix: str | None = None) -> Tower:
    """Return the encoder of a checkpoint; arguments and errors are those of find_model, with a key of LAYOUTS."""
    match = find_model(checkpoint, AIMV2, layout, prefix)
    dimensions, problems = infer_dimensions(match)
    declared, recorded = read_aimv2_config(checkpoint.document("config.json")), _recorded_fields(checkpoint)
    fields, wrong_fields = tower_fields(dimensions, declared or recorded)
    problems += [*wrong_fields, *_record_problems(declared, recorded), *match.dtype_problems()]
    return Tower(match, dimensions, fields, problems + index_problems(checkpoint))


def _recorded_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the encoder's fields in the provenance.json of a conversion; raise CheckpointError for another form."""
    recorded = checkpoint.document(PROVENANCE).get("tower", {})
    if not isinstance(recorded, dict):
        what = f"expected a JSON object, got {recorded!r}: remove the file if it is wrong"
        raise CheckpointError(f"{PROVENANCE}: tower: {what}")
    return recorded


def _record_problems(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[Problem]:
    """Return fields that no tensor shows, where config.json and provenance.json differ."""
    problems = []
    for key in ("num_attention_heads", "rms_norm_eps", "hidden_act"):
        if key in config and key in recorded:
            expected, fix = f"{recorded[key]!r} as in {PROVENANCE}", "fix config.json, or that file"
            problems += config_problems(key, config[key] == recorded[key], expected, config[key], fix)
    return problems
