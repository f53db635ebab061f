"""InternViT and InternLM2 in plain torch, under their original names, from their authors' descriptions."""

import torch
from torch.nn import functional


def internvit_tokens(weights: dict, config: dict, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, C, H, W) -> tokens (B, 1 + N, D), the class token first: head by head, by matrix products."""
    batch, width, heads = len(pixels), config["hidden_size"], config["num_attention_heads"]
    patches = functional.unfold(pixels, 14, stride=14).transpose(1, 2)
    patches = patches @ weights["embeddings.patch_embedding.weight"].reshape(width, -1).T
    patches = patches + weights["embeddings.patch_embedding.bias"]
    x = torch.cat([weights["embeddings.class_embedding"].expand(batch, 1, width), patches], 1)
    x = x + weights["embeddings.position_embedding"]
    for block in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"encoder.layers.{block}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"encoder.layers.{block}.")
        }
        x = x + own["ls1"] * attend(own, config, normalise(own, "norm1", x), heads)
        inner = functional.gelu(normalise(own, "norm2", x) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
        x = x + own["ls2"] * (inner @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"])
    return x


def normalise(own: dict, name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    if f"{name}.bias" in own:
        x = x - x.mean(-1, keepdim=True)
    scaled = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * own[f"{name}.weight"]
    return scaled + own.get(f"{name}.bias", 0)


def attend(own: dict, config: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    query, key, value = (x @ own["attn.qkv.weight"].T + own.get("attn.qkv.bias", 0)).chunk(3, -1)
    if config["qk_normalization"]:
        query, key = normalise(own, "attn.q_norm", query), normalise(own, "attn.k_norm", key)
    seen = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        seen.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(seen, -1) @ own["attn.proj.weight"].T + own["attn.proj.bias"]


def internlm2_logits(weights: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (N,) -> logits (N, vocabulary): each query head with the key and value of its group."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    turn = rotations(config, len(ids), width)
    x = weights["model.tok_embeddings.weight"][ids]
    for block in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{block}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{block}.")
        }
        inner = normalise(own, "attention_norm", x, 1e-5)
        rows = (inner @ own["attention.wqkv.weight"].T + own.get("attention.wqkv.bias", 0)).split(width, -1)
        per_group, seen = heads // groups + 2, []
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            start = group * per_group
            q, k, v = rows[start + place], rows[start + per_group - 2], rows[start + per_group - 1]
            scores = turn(q) @ turn(k).T / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
            seen.append(scores.softmax(-1) @ v)
        x = x + torch.cat(seen, -1) @ own["attention.wo.weight"].T + own.get("attention.wo.bias", 0)
        inner = normalise(own, "ffn_norm", x, 1e-5)
        gated = functional.silu(inner @ own["feed_forward.w1.weight"].T) * (inner @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    head = weights.get("output.weight", weights["model.tok_embeddings.weight"])
    return normalise(weights, "model.norm", x, 1e-5) @ head.T


def rotations(config: dict, length: int, width: int):
    """Rotary position embeddings as complex numbers. Beyond max_position_embeddings, "dynamic" scaling increases the
    base; "linear" scaling divides the positions."""
    base, longest, scaling = config["rope_theta"], config["max_position_embeddings"], config["rope_scaling"] or {}
    positions, factor = torch.arange(length)[:, None], scaling.get("factor")
    if scaling.get("type") == "linear":
        positions = positions / factor
    elif scaling and length > longest:
        base = base * ((factor * length / longest) - (factor - 1)) ** (width / (width - 2))
    angles = positions * base ** -(torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], -1)

    return rotate
