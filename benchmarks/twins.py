"""Reference models: transformers' Aimv2VisionModel and timm's AIMv2 with the weights of a SAILViTModel."""

import timm
import torch
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from sailvit.convert import convert_tensors
from sailvit.convert.export.runtimes import timm_config, transformers_config


def native_twin(tower: nn.Module, attn_implementation: str = "sdpa") -> Aimv2VisionModel:
    """Return transformers' model with the weights of `tower` (a SAILViTModel), in its dtype, in evaluation mode."""
    config = transformers_config(vars(tower.config))
    twin = Aimv2VisionModel(Aimv2VisionConfig(**config, attn_implementation=attn_implementation))
    twin.load_state_dict(convert_tensors(tower.state_dict(), "transformers"), strict=True)
    return twin.to(next(tower.parameters()).dtype).eval()


def timm_twin(tower: nn.Module, **options) -> nn.Module:
    """Return timm's AIMv2 with the weights of `tower` (a SAILViTModel), in its dtype, in evaluation mode."""
    config = timm_config(vars(tower.config))
    arguments = {**config["model_args"], **options}
    twin = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **arguments)
    twin.load_state_dict(convert_tensors(tower.state_dict(), "timm"), strict=True)
    return twin.to(next(tower.parameters()).dtype).eval()


def timm_tokens(twin: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the tokens (B, N, D) after the final norm, like `last_hidden_state` of the other models."""
    return twin.forward_features(pixel_values)
