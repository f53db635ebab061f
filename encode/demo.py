"""The first steps: a checkpoint in Apple's names, converted, inspected, loaded with remote code, shown a photograph."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from ..configuration_sailvit import SAILViTConfig
from ..convert import convert_checkpoint, inspect_checkpoint
from ..convert.inspect import table
from ..convert.synthetic import published_shape, write_synthetic
from ..convert.verify import describe
from ..image_processing_sailvit import SAILViTImageProcessor
from ..modeling_sailvit import SAILViTModel
from .figure import draw_tokens


EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOGRAPH = EXAMPLES / "raccoon.jpg"


def run_demo(out: Path, say: Callable[[str], None], size: str = "large", model: str | None = None) -> Path:
    """
    Converts, inspects, loads and runs a tower; returns the figure it draws.

    Args:
        out: Folder for the checkpoint, the tower, the tokens and the figure.
        say: Where each line about what happens goes.
        size: A published size, for random weights.
        model: Real weights instead: a file, a folder or a name on the Hub.
    """
    folder, tokens, figure = out / "sailvit", out / "tokens.safetensors", out / "figure.png"
    if model is None:
        say(f"1. AIMv2-{size.capitalize()} in Apple's names with RANDOM weights: only its tokens will mean nothing.")
        source = write_synthetic(out / f"aimv2-{size}-random", published_shape(size))
        say(f"   {source}")
    else:
        source = model
        say(f"1. Real weights: {source}")
    say(f"2. sailvit convert {source} {folder} --dtype bfloat16")
    done = convert_checkpoint(source, folder, dtype="bfloat16", say=lambda line: say(f"   {line}"))
    say(f"   {describe(done.verification)}")
    say(f"3. sailvit inspect {folder}")
    for line in table(inspect_checkpoint(folder)).splitlines():
        say(f"   {line}")
    say("4. Loaded from that folder with AutoModel and remote code, in a process of its own:")
    script = EXAMPLES / "encode_photo.py"
    command = [sys.executable, str(script), str(folder), str(PHOTOGRAPH), str(tokens)]
    subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    started = time.perf_counter()
    encoded = load_file(tokens)
    with Image.open(PHOTOGRAPH) as picture:
        draw_tokens(picture, encoded["tokens"], tuple(encoded["tile_grid"].tolist())).save(figure)
    say(f"5. The picture, its tiles and the principal components of its tokens, {time.perf_counter() - started:.2f} s:")
    say(f"   {figure}")
    return figure


def make_random_tower(folder: Path, size: str = "large", seed: int = 0, **overrides) -> SAILViTModel:
    """A tower with random weights in bfloat16, saved to `folder` with its processor and the code that loads them."""
    torch.manual_seed(seed)
    model = SAILViTModel(SAILViTConfig.from_size(size, **overrides)).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    SAILViTImageProcessor().save_pretrained(folder)
    return model
