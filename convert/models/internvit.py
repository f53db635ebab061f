"""InternViT, as published with code of its own, to transformers' InternVLVisionModel."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from ..export.card import write_conversion_card
from ..export.image_settings import center_crops, clip_settings, has_normalization, read_image_settings
from ..plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.files import write_json
from ..storage.tensors import StoredTensor, torch_name
from .internvl_common import (
    Found,
    InternVLPlan,
    Kind,
    check_model,
    common_rows,
    contradictions,
    count_blocks,
    describe_names,
    finds,
    has_names,
    is_whole,
    odd_numbers,
    read_model,
    tensor_shape,
)


INTERNVIT = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.layers.{}.norm1": "encoder.layer.{}.layernorm_before",
    "encoder.layers.{}.attn.qkv": (
        "encoder.layer.{}.attention.q_proj",
        "encoder.layer.{}.attention.k_proj",
        "encoder.layer.{}.attention.v_proj",
    ),
    "encoder.layers.{}.attn.q_norm": "encoder.layer.{}.attention.q_norm",
    "encoder.layers.{}.attn.k_norm": "encoder.layer.{}.attention.k_norm",
    "encoder.layers.{}.attn.proj": "encoder.layer.{}.attention.projection_layer",
    "encoder.layers.{}.ls1": "encoder.layer.{}.lambda_1",
    "encoder.layers.{}.norm2": "encoder.layer.{}.layernorm_after",
    "encoder.layers.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "encoder.layers.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
    "encoder.layers.{}.ls2": "encoder.layer.{}.lambda_2",
}

# Names that no other model has: by them a model is found, and its prefix.
OF_INTERNVIT = re.compile(r"(?P<prefix>(?:.*\.)?)encoder\.layers\.\d+\.ls[12]")

PUBLISHED_HEADS = {1024: 16, 3200: 25}  # by width, of InternViT-300M and -6B

# Field of InternVLVisionConfig -> what InternViT calls it, and its default there.
INTERNVIT_FIELDS = {
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "gelu"),
    "attention_dropout": ("attention_dropout", 0.0),
    "projection_dropout": ("dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "layer_scale_init_value": ("initializer_factor", 0.1),
}

QK_NORM_EPS = 1e-6  # of InternVLVisionModel, whatever its configuration says


@dataclass(frozen=True)
class InternViTShape:
    """The dimensions of an InternViT that its tensors show; grid_size is the side of the square of positions."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_channels: int
    patch_size: int
    grid_size: int
    qkv_bias: bool
    norm_bias: bool
    qk_norm: bool

    @property
    def groups(self) -> tuple[int, tuple[int, int, int]]:
        """How many groups qkv has; rows of query, key and value in each."""
        return 1, (self.hidden_size,) * 3

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(module, "{}" for the block; parameter of it) -> shape of the tensor."""
        width, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        block = {
            ("norm1", ".weight"): (width,), ("norm1", ".bias"): (width,) if self.norm_bias else None,
            ("attn.qkv", ".weight"): (3 * width, width), ("attn.qkv", ".bias"): (3 * width,) if self.qkv_bias else None,
            ("attn.q_norm", ".weight"): (width,) if self.qk_norm else None,
            ("attn.k_norm", ".weight"): (width,) if self.qk_norm else None,
            ("attn.proj", ".weight"): (width, width), ("attn.proj", ".bias"): (width,),
            ("ls1", ""): (width,),
            ("norm2", ".weight"): (width,), ("norm2", ".bias"): (width,) if self.norm_bias else None,
            ("mlp.fc1", ".weight"): (mlp, width), ("mlp.fc1", ".bias"): (mlp,),
            ("mlp.fc2", ".weight"): (width, mlp), ("mlp.fc2", ".bias"): (width,),
            ("ls2", ""): (width,),
        }  # fmt: skip
        return {
            ("embeddings.class_embedding", ""): (1, 1, width),
            ("embeddings.position_embedding", ""): (1, self.grid_size**2 + 1, width),
            ("embeddings.patch_embedding", ".weight"): (width, self.num_channels, patch, patch),
            ("embeddings.patch_embedding", ".bias"): (width,),
            **{(f"encoder.layers.{{}}.{part}", end): shape for (part, end), shape in block.items() if shape},
        }


VIT = Kind("InternViT", "vision", INTERNVIT, OF_INTERNVIT)


def is_internvit(names: Iterable[str]) -> bool:
    """Whether there is an InternViT among the names of a checkpoint, behind whatever prefix."""
    return finds(VIT, names)


def measure_internvit(found: Found, tensors: Mapping[str, StoredTensor]) -> InternViTShape:
    """
    Raises:
        CheckpointError: Nothing can be measured.
    """
    patches = tensor_shape(tensors, found, "embeddings.patch_embedding.weight", 4)
    if patches[2] != patches[3]:
        raise CheckpointError(f"{found.prefix}embeddings.patch_embedding.weight is {list(patches)}: no square patches")
    positions = tensor_shape(tensors, found, "embeddings.position_embedding", 3)[1] - 1
    if positions < 1 or isqrt(positions) ** 2 != positions:
        what = f"{positions} positions besides the class token's: those of no square grid"
        raise CheckpointError(f"{found.prefix}embeddings.position_embedding has {what}")
    return InternViTShape(
        hidden_size=patches[0],
        intermediate_size=common_rows(tensors, ".mlp.fc1.weight"),
        num_hidden_layers=count_blocks(tensors, found, "encoder.layers."),
        num_channels=patches[1],
        patch_size=patches[2],
        grid_size=isqrt(positions),
        qkv_bias=has_names(tensors, ".attn.qkv.bias"),
        norm_bias=has_names(tensors, ".norm1.bias", ".norm2.bias"),
        qk_norm=has_names(tensors, ".attn.q_norm.weight", ".attn.k_norm.weight"),
    )


def internvit_config(shape: InternViTShape, said: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """
    config.json of an InternVLVisionModel, and where what is said contradicts the tensors or cannot be expressed.

    Args:
        said: The original configuration; it decides what tensors do not show, and else InternViT's defaults do.
    """
    side, patch = shape.grid_size * shape.patch_size, shape.patch_size
    known = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_channels": shape.num_channels,
        "image_size": side,
        "patch_size": patch,
        "norm_type": "layer_norm" if shape.norm_bias else "rms_norm",
    }
    problems = contradictions({**known, "qkv_bias": shape.qkv_bias, "qk_normalization": shape.qk_norm}, said)
    config = {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        **known,
        "image_size": [side, side],
        "patch_size": [patch, patch],
        "attention_bias": shape.qkv_bias,
        "use_qk_norm": shape.qk_norm,
        "num_attention_heads": said.get("num_attention_heads", PUBLISHED_HEADS.get(shape.hidden_size)),
        **{name: said.get(original, default) for name, (original, default) in INTERNVIT_FIELDS.items()},
        "hidden_dropout_prob": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # which leaves out a final norm: an InternViT has none
    }
    return config, problems + _odd_internvit(config, said)


def _odd_internvit(config: Mapping[str, Any], said: Mapping[str, Any]) -> list[Problem]:
    """Fields that cannot be, or that an InternVLVisionModel has not."""
    free = ("hidden_act", "initializer_factor")  # no number; of no meaning once trained
    numbers = [original for original, _ in INTERNVIT_FIELDS.values() if original not in free]
    problems, heads, width = odd_numbers(said, numbers), config["num_attention_heads"], config["hidden_size"]
    if not is_whole(heads) or width % heads:
        what = f"is {heads!r}, for a width of {width}: tensors do not show it, so say it in config.json"
        problems.append(Problem("config", "num_attention_heads", what))
    if config["use_qk_norm"] and config["layer_norm_eps"] != QK_NORM_EPS:
        what = f"with qk_normalization, transformers' InternVLVisionModel has {QK_NORM_EPS} there"
        problems.append(Problem("config", "layer_norm_eps", f"is {config['layer_norm_eps']!r}: {what}"))
    return problems


@dataclass(kw_only=True)
class InternViTPlan(InternVLPlan):
    """An InternViT, to be written as an InternVLVisionModel."""

    def write_folder(self, folder: Path) -> None:
        write_json(folder / "config.json", {**self.config, "dtype": torch_name(self.dtype)})
        settings = clip_settings(self.checkpoint, self.config["image_size"])
        write_json(folder / "preprocessor_config.json", settings)
        description = (
            f"An InternViT, {self.shape.num_hidden_layers} blocks of width {self.shape.hidden_size}, "
            f"{self.config['image_size'][0]} pixels, {torch_name(self.dtype)}, as transformers' InternVLVisionModel. "
            "The first token is the class token."
        )
        write_conversion_card(folder, [self.checkpoint.source], description)

    def verify(self, folder: Path) -> dict[str, Any]:
        from .internvl_reference import verify_internvit

        return verify_internvit(folder, self)


def plan_internvit(checkpoint: Checkpoint, asked: Options) -> InternViTPlan:
    """
    An InternViT, bare or in a larger model, to transformers' InternVLVisionModel.

    Raises:
        CheckpointError: There is no whole one, config.json contradicts it, it is a variant that InternVLVisionModel has
            not, or an option means nothing for it.
    """
    found, tensors, said = read_model(checkpoint, VIT, asked)
    shape = measure_internvit(found, tensors)
    config, problems = internvit_config(shape, said)
    dtype = check_model(checkpoint, asked, found, tensors, shape, problems)
    read_image_settings(checkpoint)
    job = InternViTPlan(
        checkpoint=checkpoint, dtype=dtype, found=found, stored=tensors, shape=shape, said=said, config=config
    )
    job.notes = describe_names(found)
    if said.get("drop_path_rate"):
        job.notes.append(f"drop_path_rate {said['drop_path_rate']}: InternVLVisionModel has none, for training")
    if not has_normalization(checkpoint):
        job.notes.append("the source does not say how pictures are normalised: ImageNet's mean and std, assumed")
    if center_crops(checkpoint):
        job.notes.append("the source crops pictures to a square; what is written resizes them to it, as SAILViT does")
    return job
