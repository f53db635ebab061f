"""Create SAILViT folders with random weights, for benchmarks and tests."""

from pathlib import Path
from typing import Any

import torch

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel


def make_random_tower(folder: Path, size: str = "large", seed: int = 0, **overrides: Any) -> SAILViTModel:
    """Save a SAILViT with random bfloat16 weights, its image processor and its code to `folder`; return the model."""
    torch.manual_seed(seed)
    model = SAILViTModel(SAILViTConfig.from_size(size, **overrides)).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    SAILViTImageProcessor().save_pretrained(folder)
    return model
