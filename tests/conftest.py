import logging
import os


logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torch 2.15 on how torchao registers its enums
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the workers share the cores

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fork_server import run_forked

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel
from sailvit.convert.export.runtimes import timm_config, transformers_config
from sailvit.convert.models.aimv2_names import AIMv2Dimensions
from sailvit.convert.synthetic import apple_config, write_synthetic
from sailvit.convert.verify import outputs


ROOT = Path(__file__).parents[1]
PHOTOGRAPH = ROOT / "examples" / "raccoon.jpg"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
}


@pytest.hookimpl(tryfirst=True)  # before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nightly tests are slow ones. Runs on other releases go first: no worker should wait for one at the end."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    items.sort(key=lambda item: "test_versions.py" not in item.nodeid)


def run_command_forked(
    command: list[str], cwd: str, env: dict[str, str], **options: object
) -> subprocess.CompletedProcess:
    """subprocess.run of `python -c SCRIPT ARGUMENTS`, in a process of the fork server."""
    _, _, script, *arguments = command
    return run_forked(script, *arguments, folder=Path(cwd), env=env)


@pytest.fixture(scope="session", autouse=True)
def forked_verification() -> Iterator[None]:
    """
    Verify folders in forked processes. New interpreters verify them where a test runs the command in a process, as
    test_commands_that_run_a_model_print_no_warning does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "subprocess", SimpleNamespace(run=run_command_forked, DEVNULL=subprocess.DEVNULL))
        yield


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


TINY_SHAPE = AIMv2Dimensions(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_channels=3, patch_size=14, grid_size=4
)


def published_config(layout: str, shape: AIMv2Dimensions = TINY_SHAPE) -> dict:
    """config.json as the people who publish a layout write it; two heads."""
    apple = {**apple_config(shape), "num_attention_heads": 2}
    fields = {**apple, "pos_embed_type": "absolute" if shape.grid_size else "sincos"}
    return {
        "sailvit": apple,
        "lit": {"model_type": "aimv2", "vision_config": apple},
        "ovis2": {"model_type": "ovis", "visual_tokenizer_config": {"backbone_config": apple}},
        "transformers": transformers_config(fields),
        "ovis2-transformers": {"model_type": "ovis2", "vision_config": transformers_config(fields)},
        "timm": {**timm_config(fields), "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}},
    }[layout]


def make_checkpoint(folder: Path, layout: str = "sailvit", shape: AIMv2Dimensions = TINY_SHAPE, **options) -> Path:
    """A tiny checkpoint as a layout's people publish it: weights and config.json."""
    return write_synthetic(folder, shape, layout, config=published_config(layout, shape), **options)


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
