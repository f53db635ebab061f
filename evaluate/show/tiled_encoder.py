"""Loading a vision encoder of any kind, alone or from a multimodal folder, with the processor that cuts its tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import ImageProcessingMixin

from ...devices import choose_device, choose_dtype, dtype_name
from ...image_processing_sailvit import SAILViTImageProcessor
from ..models import is_timm, load_transformers, read_config


# Of folders whose encoder is not that of a SAIL-VL: the image is one tile, as the encoder was trained.
ONE_TILE = {"max_tiles": 1}


@dataclass(frozen=True)
class TiledEncoder:
    """
    A vision encoder that turns tiles into one token per patch.

    Attributes:
        name: Folder or name on the Hub, without the path.
        model: In evaluation mode, on its device.
        processor: Cuts an image into tiles of the encoder's size.
        layer: -1 for tokens after the final norm, any other value is an index into the hidden states.
    """

    name: str
    model: PreTrainedModel
    processor: SAILViTImageProcessor
    layer: int

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of the patch grid of a tile."""
        size, patch = _pair(self.model.config.image_size), _pair(self.model.config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]

    @property
    def blocks(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """
        Return one token per patch (T, N, D), float32 on the CPU, without class token and registers.

        Args:
            tiles: (T, 3, height, width), as the processor returns them.

        Raises:
            ValueError: The model has fewer tokens than patches.
        """
        tiles = tiles.to(self.model.device, self.model.dtype)
        output = self.model(pixel_values=tiles, output_hidden_states=self.layer != -1)
        tokens = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        count = self.patches[0] * self.patches[1]
        if tokens.ndim != 3 or tokens.shape[1] < count:
            got = " x ".join(map(str, tokens.shape[1:]))
            raise ValueError(f"{self.name}: expected at least {count} tokens per tile, one for each patch, got {got}")
        return tokens[:, tokens.shape[1] - count :].float().cpu()


def load_tiled_encoder(
    path: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    layer: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    **image_options: Any,
) -> TiledEncoder:
    """
    Return the vision encoder of a folder or Hub name, any that AutoModel loads, or the vision part of a SAIL-VL or
    another multimodal model, whose language model is not read.

    Args:
        path: The folder, or the name on the Hub.
        device: To run on; None for a GPU if there is one.
        dtype: To compute in; "auto" for the choice of `choose_dtype`.
        layer: Which tokens: -1 after the final norm, any other value is an index into the hidden states. None for the
            input of the connector of a SAIL-VL, else -1.
        log: Called with each progress message.
        image_options: Options of SAILViTImageProcessor that replace those of the folder.

    Raises:
        ValueError: It is no vision encoder of transformers, weights are missing, or an option is wrong; the message
            names them.
    """
    device = choose_device(device)
    if is_timm(path):
        raise ValueError(
            f"{path}: a model of timm: expected a vision encoder or multimodal model of transformers; `sailvit probe` "
            "takes timm models"
        )
    config = read_config(path)
    vision = getattr(config, "vision_config", config)
    _check_config(path, vision)
    layer = getattr(config, "select_layer", -1) if layer is None else layer
    if not -(vision.num_hidden_layers + 1) <= layer <= vision.num_hidden_layers:
        raise ValueError(f"layer {layer}: expected -1, or 0 to {vision.num_hidden_layers} (0: the embeddings)")
    processor = _load_processor(path, vision, log, **image_options)
    model = load_transformers(path, config, log)
    compute_dtype, reason = choose_dtype(model.dtype, device, dtype)
    log(f"runs on {device} in {dtype_name(compute_dtype)}: {reason}")
    return TiledEncoder(Path(path).name, model.to(device, compute_dtype).eval(), processor, layer)


def _check_config(path: str, config: PretrainedConfig) -> None:
    kinds = dict.fromkeys(("image_size", "patch_size"), (int, list, tuple))
    kinds |= {"num_hidden_layers": int, "num_attention_heads": int}
    if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(config, name, None), kind)]:
        what = f"model_type {config.model_type!r} without one {', '.join(wrong)}"
        raise ValueError(f"{path}: {what}: expected a vision encoder of one token per patch, or a model that has one")


def _load_processor(
    path: str, config: PretrainedConfig, log: Callable[[str], None], **options: Any
) -> SAILViTImageProcessor:
    """
    Return the processor of a SAILViT or SAIL-VL; for another encoder one of ours, with its mean and standard deviation.
    """
    height, width = _pair(config.image_size)
    options = {"msac": False, **{name: value for name, value in options.items() if value is not None}}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        log("no preprocessor_config.json: mean and standard deviation of ImageNet, as in SAIL-VL")
        settings = {}
    known = SAILViTImageProcessor.valid_kwargs.__annotations__.keys()
    if "max_tiles" in settings or config.model_type == "sailvit":
        own = {name: value for name, value in settings.items() if name in known - {"size"}}
    else:
        own = ONE_TILE | {name: settings[name] for name in ("image_mean", "image_std") if settings.get(name)}
    return SAILViTImageProcessor(**{**own, "size": {"height": height, "width": width}, **options})


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or as a pair."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width
