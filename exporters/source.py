# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What is exported: the checks of a source and of the installed packages, and the encoder that torch exports."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.detect import AIMV2, SAILVL, detect
from ..convert.models.sailvl_config import build_meta_model, read_config
from ..convert.storage.checkpoint import Checkpoint
from ..convert.storage.errors import CheckpointError
from ..encode.onnx_model import FILES, NEEDED, explain


if TYPE_CHECKING:
    from .graph import ExportedEncoder

NEEDED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_installed() -> None:
    """Raise ImportError if a package is missing, CheckpointError if onnxruntime is too old for what is written."""
    if missing := [name for name in NEEDED_PACKAGES if find_spec(name) is None]:
        raise ImportError(f"--to-layout onnx needs {', '.join(missing)}: " + NEEDED.partition(": ")[2])
    import onnxruntime
    from onnx import TensorProto, helper

    from .graph import IR_VERSION, OPSET

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "trial", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no other base
        what = f"opset {OPSET}, IR version {IR_VERSION}: {explain(error, onnxruntime.__version__)}"
        raise CheckpointError(f"--to-layout onnx: {what}") from error


def check_dtypes(dtypes: Sequence[str]) -> list[str]:
    """Return the dtypes without repetition, the most precise first."""
    if wrong := [dtype for dtype in dtypes if dtype not in FILES]:
        raise CheckpointError(f"dtype: expected one of {', '.join(FILES)} for ONNX, got {wrong[0]!r}: correct it")
    return [dtype for dtype in FILES if dtype in dtypes]


def check_source(checkpoint: Checkpoint, part: str | None, with_connector: bool) -> None:
    """Raise CheckpointError unless the source is an encoder, or a SAIL-VL of which that part is asked."""
    source, whole = checkpoint.source.name, detect(checkpoint)
    if part not in (None, "vision"):
        fix = "the language model is exported by optimum and llama.cpp; --with-connector adds the connector"
        raise CheckpointError(f"{source}: --part: expected vision for ONNX, got {part}: {fix}")
    if whole is SAILVL and part is None:
        raise CheckpointError(f"{source}: a SAIL-VL, of which ONNX has the vision encoder: add --part vision")
    if with_connector and whole is not SAILVL:
        raise CheckpointError(f"{source}: --with-connector: expected a SAIL-VL, which has a connector: leave it out")
    if with_connector and (layer := read_config(checkpoint).select_layer) != -1:
        raise CheckpointError(f"{source}: --with-connector: expected select_layer -1 in config.json, got {layer}")
    found = detect(checkpoint, "vision")
    if found not in (AIMV2, None):
        fix = "optimum exports encoders of transformers"
        raise CheckpointError(f"{source}: expected a SAILViT or AIMv2 for ONNX, got {found.title}: {fix}")
    named = checkpoint.document("config.json").get("architectures")
    for name in named if isinstance(named, list) else []:
        if str(name).endswith(("ForImageClassification", "Backbone")):
            what = f"expected an encoder for ONNX (SAILViTModel), got {name} in config.json"
            raise CheckpointError(f"{source}: {what}: `sailvit convert SRC ENCODER` writes its encoder")


def load_encoder(folder: Path, connected: Checkpoint | None = None) -> "ExportedEncoder":
    """
    Return the encoder of a SAILViT folder in float32, as ONNX files have it.

    Args:
        connected: The SAIL-VL whose connector is in `folder`/connector.

    Raises:
        CheckpointError: The pixel shuffle factor does not divide its grid.
    """
    from safetensors.torch import load_file

    from ..encode.load import load_tower
    from .graph import ExportedEncoder

    model, connector = load_tower(str(folder), "cpu", "float32"), None
    config = model.config
    if config.grid_size % config.pixel_shuffle_factor:
        what = f"a grid of {config.grid_size} x {config.grid_size} patches"
        fix = f"expected a multiple of {config.pixel_shuffle_factor * config.patch_size} pixels: correct --image-size"
        raise CheckpointError(
            f"{what}, which the pixel shuffle factor {config.pixel_shuffle_factor} does not divide: {fix}"
        )
    if connected:
        connector = build_meta_model(read_config(connected), connected.source.name).mlp1
        path = folder / "connector" / "model.safetensors"
        tensors = {name.removeprefix("mlp1."): tensor for name, tensor in load_file(path).items()}
        connector.load_state_dict(tensors, strict=True, assign=True)
    return ExportedEncoder(model, connector)
