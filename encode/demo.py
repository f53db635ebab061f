"""The first steps: a random tower, saved as a Hub folder, loaded with remote code, and shown a photograph."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from ..configuration_sailvit import SAILViTConfig
from ..image_processing_sailvit import SAILViTImageProcessor
from ..modeling_sailvit import SAILViTModel
from .figure import draw_tokens


EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOGRAPH = EXAMPLES / "raccoon.jpg"


def run_demo(out: Path, say: Callable[[str], None], size: str = "large") -> Path:
    """
    Makes, saves, loads and runs a tower; returns the figure it draws.

    Args:
        out: Folder for the tower, the tokens and the figure.
        say: Where each line about what happens goes.
        size: A published size of the tower.
    """
    folder, tokens, figure = out / f"sailvit-{size}-random", out / "tokens.safetensors", out / "figure.png"
    say(f"1. SAILViT-{size.capitalize()} with RANDOM weights: its tokens mean nothing, all else is as with real ones.")
    parameters = make_random_tower(folder, size).num_parameters()
    say(f"   {parameters / 1e6:.0f}M parameters in bfloat16, saved as a Hub folder: {folder}")
    say("2. Loaded from that folder with AutoModel and remote code, in a process of its own:")
    script = EXAMPLES / "encode_photo.py"
    subprocess.run([sys.executable, str(script), str(folder), str(PHOTOGRAPH), str(tokens)], check=True)
    started = time.perf_counter()
    encoded = load_file(tokens)
    with Image.open(PHOTOGRAPH) as picture:
        draw_tokens(picture, encoded["tokens"], tuple(encoded["tile_grid"].tolist())).save(figure)
    say(f"3. The picture, its tiles and the principal components of its tokens, {time.perf_counter() - started:.2f} s:")
    say(f"   {figure}")
    return figure


def make_random_tower(folder: Path, size: str = "large", seed: int = 0, **overrides) -> SAILViTModel:
    """A tower with random weights in bfloat16, saved to `folder` with its processor and the code that loads them."""
    torch.manual_seed(seed)
    model = SAILViTModel(SAILViTConfig.from_size(size, **overrides)).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    SAILViTImageProcessor().save_pretrained(folder)
    return model
