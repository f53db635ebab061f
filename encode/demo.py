"""The demo: convert a checkpoint in Apple's layout, inspect it, load it with remote code, encode a photograph."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from ..convert.conversion import convert_checkpoint
from ..convert.inspect import inspect_checkpoint, table
from ..convert.storage.sources import check_name
from ..convert.synthetic import published_shape, write_synthetic
from ..convert.verify.outputs import describe
from ..devices import choose_dtype, dtype_name
from ..evaluate.pictures import draw_tokens


EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOGRAPH = EXAMPLES / "raccoon.jpg"
MAX_TILES = 4  # and a thumbnail; two cores without AVX-512 take 5 to 8 seconds for a tile of Large


def run_demo(
    out: Path, log: Callable[[str], None], size: str = "large", model: str | None = None, dtype: str = "auto"
) -> Path:
    """
    Convert, inspect, load and run a vision tower; return the path of the figure that it draws.

    Args:
        out: Folder for the checkpoint, the converted model, the tokens and the figure.
        log: Called with each progress message.
        size: Published size of the model with random weights.
        model: Real weights instead: a file, a folder or a name on the Hub.
        dtype: To compute in; "auto" for bfloat16 where the CPU computes it natively, else float32.

    Raises:
        CheckpointError: `model` does not exist or cannot be converted.
    """
    if model is not None:
        check_name(model)
    started = time.perf_counter()
    folder, tokens, figure = out / "sailvit", out / "tokens.safetensors", out / "figure.png"
    what = f"Real weights: {model}"
    if model is None:
        what = f"AIMv2-{size.capitalize()} in Apple's layout with RANDOM weights: its tokens are meaningless."
    with _step(f"1. {what}", log):
        source = model or str(write_synthetic(out / f"aimv2-{size}-random", published_shape(size), dtype="bfloat16"))
        log(f"   {source}")
    with _step(f"2. sailvit convert {source} {folder} --dtype bfloat16", log):
        done = convert_checkpoint(source, folder, dtype="bfloat16", log=lambda line: log(f"   {line}"))
        log(f"   {describe(done.verification)}")
    with _step(f"3. sailvit inspect {folder}", log):
        for line in table(inspect_checkpoint(folder)).splitlines():
            log(f"   {line}")
    with _step("4. The folder loaded with AutoModel and remote code, in another process:", log):
        _encode_in_subprocess(folder, tokens, dtype, log)
    with _step("5. Figure: the photograph, its tiles and the principal components of its tokens", log):
        _draw(tokens, figure)
        log(f"   {figure}")
    log(f"Done in {time.perf_counter() - started:.0f} s.")
    return figure


@contextmanager
def _step(title: str, log: Callable[[str], None]) -> Iterator[None]:
    """Log a title, and afterwards the seconds taken."""
    log(title)
    started = time.perf_counter()
    yield
    log(f"   {time.perf_counter() - started:.1f} s")


def _encode_in_subprocess(folder: Path, tokens: Path, dtype: str, log: Callable[[str], None]) -> None:
    chosen, reason = choose_dtype(torch.bfloat16, "cpu", dtype)
    log(f"   in {dtype_name(chosen)}: {reason}")
    command = [sys.executable, str(EXAMPLES / "encode_photo.py"), str(folder), str(PHOTOGRAPH), str(tokens)]
    command += ["--max-tiles", str(MAX_TILES), "--dtype", dtype_name(chosen)]
    subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})


def _draw(tokens: Path, figure: Path) -> None:
    encoded = load_file(tokens)
    with Image.open(PHOTOGRAPH) as picture:
        draw_tokens(picture, encoded["tokens"], tuple(encoded["tile_grid"].tolist())).save(figure)
