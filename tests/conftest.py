import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from pathlib import Path

import pytest
import torch

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel


ROOT = Path(__file__).parents[1]
PHOTOGRAPH = ROOT / "examples" / "raccoon.jpg"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, the norms' too, so that a mistaken or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
    return model


def relative_difference(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tower() -> SAILViTModel:
    """A tiny tower of the true shape: 3 blocks, 2 heads, a 4 x 4 grid."""
    return randomize(SAILViTModel(SAILViTConfig(**TINY))).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return random_pixels(2, 3, 56, 56)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tower and its processor, saved as a user would."""
    path = tmp_path_factory.mktemp("hub") / "sailvit-tiny"
    randomize(SAILViTModel(SAILViTConfig(**TINY))).save_pretrained(path)
    SAILViTImageProcessor(size=56).save_pretrained(path)
    return path
