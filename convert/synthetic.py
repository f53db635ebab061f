"""Write checkpoints with random weights and the published names and shapes, for demos, tests and benchmarks."""

from collections.abc import Iterator
from dataclasses import asdict
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
    Return the dimensions of a published AIMv2.

    Args:
        size: "base", "large", "huge", "1b" or "3b".
        image_size: Height and width in pixels; a multiple of 14.
        blocks: Number of blocks; the published one by default.
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
    Write random weights to a new folder; returns the folder.

    Args:
        layout: A key of LAYOUTS.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_size: In bytes, or as "5GB".
        config: Its config.json; Apple's by default.
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
    """Return config.json as Apple publishes it."""
    fields = asdict(shape)
    image_size = (fields.pop("grid_size") or 16) * shape.patch_size
    return {
        "architectures": ["AIMv2Model"],
        "model_type": "aimv2",
        **fields,
        "num_attention_heads": max(shape.hidden_size // HEAD_WIDTH, 1),
        "image_size": image_size,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
    }


def _random(piece: TensorSpec, dtype: str) -> Iterator[np.ndarray]:
    """Normal random numbers, the same in every layout: the seed is the released name; norms are around 1."""
    generator = np.random.default_rng(crc32(piece.canonical.encode()))
    scale, middle = (0.2, 1.0) if "norm" in piece.canonical else (min(0.02, prod(piece.shape) ** -0.25), 0.0)
    skipped, left = piece.intervals[0][0], prod(piece.shape)
    while skipped:
        skipped -= len(generator.standard_normal(min(skipped, CHUNK // 4), np.float32))
    while left:
        numbers = generator.standard_normal(min(left, CHUNK // 4), np.float32) * np.float32(scale) + np.float32(middle)
        left -= len(numbers)
        yield cast(numbers.view(np.uint8), "F32", dtype)
