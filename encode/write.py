"""Writes the tokens of one image to a file, whole or not at all."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .stream import EncodedImage


def write_tokens(image: EncodedImage, path: Path) -> None:
    """
    Writes `tokens` (tiles, N / f^2, f^2 * D), the thumbnail last.

    Args:
        image: With tokens.
        path: Ends in `.safetensors` (tensors `tokens`, in the model's dtype, and `tile_grid`: columns, rows) or in
            `.npy` (the tokens alone; bfloat16, which numpy lacks, becomes float32).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".npy":
            tokens = image.tokens.float() if image.tokens.dtype == torch.bfloat16 else image.tokens
            with part.open("wb") as file:
                np.save(file, tokens.numpy())
        else:
            tensors = {"tokens": image.tokens.contiguous(), "tile_grid": torch.tensor(image.grid)}
            save_file(tensors, part, metadata={"format": "pt", "image": image.source})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
