"""Loading a SAILViT folder to encode with: its config, image processor and model."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor

from ..configuration_sailvit import SAILViTConfig
from ..convert.storage.sources import check_name, open_folder, weight_files
from ..devices import choose_device, choose_dtype, dtype_name
from ..image_processing_sailvit import SAILViTImageProcessor
from ..modeling_sailvit import SAILViTModel
from .onnx_model import OnnxEncoder, load_onnx, onnx_files


def load_config(path: str) -> SAILViTConfig:
    """
    Return the config of a SAILViT folder or Hub name.

    Raises:
        ValueError: There is no such folder, or its model_type is another; the message names it.
    """
    check_name(path)
    if not Path(path).exists():
        open_folder(path)  # one request; transformers would retry for half a minute if the Hub is unreachable
    if Path(path).is_file():
        raise ValueError(f"{path}: expected a SAILViT folder, got a file: convert it with `sailvit convert`")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "sailvit":
        fix = "convert it with `sailvit convert` (--part vision for a SAIL-VL)"
        raise ValueError(f"{path}: expected model_type 'sailvit', got {config.model_type!r}: {fix}")
    return config


def load_processor(path: str, image_size: int, options: Iterable[tuple[str, Any]] = ()) -> SAILViTImageProcessor:
    """
    Return the image processor of a SAILViT folder or Hub name.

    Args:
        path: The folder, or the name on the Hub.
        image_size: Of the model, in pixels.
        options: (name, value) of options that override those in preprocessor_config.json.

    Raises:
        ValueError: There is no such option, it is given twice, or its value is wrong; or tiles differ from
            `image_size`.
    """
    processor = AutoImageProcessor.from_pretrained(path, **_checked_options(options))
    height, width = processor.size["height"], processor.size["width"]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"{path}: expected tiles of {image_size} x {image_size} pixels (image_size in config.json), got {height} x "
            f"{width}: correct size in preprocessor_config.json, or remove --image-option size"
        )
    return processor


def _checked_options(options: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    valid = SAILViTImageProcessor.valid_kwargs.__annotations__.keys() - {"device", "return_tensors"}
    checked: dict[str, Any] = {}
    for name, value in options:
        if name not in valid:
            try:
                SAILViTImageProcessor.check_option_names({name: None})
            except TypeError as error:
                raise ValueError(f"--image-option: {error}") from error
            raise ValueError(f"--image-option: expected one of {', '.join(sorted(valid))}, got {name[:80]!r}")
        if name in checked:
            raise ValueError(f"{name} is given twice")
        checked[name] = value
    return checked


def load_encoder(
    path: str,
    device: str | None = None,
    dtype: str = "auto",
    log: Callable[[str], None] = lambda line: None,
) -> SAILViTModel | OnnxEncoder:
    """
    Return what encode_images runs: a vision tower, or a session if there are ONNX files and no weights for torch; see
    load_tower, load_onnx.
    """
    load_config(path)
    source = open_folder(path)
    load = load_onnx if onnx_files(source) and not weight_files(source) else load_tower
    return load(path, device, dtype, log)


def load_tower(
    path: str,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype = "auto",
    log: Callable[[str], None] = lambda line: None,
) -> SAILViTModel:
    """
    Return a vision tower in evaluation mode, loaded strictly; the head of a classifier is ignored.

    Args:
        path: The folder, or the name on the Hub.
        device: To run on; None for a GPU if there is one.
        dtype: To compute in; "auto" for the choice of `choose_dtype` for the stored dtype and the device.
        log: Called with each progress message.

    Raises:
        ValueError: It is no SAILViT, the device cannot be used, or weights are missing, unexpected or of another shape;
            the message names them.
    """
    load_config(path)
    device = choose_device(device)
    try:
        model, report = SAILViTModel.from_pretrained(
            path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: the weights are truncated or corrupt, download them again: {error}") from error
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith("classifier.")]
    wrong = {"missing": report["missing_keys"], "mismatched": report["mismatched_keys"], "unexpected": unexpected}
    for kind, names in wrong.items():
        if names:
            raise ValueError(f"{path}: {kind} keys in the checkpoint: {', '.join(map(str, names))}")
    compute_dtype, reason = choose_dtype(model.dtype, device, dtype)
    log(f"runs on {device} in {dtype_name(compute_dtype)}: {reason}")
    return model.to(device, compute_dtype).eval()
