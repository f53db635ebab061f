"""What a tower is, by its tensors and by its configuration, and where the two contradict each other."""

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
from ..storage.tensors import FLOAT_BITS, StoredTensor
from .aimv2_names import AIMv2Match, NamingScheme, TensorSpec, TowerShape, match_aimv2, tensor_specs


MLP_WIDTHS = {768: 2048, 1024: 2816, 1536: 4096, 2048: 5632, 3072: 8192}

HEAD_WIDTH = 128  # of every published AIMv2 (arXiv 2411.14402, table 1)

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "mish")

MOST_BLOCKS = 1000

TIMM_NAME = re.compile(r"aimv2_(large|huge|1b|3b)_patch(\d+)_(\d+)(\..*)?")

# Arguments of timm's model that change no token, or that the tensors show.
TIMM_HARMLESS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "proj_bias",
    "num_classes", "global_pool", "act_layer", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate",
}  # fmt: skip


def measure(found: AIMv2Match, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TowerShape, list[Problem]]:
    """
    The dimensions of a tower, and what is missing, empty, of a wrong shape, or too much.

    Args:
        found: Its names.
        shapes: Name in the layout -> shape of the tensor, for every one of these names.

    Raises:
        CheckpointError: Nothing can be measured: the patch convolution is missing, empty or no convolution.
    """
    names = found.names
    empty = [name for name, shape in shapes.items() if prod(shape) == 0]
    problems = [Problem("empty", names[name], why_empty(shapes[name])) for name in empty]
    problems += [Problem("unexpected", name, _why_unmapped(name, found.layout)) for name in found.unmapped]
    try:
        shape = _shape_of(found.layout, shapes, found.prefix)
    except CheckpointError:
        raise_if_any(problems)  # which says more, if there is one
        raise
    wanted = {piece.name: piece for piece in tensor_specs(found.layout, shape)}
    for name, piece in wanted.items():
        if name not in shapes:
            problems.append(Problem("missing", found.prefix + name, f"missing; {list(piece.shape)} is wanted"))
        elif shapes[name] != piece.shape and name not in empty:
            problems.append(Problem("shape", names[name], _wrong_shape(shapes[name], piece)))
    for name in shapes.keys() - wanted.keys():
        problems.append(Problem("unexpected", names[name], "not part of a tower of this shape"))
    return shape, problems


def why_empty(shape: tuple[int, ...]) -> str:
    return f"empty, {list(shape)}: saved under ZeRO-3 without gathering its parts? Save it whole"


def _wrong_shape(shape: tuple[int, ...], piece: TensorSpec) -> str:
    return f"is {list(shape)}, but {list(piece.shape)} in a tower of this shape"


def _why_unmapped(name: str, layout: NamingScheme) -> str:
    if "lora_" in name or ".base_layer." in name:
        return "belongs to an adapter: merge it first (peft's merge_and_unload)"
    return f"maps nowhere in the layout of {layout.title}"


def _shape_of(layout: NamingScheme, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> TowerShape:
    patches = layout.names_of("preprocessor.patchifier.proj")[0] + ".weight"
    convolution = shapes.get(patches, ())
    if len(convolution) != 4 or 0 in convolution or convolution[2] != convolution[3]:
        what = f"is {list(convolution)}, no patch convolution" if patches in shapes else "is missing"
        raise CheckpointError(f"{prefix}{patches} {what}: without it nothing can be said of the tower")
    width, channels, patch, _ = convolution
    block = layout.names_of("trunk.blocks.{}.norm_1")[0].split("{}")[0]
    blocks = [int(match[1]) for name in shapes if (match := re.match(re.escape(block) + r"(\d+)\.", name))]
    if max(blocks, default=0) >= MOST_BLOCKS:
        raise CheckpointError(f"{prefix}{block}{max(blocks)}: a tower has no such block")
    projected, mlp = (_has_bias(layout, shapes, f"trunk.blocks.{{}}.{part}") for part in ("attn.proj", "mlp.fc1"))
    if projected != mlp:
        raise CheckpointError(f"{prefix}{block}*: biases in only one of attention and mlp, which no layout here has")
    return TowerShape(
        hidden_size=width,
        intermediate_size=_mlp_width(layout, shapes) or MLP_WIDTHS.get(width, 1),
        num_hidden_layers=max(blocks, default=-1) + 1,
        num_channels=channels,
        patch_size=patch,
        grid_size=_grid_size(layout, shapes, width, prefix),
        qkv_bias=_has_bias(layout, shapes, "trunk.blocks.{}.attn.qkv"),
        use_bias=mlp,
    )


def _mlp_width(layout: NamingScheme, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What most blocks have, so that the one that differs is named."""
    before, after = layout.names_of("trunk.blocks.{}.mlp.fc1")[0].split("{}")
    rows = Counter(
        shape[0] for name, shape in shapes.items()
        if name.startswith(before) and name.endswith(after + ".weight") and len(shape) == 2 and shape[0]
    )  # fmt: skip
    return rows.most_common(1)[0][0] if rows else None


def _grid_size(layout: NamingScheme, shapes: Mapping[str, tuple[int, ...]], width: int, prefix: str) -> int | None:
    name = layout.names_of("preprocessor.pos_embed")[0]
    if name not in shapes or not prod(shapes[name]):
        return None if name not in shapes else 1
    positions = prod(shapes[name]) // width
    if isqrt(positions) ** 2 != positions:
        raise CheckpointError(f"{prefix}{name}: {list(shapes[name])} are the positions of no square grid")
    return isqrt(positions)


def _has_bias(layout: NamingScheme, shapes: Mapping[str, tuple[int, ...]], module: str) -> bool:
    ends = tuple(name.split("{}")[1] + ".bias" for name in layout.names_of(module))
    return any(name.endswith(ends) for name in shapes)


def read_aimv2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a config.json says of its vision tower, under the names of SAILViTConfig: released SAILViT's and SAIL-VL's,
    Apple's, transformers' (aimv2, ovis2), Ovis2's own, timm's. Empty where it describes none.

    Raises:
        CheckpointError: It is timm's, with arguments that change the tower in a way that nothing here knows.
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
    """The fields of one tower, as far as they are there; transformers' own says what kind of positions it has."""
    fields = {key: config[key] for key in ENCODER_FIELDS if config.get(key) is not None}
    kind = config.get("model_type")
    if "mlp_bias" in config:
        fields["use_bias"] = config["mlp_bias"]
    if kind == "aimv2_vision_model" or "is_native" in config:
        fields["pos_embed_type"] = "sincos" if config.get("is_native") else "absolute"
    for key in ("image_size", "patch_size"):
        value = fields.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            fields[key] = value[0]
    return fields


def _read_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    match = TIMM_NAME.fullmatch(str(config["architecture"]))
    if not match:
        return {}
    widths = {name: width for width, name in SIZE_NAMES.items()}
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"config.json: model_args is {arguments!r}, not a map")
    unknown = arguments.keys() - TIMM_HARMLESS
    if unknown:
        raise CheckpointError(f"config.json: model_args has {', '.join(sorted(unknown))}: no tower of this kind then")
    width, size = arguments.get("embed_dim", widths[match[1]]), arguments.get("img_size", int(match[3]))
    return {
        "hidden_act": arguments.get("act_layer", "silu"),
        "hidden_size": width,
        "num_hidden_layers": arguments.get("depth", 24),
        "num_attention_heads": arguments.get("num_heads", widths[match[1]] // HEAD_WIDTH),
        "patch_size": arguments.get("patch_size", int(match[2])),
        "image_size": size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size,
        "pos_embed_type": "absolute",
    }


def tower_fields(shape: TowerShape, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """
    The fields of SAILViTConfig for a tower, and where its configuration contradicts its tensors.

    Args:
        shape: By its tensors.
        config: By its configuration, as read_tower_config gives it; it decides what tensors do not show.
    """
    fields = {key: value for key, value in asdict(shape).items() if key != "grid_size"}
    if shape.grid_size is None:
        fields |= {"pos_embed_type": "sincos", "image_size": config.get("image_size", 448)}
    else:
        fields |= {"pos_embed_type": "absolute", "image_size": shape.grid_size * shape.patch_size}
    problems = [
        Problem("config", key, f"config.json says {config[key]!r}, the tensors {value!r}: correct config.json")
        for key, value in fields.items()
        if key in config and config[key] != value
    ]
    if not shape.num_hidden_layers:
        problems.append(Problem("missing", "num_hidden_layers", "there is no block"))
    elif "num_hidden_layers" not in config and _is_published(shape) and size_name(shape) is None:
        size = SIZE_NAMES[shape.hidden_size]
        what = f"{shape.num_hidden_layers} here, another number in AIMv2 {size}: say it in config.json"
        problems.append(Problem("missing", "num_hidden_layers", what))
    return _with_heads({**config, **fields}, shape, problems + _odd_values(config))


def _odd_values(config: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key in ("rms_norm_eps", "attention_dropout", "projection_dropout", "initializer_range"):
        value = config.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            problems.append(Problem("config", key, f"is {value!r}, not a number from 0 to 1: correct config.json"))
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        what = f"is {config['hidden_act']!r}, not one of {', '.join(ACTIVATIONS)}: correct config.json"
        problems.append(Problem("config", "hidden_act", what))
    factor = config.get("pixel_shuffle_factor", 2)
    if type(factor) is not int or factor < 1:
        problems.append(Problem("config", "pixel_shuffle_factor", f"is {factor!r}: correct config.json"))
    return problems


def _with_heads(
    fields: dict[str, Any], shape: TowerShape, problems: list[Problem]
) -> tuple[dict[str, Any], list[Problem]]:
    """Adds the number of heads, which no tensor shows: the configuration's; that of a published size is known."""
    width, said = shape.hidden_size, fields.get("num_attention_heads")
    if said is None and _is_published(shape):
        said = width // HEAD_WIDTH
    if type(said) is not int or said < 1 or width % said:
        mend = "say it in config.json, or convert with --base"
        what = f"is {said!r}, for a width of {width}, and tensors do not show it: {mend}"
        problems.append(Problem("config", "num_attention_heads", what))
    elif _is_published(shape) and said != width // HEAD_WIDTH:
        what = f"config.json says {said}, but AIMv2 {SIZE_NAMES[width]} has {width // HEAD_WIDTH}: correct config.json"
        problems.append(Problem("config", "num_attention_heads", what))
    return {**fields, "num_attention_heads": said}, problems


def _is_published(shape: TowerShape) -> bool:
    return MLP_WIDTHS.get(shape.hidden_size) == shape.intermediate_size


def size_name(shape: TowerShape) -> str | None:
    """The published size of this width and depth, if there is one."""
    name = SIZE_NAMES.get(shape.hidden_size)
    depth = 12 if name == "base" else 24
    return name if _is_published(shape) and shape.num_hidden_layers == depth else None


@dataclass(frozen=True)
class Tower:
    """
    A tower in a checkpoint.

    Attributes:
        found: Its names.
        shape: Its dimensions, by its tensors.
        fields: Those of SAILViTConfig.
        tensors: Name in the layout, without prefix -> where it lies.
        problems: What is wrong with it.
    """

    found: AIMv2Match
    shape: TowerShape
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    problems: list[Problem]

    @property
    def dtypes(self) -> dict[str, int]:
        """Data type -> how many of its tensors have it."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()))


def find_aimv2(checkpoint: Checkpoint, layout: str | None = None, prefix: str | None = None) -> Tower:
    """
    The tower of a checkpoint; only the files that hold its tensors are opened.

    Args:
        layout: The layout it has, if that is known.
        prefix: The prefix its names have, if that is known.

    Raises:
        CheckpointError: There is none, or a file that holds it is missing or broken.
    """
    try:
        found = match_aimv2(checkpoint.weight_map, layout, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source.name}: {error}") from error
    tensors = {name: checkpoint[stored] for name, stored in found.names.items()}
    shape, problems = measure(found, {name: tensor.shape for name, tensor in tensors.items()})
    fields, contradictions = tower_fields(shape, read_source_config(checkpoint))
    tower = Tower(found, shape, fields, tensors, problems + contradictions + _record_problems(checkpoint))
    tower.problems.extend(_dtype_problems(tower))
    for file in checkpoint.opened:
        tower.problems.extend(checkpoint.name_problems(file))
    return tower


def read_source_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the source says of its tower: its config.json, or else the provenance.json of a conversion."""
    return read_aimv2_config(checkpoint.document("config.json")) or recorded_tower(checkpoint)


def recorded_tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    The fields that the provenance.json of a conversion has.

    Raises:
        CheckpointError: It has something else in their place.
    """
    recorded = checkpoint.document(PROVENANCE).get("tower", {})
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{PROVENANCE}: its tower is {recorded!r}, not a map: remove the file if it is not true")
    return recorded


def _record_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Where config.json says something else than provenance.json of what no tensor shows."""
    said, recorded = read_source_config(checkpoint), recorded_tower(checkpoint)
    return [
        Problem("config", key, f"config.json says {said[key]!r}, {PROVENANCE} {recorded[key]!r}: one of them is wrong")
        for key in ("num_attention_heads", "rms_norm_eps", "hidden_act")
        if key in said and key in recorded and said[key] != recorded[key]
    ]


def _dtype_problems(tower: Tower) -> list[Problem]:
    dtypes = tower.dtypes
    common = max(dtypes, key=lambda dtype: dtypes[dtype])
    problems = []
    for name, tensor in tower.tensors.items():
        if tensor.dtype not in FLOAT_BITS:
            problems.append(
                Problem("dtype", tower.found.names[name], f"is {tensor.dtype}, not a floating point number")
            )
        elif tensor.dtype != common:
            what = f"is {tensor.dtype}, most of the tower {common}: mixed precision"
            problems.append(Problem("mixed", tower.found.names[name], what))
    return problems
