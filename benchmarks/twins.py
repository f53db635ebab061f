"""The same tower in other people's code: transformers' Aimv2VisionModel and timm, given the weights of one of ours."""

import re

import timm
import torch
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel


# ours -> theirs, in one pass over the name
NATIVE_NAMES = {
    "preprocessor.patchifier.proj.": "embeddings.patch_embed.",
    "preprocessor.patchifier.norm.": "embeddings.rms_norm.",
    "preprocessor.pos_embed": "embeddings.position_embedding.weight",
    "trunk.post_trunk_norm.": "rms_norm.",
    "trunk.blocks.": "encoder.layers.",
    "attn.proj.": "attention.out_proj.",
    "norm_": "rms_norm",
    "mlp.fc1.": "ffn.gate_proj.",
    "mlp.fc2.": "ffn.down_proj.",
    "mlp.fc3.": "ffn.up_proj.",
}
TIMM_NAMES = {
    "preprocessor.patchifier.": "patch_embed.",
    "preprocessor.pos_embed": "pos_embed",
    "trunk.post_trunk_norm.": "norm.",
    "trunk.blocks.": "blocks.",
    "norm_": "norm",
    "mlp.fc1.": "mlp.fc1_g.",
    "mlp.fc3.": "mlp.fc1_x.",
}


def renamed(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def native_twin(tower: nn.Module, attn_implementation: str = "sdpa") -> Aimv2VisionModel:
    """transformers' own model with the weights of `tower` (a SAILViTModel), in its dtype, in evaluation mode."""
    config = tower.config
    twin = Aimv2VisionModel(
        Aimv2VisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            rms_norm_eps=config.rms_norm_eps,
            is_native=config.pos_embed_type == "sincos",
            use_head=False,
            attn_implementation=attn_implementation,
        )
    )
    weights = {}
    for name, tensor in tower.state_dict().items():
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                weights[renamed(name.replace("attn.qkv", f"attention.{part}_proj"), NATIVE_NAMES)] = chunk
        else:
            weights[renamed(name, NATIVE_NAMES)] = tensor[0] if name.endswith("pos_embed") else tensor
    twin.load_state_dict(weights, strict=True)
    return twin.to(next(tower.parameters()).dtype).eval()


def timm_twin(tower: nn.Module, **options) -> nn.Module:
    """timm's AIMv2 with the weights of `tower` (a SAILViTModel), in its dtype, in evaluation mode."""
    config = tower.config
    twin = timm.create_model(
        "aimv2_large_patch14_448",
        pretrained=False,
        num_classes=0,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        **options,
    )
    weights = {renamed(name, TIMM_NAMES): tensor for name, tensor in tower.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin.to(next(tower.parameters()).dtype).eval()


def timm_tokens(twin: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) after the final norm, as `last_hidden_state` of the others."""
    return twin.forward_features(pixel_values)
