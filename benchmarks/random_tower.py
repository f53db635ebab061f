"""A SAILViT folder with random weights, of any published size: what the benchmarks load."""

from pathlib import Path
from typing import Any

import torch

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel


def make_random_tower(folder: Path, size: str = "large", seed: int = 0, **overrides: Any) -> SAILViTModel:
    """A tower with random weights in bfloat16, saved to `folder` with its processor and the code that loads them."""
    torch.manual_seed(seed)
    model = SAILViTModel(SAILViTConfig.from_size(size, **overrides)).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    SAILViTImageProcessor().save_pretrained(folder)
    return model
