"""Output files: which to write, and writing one atomically."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .stream import EncodedImage


def choose_targets(
    images: Mapping[str, str], out: Path, format: str, overwrite: bool = False, resume: bool = False
) -> dict[str, Path]:
    """
    Return the source of every image to encode -> the file for its tokens.

    Args:
        images: Source -> name, as `find_images` returns it.
        out: The folder of the files.
        format: "safetensors" or "npy".
        overwrite: Whether existing files are to be replaced.
        resume: Whether images whose file exists are left out.

    Raises:
        ValueError: `out` is a file, or a file exists and neither `overwrite` nor `resume` is set.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: expected a folder")
    targets = {source: out / f"{name}.{format}" for source, name in images.items()}
    existing = {source for source, target in targets.items() if target.exists() and not overwrite}
    if existing and not resume:
        raise ValueError(f"{targets[min(existing)]} exists: give --overwrite, --resume or another --out")
    return {source: target for source, target in targets.items() if source not in existing}


def write_tokens(image: EncodedImage, path: Path) -> None:
    """
    Write the tokens (tiles, N / f^2, f^2 * D) of an image, the thumbnail last.

    Args:
        image: An encoded image.
        path: A `.safetensors` file (tensors `tokens`, in the model's dtype, and `tile_grid`: columns, rows) or a `.npy`
            file (only the tokens; bfloat16 is converted to float32, since numpy lacks it).
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
            save_safetensors(tensors, part, {"format": "pt", "image": image.source})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file as save_file does; raise OSError if it cannot be written, which the library does not."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # of the library, for a full disk too
        raise OSError(f"{path}: {error}") from error
