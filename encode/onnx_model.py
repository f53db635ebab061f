# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The encoder of an ONNX folder, run by onnxruntime."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.storage.sources import Source, open_folder


if TYPE_CHECKING:
    import onnxruntime
    import torch

FOLDER = "onnx"
# Dtype of the weights -> name in FOLDER, as onnx-community and transformers.js have them.
FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
# Devices of --device -> execution provider, the preferred one first.
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
NEEDED = 'onnxruntime is not installed: pip install "sailvit[onnx]"'
TOO_OLD = ("opset", "IR version")  # in onnxruntime's messages about files newer than itself


def onnx_files(source: Source) -> dict[str, str]:
    """Return dtype -> name of the file in an ONNX folder or repository; empty if it is none."""
    names = {dtype: f"{FOLDER}/{name}" for dtype, name in FILES.items()}
    return {dtype: name for dtype, name in names.items() if name in source.files}


class OnnxEncoder:
    """
    A session of onnxruntime with what encode_images takes of SAILViTModel.

    In int8 a call has one scale for all of its activations: there it runs tile by tile, so that the tokens of a tile do
    not depend on the others.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", is_int8: bool = False):
        import torch

        self.session, self.device = session, torch.device("cpu")  # of the tiles; the session moves them itself
        self.is_int8 = is_int8

    def get_image_features(self, pixel_values: "torch.Tensor") -> "torch.Tensor":
        """Return pixel-shuffled tokens (tiles, N / f^2, f^2 * D), float32, of pixel_values (tiles, 3, S, S)."""
        import torch

        batches = pixel_values.float().split(1 if self.is_int8 else len(pixel_values))
        features = [self.session.run(["image_features"], {"pixel_values": tiles.numpy()})[0] for tiles in batches]
        return torch.cat([torch.from_numpy(batch) for batch in features])


def load_onnx(
    folder: str | Path, device: str | None = None, dtype: str = "auto", log: Callable[[str], None] = lambda line: None
) -> OnnxEncoder:
    """
    Return the encoder of an ONNX folder.

    Args:
        folder: Or the name of a repository on the Hub, of which one file is downloaded, with its external data.
        device: A key of PROVIDERS; None for the first that the installed onnxruntime has.
        dtype: A key of FILES; "auto" for the most precise file.
        log: Called with each progress message.

    Raises:
        ValueError: The folder has no such file, onnxruntime no such device, or it does not load the file or start the
            device.
        ImportError: onnxruntime is not installed.
    """
    source = open_folder(str(folder))
    files = onnx_files(source)
    chosen = next(iter(files), dtype) if dtype == "auto" else dtype
    if chosen not in files:
        has = " and ".join(f"{other} ({FILES[other]})" for other in files)
        raise ValueError(f"{folder}: expected one of its ONNX files, {has}, got dtype {dtype}: correct --dtype")
    path, data = source.path(files[chosen]), f"{files[chosen]}_data"
    if data in source.files:
        source.path(data)  # onnxruntime looks for it next to the other
    session = open_session(path, device)
    log(f"runs {FILES[chosen]} ({chosen}) in onnxruntime, by its {session.get_providers()[0]}")
    return OnnxEncoder(session, chosen == "int8")


def open_session(path: Path, device: str | None = None) -> "onnxruntime.InferenceSession":
    """Return a session with as many threads as torch; arguments and errors as of load_onnx."""
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path}: {NEEDED}") from error
    installed = [name for name, provider in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    if device not in (None, *installed):
        fix = "leave --device out, or install the onnxruntime for it"
        raise ValueError(f"{path}: expected a device of onnxruntime, {', '.join(installed)}, got {device!r}: {fix}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = dict.fromkeys([PROVIDERS[device or installed[0]], PROVIDERS["cpu"]])
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[*providers])
    except Exception as error:  # onnxruntime's have no other base
        what = explain(error, onnxruntime.__version__)
        raise ValueError(f"{path}: {what}") from error
    if device and (first := session.get_providers()[0]) != PROVIDERS[device]:  # a provider that fails is left out
        fix = "install what it needs (onnxruntime has printed it), or leave --device out"
        raise ValueError(f"{path}: expected onnxruntime to run on {device}, got its {first}: {fix}")
    return session


def explain(error: Exception, version: str) -> str:
    """Return why this version of onnxruntime did not load a file, and the fix, in one line."""
    reason = " ".join(str(error).split())
    if any(word in reason for word in TOO_OLD):
        return f"onnxruntime {version} is too old for this file: pip install -U onnxruntime"
    return f"onnxruntime {version} does not load it: download or convert it again: {reason[:200]}"
