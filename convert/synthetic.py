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


def published_shape(size: str, blocks: int | None = None) -> AIMv2Dimensions:
    """Return the dimensions of an AIMv2 at 448 pixels: "base", "large", "huge", "1b" or "3b"; with fewer `blocks`."""
    width = {name: width for width, name in SIZE_NAMES.items()}[size]
    depth = blocks or (12 if size == "base" else 24)
    return AIMv2Dimensions(width, MLP_WIDTHS[width], depth, num_channels=3, patch_size=14, grid_size=32)


def write_synthetic(
    folder: Path,
    shape: AIMv2Dimensions,
    layout: str = "sailvit",
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
    config: dict[str, Any] | None = None,
) -> Path:
    """
    Write random weights in a layout (a key of LAYOUTS) and a dtype (one of DTYPES) to a new folder; return the folder.
    Its config.json is Apple's by default.
    """
    folder.mkdir(parents=True)
    target, key = LAYOUTS[layout], TORCH_DTYPES[dtype]
    tensors = [
        NewTensor(target.prefix + spec.name, key, spec.shape, lambda spec=spec: _random(spec, key))
        for spec in tensor_specs(target, shape)
    ]
    write_weights(folder, tensors, max_shard_size, lambda written: None)
    write_json(folder / "config.json", apple_config(shape) if config is None else config)
    return folder


def apple_config(shape: AIMv2Dimensions) -> dict[str, Any]:
    """Return config.json as Apple publishes it."""
    fields = asdict(shape)
    size, heads = (fields.pop("grid_size") or 16) * shape.patch_size, max(shape.hidden_size // HEAD_WIDTH, 1)
    return {
        "architectures": ["AIMv2Model"], "model_type": "aimv2", "image_size": size, **fields,
        "num_attention_heads": heads, "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "projection_dropout": 0.0,
    }  # fmt: skip


def _random(spec: TensorSpec, dtype: str) -> Iterator[np.ndarray]:
    """Normal random numbers, the same in every layout: the seed is the released name; norms are around 1."""
    generator, is_norm = np.random.default_rng(crc32(spec.canonical.encode())), "norm" in spec.canonical
    scale, mean = (0.2, 1.0) if is_norm else (min(0.02, prod(spec.shape) ** -0.25), 0.0)
    skipped, count, most = spec.intervals[0][0], prod(spec.shape), CHUNK // 4
    for start in range(0, skipped, most):
        generator.standard_normal(min(skipped - start, most), np.float32)
    for start in range(0, count, most):
        numbers = generator.standard_normal(min(count - start, most), np.float32) * np.float32(scale) + np.float32(mean)
        yield cast(numbers.view(np.uint8), "F32", dtype)
