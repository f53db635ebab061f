# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Run the files of an ONNX folder in onnxruntime on a CPU, in a clean process where the package that wrote them is not
imported, and save their outputs. convert/verify/outputs.py runs this script.

Its argument is JSON: folder, image, out; inputs, None or a safetensors file of pixel_values by name.

What is saved: NAME, the pixel_values of an input, and FILE:NAME:OUTPUT of every file. The inputs are those that are
given and, by the folder's own image processor, the image as one tile and as several (ONE, SEVERAL).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file


PACKAGE = "sailvit"
ONE, SEVERAL = {"do_tile": False}, {"do_tile": True, "min_tiles": 2, "max_tiles": 2, "use_thumbnail": True}
Arrays = dict[str, np.ndarray]


def main() -> None:
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    folder = Path(options.folder)
    inputs = read_image(folder, options.image) | (load_file(options.inputs) if options.inputs else {})
    outputs = dict(inputs)
    for path in sorted(folder.glob("onnx/*.onnx")):
        for name, arrays in run(path, inputs).items():
            outputs |= {f"{path.name}:{name}:{output}": array for output, array in arrays.items()}
    if any(name.split(".")[0] == PACKAGE for name in sys.modules):
        raise SystemExit(f"the folder's code imports the package {PACKAGE}, which others do not have")
    save_file({name: np.ascontiguousarray(array) for name, array in outputs.items()}, options.out)


def read_image(folder: Path, image: str) -> Arrays:
    """Return the pixel_values of the image as one tile and as several."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with Image.open(image) as file:
        picture = file.convert("RGB")
    tilings = {"one tile": ONE, "several tiles": SEVERAL}
    return {name: processor(picture, return_tensors="np", **tiling)["pixel_values"] for name, tiling in tilings.items()}


def run(path: Path, inputs: Arrays) -> dict[str, Arrays]:
    """Return input -> output -> array of one file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        name: dict(zip(names, session.run(names, {"pixel_values": pixel_values}), strict=True))
        for name, pixel_values in inputs.items()
    }


if __name__ == "__main__":
    main()
