"""Checkpoints with random weights, of the true shapes and names: for a first look, for tests and benchmarks."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from .export.runtimes import SIZE_NAMES
from .models.aimv2_config import HEAD_WIDTH, MLP_WIDTHS
from .models.aimv2_names import LAYOUTS, AIMv2Dimensions
from .models.name_tables import TensorSpec, tensor_specs
from .storage.files import write_json
from .storage.safetensors_io import write_weights
from .storage.tensors import CHUNK, TORCH_DTYPES, NewTensor, cast


def published_shape(size: str, image_size: int = 448, blocks: int | None = None) -> AIMv2Dimensions:
    """
    The dimensions of a published AIMv2.

    Args:
        size: "base", "large", "huge", "1b" or "3b".
        image_size: Height and width in pixels; a multiple of 14.
        blocks: Another depth than the published one.
    """
    width = {name: width for width, name in SIZE_NAMES.items()}[size]
    depth = blocks or (12 if size == "base" else 24)
    return AIMv2Dimensions(width, MLP_WIDTHS[width], depth, num_channels=3, patch_size=14, grid_size=image_size // 14)


def write_synthetic(
    folder: Path,
    shape: AIMv2Dimensions,
    layout: str = "sailvit",
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
    config: dict[str, Any] | None = None,
) -> Path:
    """
    Writes random weights under the names of a layout; returns the folder.

    Args:
        folder: To be made.
        shape: Of the tower.
        layout: A key of LAYOUTS.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_size: In bytes, or as "5GB".
        config: Its config.json; Apple's, as they publish it, if not given.
    """
    folder.mkdir(parents=True)
    target, key = LAYOUTS[layout], TORCH_DTYPES[dtype]
    tensors = [
        NewTensor(target.prefix + piece.name, key, piece.shape, lambda piece=piece: _random(piece, key))
        for piece in tensor_specs(target, shape)
    ]
    write_weights(folder, tensors, max_shard_size, lambda written: None)
    write_json(folder / "config.json", apple_config(shape) if config is None else config)
    return folder


def apple_config(shape: AIMv2Dimensions) -> dict[str, Any]:
    """config.json as Apple publishes it."""
    return {
        "architectures": ["AIMv2Model"],
        "model_type": "aimv2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": max(shape.hidden_size // HEAD_WIDTH, 1),
        "num_channels": shape.num_channels,
        "image_size": (shape.grid_size or 16) * shape.patch_size,
        "patch_size": shape.patch_size,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
        "qkv_bias": shape.qkv_bias,
        "use_bias": shape.use_bias,
    }


def _random(piece: TensorSpec, dtype: str) -> Iterator[np.ndarray]:
    """Normal numbers, those of the released tensor's name whatever the layout; norms lie around 1."""
    generator = np.random.default_rng(crc32(piece.canonical.encode()))
    scale, middle = (0.2, 1.0) if "norm" in piece.canonical else (min(0.02, prod(piece.shape) ** -0.25), 0.0)
    skipped, left = piece.intervals[0][0], prod(piece.shape)
    while skipped:
        skipped -= len(generator.standard_normal(min(skipped, CHUNK // 4), np.float32))
    while left:
        numbers = generator.standard_normal(min(left, CHUNK // 4), np.float32) * np.float32(scale) + np.float32(middle)
        left -= len(numbers)
        yield cast(numbers.view(np.uint8), "F32", dtype)
