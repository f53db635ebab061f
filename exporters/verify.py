# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Comparison of an ONNX folder, run in a clean process, with the encoder in torch."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.storage.errors import VerificationError
from ..convert.verify.outputs import IMAGE
from ..encode.onnx_model import FILES, FOLDER
from .checks import BOUNDS, compare, describe, is_within, run_files


if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .graph import ExportedEncoder

    Pictures = Callable[[int], Sequence[Image.Image]]  # side of a tile in pixels -> pictures
    Outputs = dict[str, dict[str, torch.Tensor]]  # input -> output -> (tiles, tokens, width)


def photograph(size: int) -> "list[Image.Image]":
    """Return the photograph that comes with the package."""
    from PIL import Image

    with Image.open(IMAGE) as file:
        return [file.convert("RGB")]


@dataclass
class Reference:
    """What torch computes in float32 for the test image and for pictures."""

    pixel_values: "dict[str, torch.Tensor]"  # input -> (tiles, 3, S, S)
    outputs: "Outputs"  # input -> output -> (tiles, tokens, width)
    pictures: list[str]  # the inputs that int8 is compared on

    @classmethod
    def compute(cls, encoder: "ExportedEncoder", folder: Path, pictures: "Pictures | None") -> "Reference":
        """Run an encoder on what the image processor of a folder makes of the pictures."""
        import torch

        from ..encode.load import load_processor
        from .run_folder import ONE, SEVERAL

        size = encoder.model.config.image_size
        processor, (test,) = load_processor(str(folder), size), photograph(size)
        tilings = {"one tile": ONE, "several tiles": SEVERAL}
        tiles = {name: processor(test, **tiling)["pixel_values"] for name, tiling in tilings.items()}
        chosen = {f"picture {index}": picture for index, picture in enumerate(pictures(size) if pictures else ())}
        tiles |= {name: processor(picture, **ONE)["pixel_values"] for name, picture in chosen.items()}
        with torch.inference_mode():
            outputs = {
                name: dict(zip(encoder.output_names, encoder(pixel_values), strict=True))
                for name, pixel_values in tiles.items()
            }
        return cls(tiles, outputs, [*chosen])

    def of(self, dtype: str) -> "Outputs":
        """Return the outputs that a file of a dtype is compared with."""
        return {name: outputs for name, outputs in self.outputs.items() if (name in self.pictures) == (dtype == "int8")}


def verify_files(
    folder: Path, reference: Reference, log: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """
    Run a folder in a clean process and compare it with the reference; return file -> its bytes and figure.

    Raises:
        VerificationError: It does not run there, makes other tiles, or a file exceeds its bound.
        OSError: The temporary folder is full.
    """
    import torch

    from ..encode.write import save_safetensors

    with tempfile.TemporaryDirectory() as scratch:
        pictures = {name: reference.pixel_values[name].contiguous() for name in reference.pictures}
        if pictures:
            save_safetensors(pictures, Path(scratch, "inputs"))
        tiles, outputs = run_files(folder, Path(scratch, "inputs") if pictures else None)
    if wrong := [name for name, expected in reference.pixel_values.items() if not torch.equal(tiles[name], expected)]:
        raise VerificationError(f"the folder's image processor makes other tiles of the test image: {wrong[0]}")
    figures: dict[str, dict[str, Any]] = {}
    for dtype, ours in outputs.items():
        figure = compare(dtype, ours, reference.of(dtype))
        expected = f"expected {'at least' if dtype == 'int8' else 'at most'} {BOUNDS[dtype]}"
        if not is_within(dtype, figure):
            raise VerificationError(f"{FOLDER}/{FILES[dtype]}: {describe(dtype, figure)} to torch's, {expected}")
        nbytes = sum(path.stat().st_size for path in (folder / FOLDER).glob(f"{FILES[dtype]}*"))
        figures[f"{FOLDER}/{FILES[dtype]}"] = {"bytes": nbytes, **figure, "bound": BOUNDS[dtype]}
        log(f"{FOLDER}/{FILES[dtype]}: {describe(dtype, figure)} to torch's, {expected}")
    return figures
