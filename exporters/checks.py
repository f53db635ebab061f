# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What the files of an ONNX folder compute in a clean process, compared with a reference or with one another."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.storage.errors import Problem, VerificationError
from ..convert.storage.files import hash_file, read_json
from ..convert.storage.sources import PROVENANCE, LocalFolder
from ..convert.verify.outputs import relative_difference, run_in_clean_process
from ..encode.onnx_model import FILES, onnx_files


if TYPE_CHECKING:
    import torch

    Outputs = Mapping[str, torch.Tensor]  # output -> (tiles, tokens, width)

SCRIPT = Path(__file__).with_name("run_folder.py")
# Largest relative difference of an output from torch's in float32, or smallest cosine of a token and torch's.
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "int8": 0.98}
WORD = {dtype: "cosine" if dtype == "int8" else "relative_difference" for dtype in FILES}


def run_files(
    folder: Path, inputs: Path | None = None
) -> "tuple[dict[str, torch.Tensor], dict[str, dict[str, Outputs]]]":
    """
    Run all files of a folder; return the pixel_values of every input, and dtype -> input -> outputs.

    Args:
        inputs: A safetensors file of pixel_values by name, besides those of the test image.

    Raises:
        VerificationError: They do not load or run.
    """
    tensors = run_in_clean_process(folder, script=SCRIPT, inputs=inputs and str(inputs))
    pixel_values = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    outputs: dict[str, dict[str, Any]] = {
        dtype: {name: {} for name in pixel_values} for dtype in onnx_files(LocalFolder(folder))
    }
    dtypes = {name: dtype for dtype, name in FILES.items()}
    for key in tensors.keys() - pixel_values.keys():
        file, name, output = key.split(":")
        if file in dtypes:
            outputs[dtypes[file]][name][output] = tensors[key]
    return pixel_values, outputs


def compare(dtype: str, ours: "Mapping[str, Outputs]", reference: "Mapping[str, Outputs]") -> dict[str, float]:
    """
    Return the figure of a file that BOUNDS is about, with its name in WORD; the worst of all outputs for some inputs,
    NaN if one is.

    Args:
        dtype: Of the file, a key of BOUNDS.
        ours, reference: Input -> outputs, the same ones.
    """
    pairs = [
        (ours[name][output], expected) for name, all_of in reference.items() for output, expected in all_of.items()
    ]
    import torch

    measure, worst = (_smallest_cosine, torch.amin) if dtype == "int8" else (relative_difference, torch.amax)
    values = torch.tensor([measure(*pair) for pair in pairs], dtype=torch.float64)
    return {WORD[dtype]: worst(values).item()}


def _smallest_cosine(ours: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Of a token and its reference, over the last dimension; NaN where one is."""
    import torch

    return torch.cosine_similarity(ours.double(), reference.double(), dim=-1).min().item()


def is_within(dtype: str, figure: Mapping[str, float]) -> bool:
    """Return whether a figure keeps to its bound, which NaN does not."""
    value = figure[WORD[dtype]]
    return value >= BOUNDS[dtype] if dtype == "int8" else value <= BOUNDS[dtype]


def onnx_problems(folder: Path, log: Callable[[str], None]) -> Iterator[Problem]:
    """Yield what blocks publishing an ONNX folder: files other than recorded, that do not run, or that disagree."""
    record = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    if not record.get("verification"):
        yield Problem("tokens", PROVENANCE, "this conversion was not verified: convert again without --no-verify")
    recorded = record.get("files") or {}
    for path in sorted((folder / "onnx").iterdir()):
        name = f"onnx/{path.name}"
        if recorded.get(name, {}).get("sha256") != hash_file(path):
            yield Problem("sha256", name, f"not the file that {PROVENANCE} records: convert again")
    try:
        _, outputs = run_files(folder)
    except VerificationError as error:
        yield Problem("load", "onnxruntime", f"{error}: fix that, or convert again")
        return
    if not outputs:
        known = ", ".join(FILES.values())
        yield Problem("load", "onnx", f"expected one of {known}, got none: convert again, or remove the folder")
        return
    first = next(iter(outputs))  # the most precise; compared with itself it shows NaN
    for dtype, ours in outputs.items():
        figure = compare(dtype, ours, outputs[first])
        what = f"{describe(dtype, figure)} to {FILES[first]} on a photograph"
        # The bound of int8 is about the pictures that the conversion was verified on.
        if is_within(dtype, figure) or (dtype == "int8" and not math.isnan(figure["cosine"])):
            log(f"onnxruntime runs onnx/{FILES[dtype]} in a clean process: {what}")
        else:
            yield Problem("tokens", f"onnx/{FILES[dtype]}", f"{what}, expected {BOUNDS[dtype]}: convert again")


def describe(dtype: str, figure: Mapping[str, float]) -> str:
    """Return a figure in words."""
    value = figure[WORD[dtype]]
    return f"smallest cosine of a token {value:.4f}" if dtype == "int8" else f"relative difference {value:.1e}"
