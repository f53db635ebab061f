"""
Vision encoders of any library, and their preprocessing.

`load_encoder` takes a folder or Hub name that AutoModel loads (sailvit, aimv2_vision_model, internvl_vision, dinov2,
siglip, clip, ...), AIMv2 as Apple publishes it, the vision part of a multimodal model, or `timm:NAME`. An encoder
returns the mean over the patch tokens of chosen blocks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from ..convert.storage.files import first_line
from ..devices import choose_device, choose_dtype, dtype_name
from .models import (
    check_source,
    explained_errors,
    import_timm,
    is_timm,
    load_timm,
    load_transformers,
    needed_names,
    read_config,
    timm_name,
)
from .versions import library_versions


LAST = "last"  # the encoder's output: the last block, after the encoder's final norm
ONE_TILE = ("do_tile", "crop_to_patches", "do_image_splitting")  # options of image processors, False for one tile
TRIAL_SIZE = (640, 480)  # pixels of the image that finds out the shapes
Log = Callable[[str], None]


@dataclass(frozen=True)
class Preprocessing:
    """Turns an RGB image into pixels (3, H, W); `settings` is all that the pixels depend on besides the image."""

    name: str
    transform: Callable[[Image.Image], torch.Tensor]
    settings: Mapping[str, Any]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)


@dataclass
class Encoder:
    """A frozen vision encoder in evaluation mode, with its preprocessing."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    layers: tuple[int | str, ...]  # numbers of blocks, from 1, or LAST
    device: torch.device
    dtype: torch.dtype
    prefix_tokens: int  # class and register tokens, which precede the patch tokens
    keeps_prefix: bool  # whether they are averaged, too
    pixel_shape: tuple[int, int, int]  # 3, H, W
    width: int  # of a feature vector
    weights_hash: str  # sha256 of names, shapes and values
    config: Mapping[str, Any]

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the averaged tokens (B, layers, D) of pixels (B, 3, H, W), in float32 on the encoder's device."""
        skipped = 0 if self.keeps_prefix else self.prefix_tokens
        tokens = _tokens(self.model, pixels.to(self.device, self.dtype), self.layers)
        return torch.stack([one[:, skipped:].float().mean(1) for one in tokens], dim=1)

    @torch.inference_mode()
    def patch_tokens(self, pixels: torch.Tensor, layers: Sequence[int | str]) -> list[torch.Tensor]:
        """Return the tokens (B, N, D) of layers, one for each patch, in float32 on the CPU, of pixels (B, 3, H, W)."""
        tokens = _tokens(self.model, pixels.to(self.device, self.dtype), layers)
        return [one[:, self.prefix_tokens :].float().cpu() for one in tokens]

    def describe(self) -> dict[str, Any]:
        """Return all that the features depend on besides the images, for the cache and for results.json."""
        return {
            "weights_sha256": self.weights_hash,
            "config": dict(self.config),
            "preprocessing": dict(self.preprocessing.settings),
            "layers": list(self.layers),
            "dtype": dtype_name(self.dtype),
            "device": self.device.type,
            "prefix_tokens": self.prefix_tokens,
            "averages_prefix_tokens": self.keeps_prefix,
            "versions": {"sailvit": version("sailvit"), **library_versions()},
        }


def load_encoder(
    name: str,
    layers: Sequence[int | str] = (LAST,),
    preprocessing: str | None = None,
    keeps_prefix: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    log: Log = lambda line: None,
) -> Encoder:
    """
    Return a frozen encoder.

    Args:
        name: A folder, a name on the Hub, or `timm:NAME`.
        layers: Numbers of blocks, from 1 or, backwards, from -1, or "last".
        preprocessing: The encoder whose preprocessing is used; None for its own.
        keeps_prefix: Average class and register tokens, too.
        device: To run on; None for a GPU if there is one.
        dtype: To compute in; "auto" for the choice of `choose_dtype`.
        log: Called with each message.

    Raises:
        ValueError: There is no such model, it is no image model, weights are missing, it has no such block, or it does
            not take the pixels.
    """
    device = choose_device(device)
    model, config = _load_model(name, log)
    weights_hash = _hash_weights(model)
    compute_dtype, reason = choose_dtype(next(model.parameters()).dtype, device, dtype)
    model = model.to(device, compute_dtype).eval().requires_grad_(False)
    chosen = load_preprocessing(preprocessing or name)
    layers = _checked_layers(name, model, layers)
    shape, prefix, width = _try(name, model, chosen, layers, device, compute_dtype)
    averaged = f"mean of {'all' if keeps_prefix or not prefix else 'patch'} tokens"
    if keeps_prefix and not prefix:
        log(f"{name}: no class or register tokens to average: --class-token changes nothing")
    dropped = f", without {prefix} class and register tokens" if prefix and not keeps_prefix else ""
    log(f"{name}: {averaged}{dropped}; {width} features; {shape[1]} x {shape[2]} pixels")
    log(f"{name}: runs on {device} in {dtype_name(compute_dtype)}: {reason}")
    return Encoder(
        name, model, chosen, layers, device, compute_dtype, prefix, keeps_prefix, shape, width, weights_hash, config
    )


def stored_dtype(name: str) -> torch.dtype:
    """Return the dtype of the weights of an encoder, which is loaded for it. Raises as `load_encoder`."""
    model, _ = _load_model(name, lambda line: None)
    return next(model.parameters()).dtype


def _load_model(name: str, log: Log) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model on the CPU, and what its tokens depend on besides weights."""
    if is_timm(name):
        return load_timm(name)
    model = load_transformers(name, read_config(name), log)
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map", "architectures")
    return model, {key: value for key, value in sorted(model.config.to_dict().items()) if key not in ignored}


def _hash_weights(model: nn.Module) -> str:
    """Return a hash of the weights that tokens depend on: a head that a checkpoint lacks is random in every process."""
    digest, weights = hashlib.sha256(), model.state_dict()
    for key in sorted(weights) if _is_timms(model) else needed_names(weights):
        tensor = weights[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# preprocessing


class _OneTile:
    """An image processor of transformers that returns one tile for each image."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.options = {name: False for name in ONE_TILE if hasattr(processor, name)}

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor(image, return_tensors="pt", **self.options)["pixel_values"]
        if pixels.ndim < 4 or pixels.shape[:-3].numel() != 1:
            raise ValueError(
                f"the image processor returns pixels of shape {tuple(pixels.shape)}, expected one tile, (1, 3, H, W): "
                "give --preprocessing NAME of an encoder that makes one"
            )
        return pixels.reshape(pixels.shape[-3:])


def load_preprocessing(name: str) -> Preprocessing:
    """
    Return the preprocessing of an encoder: transformers' image processor without tiling, or timm's transform.

    Raises:
        ValueError: The folder or Hub name has none.
    """
    if is_timm(name):
        timm = import_timm()
        with explained_errors(name, "timm cannot build it"):
            model = timm.create_model(timm_name(name), pretrained=False, num_classes=0)
        settings = timm.data.resolve_model_data_config(model)
        return Preprocessing(name, timm.data.create_transform(**settings, is_training=False), _as_json(settings))
    check_source(name)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # transformers' line is three sentences
        what = "no preprocessor_config.json" + ("" if Path(name).is_dir() else ", or it cannot be downloaded")
        if Path(name, "preprocessor_config.json").is_file():
            what = f"preprocessor_config.json cannot be used: {first_line(error).split('. ')[0]}"
        raise ValueError(f"{name}: {what}: give --preprocessing NAME of an encoder that has one") from error
    settings = {"class": type(processor).__name__, **processor.to_dict()}
    return Preprocessing(name, _OneTile(processor), _as_json(settings))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings), sort_keys=True, default=str))


# tokens


def _is_timms(model: nn.Module) -> bool:
    return hasattr(model, "forward_features")


def blocks_of(model: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """Return the blocks of a plain vision transformer; None for other models."""
    if _is_timms(model):
        blocks = getattr(model, "blocks", None)
        return blocks if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else None
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count and len({*map(type, m)}) == 1
    ]
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def _checked_layers(name: str, model: nn.Module, layers: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return the layers, counted from 1."""
    blocks, checked = blocks_of(model), []
    for layer in layers:
        if layer != LAST and blocks is None:
            raise ValueError(f"{name}: {type(model).__name__} is no plain transformer: --layers can only be {LAST}")
        if layer != LAST and not 1 <= abs(int(layer)) <= len(blocks):
            raise ValueError(f"{name}: expected --layers from 1 to {len(blocks)}, or {LAST}, got {layer}")
        checked.append(layer if layer == LAST else int(layer) % (len(blocks) + 1))
    if len({*checked}) < len(checked):
        raise ValueError(f"{name}: --layers names a block twice: {', '.join(map(str, layers))}")
    return tuple(checked)


def _tokens(model: nn.Module, pixels: torch.Tensor, layers: Sequence[int | str]) -> list[torch.Tensor]:
    """Return the tokens (B, N, D) of layers; those of blocks are not normalised by the encoder's final norm."""
    found: dict[int | str, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[number] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    blocks = blocks_of(model)
    handles = [blocks[number - 1].register_forward_hook(keep(number)) for number in layers if number != LAST]
    try:
        output = model.forward_features(pixels) if _is_timms(model) else model(pixel_values=pixels).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [_as_tokens(model, output if layer == LAST else found[layer]) for layer in layers]


def _as_tokens(model: nn.Module, output: torch.Tensor) -> torch.Tensor:
    if output.ndim == 4:  # a feature map of a convolutional or hierarchical encoder
        width = getattr(model, "num_features", output.shape[1])
        return output.flatten(1, 2) if output.shape[-1] == width else output.flatten(2).transpose(1, 2)
    return output


def _try(
    name: str, model: nn.Module, preprocessing: Preprocessing, layers: Sequence[int | str], device: torch.device,
    dtype: torch.dtype,
) -> tuple[tuple[int, int, int], int, int]:  # fmt: skip
    """Run one image; return the shape of pixels, the number of prefix tokens, and the width."""
    try:
        pixels = preprocessing(Image.new("RGB", TRIAL_SIZE, (128, 128, 128)))
        with torch.inference_mode():
            tokens = _tokens(model, pixels[None].to(device, dtype), layers)
    except (RuntimeError, ValueError, AttributeError, TypeError, AssertionError) as error:
        where = "" if preprocessing.name == name else f" with the preprocessing of {preprocessing.name}"
        raise ValueError(f"{name}: cannot encode an image{where}: {first_line(error)}") from error
    if any(one.ndim != 3 for one in tokens) or len({one.shape for one in tokens}) > 1:
        raise ValueError(f"{name}: expected tokens (B, N, D) of one shape, got {[tuple(one.shape) for one in tokens]}")
    return tuple(pixels.shape), _count_prefix(model, pixels, tokens[0].shape[1]), tokens[0].shape[2]


def _count_prefix(model: nn.Module, pixels: torch.Tensor, tokens: int) -> int:
    """Return the number of tokens that are no patches: class and register tokens."""
    if hasattr(model, "num_prefix_tokens"):  # timm
        return model.num_prefix_tokens
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if patch is None:
        return 0
    height, width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    patches = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    return max(tokens - patches, 0)
