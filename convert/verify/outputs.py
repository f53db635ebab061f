"""Run load_folder.py in a clean process, and compare what a folder gives there with a reference."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.errors import VerificationError


if TYPE_CHECKING:
    import torch

IMAGE = Path(__file__).parents[2] / "examples" / "raccoon.jpg"
LOADER_SCRIPT = Path(__file__).with_name("load_folder.py")
TOLERANCE = 1e-4  # relative, in float32; other arithmetic for the same weights gives about 1e-6
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")


def run_in_clean_process(
    folder: Path, auto_class: str = "", *, script: Path = LOADER_SCRIPT, generate: bool = False, **options: Any
) -> "dict[str, torch.Tensor]":
    """
    Load a folder in a clean process, offline, without a token and with empty caches, and run one image through it.
    Returns the tensors that load_folder.py saves, or another script with these options.

    Args:
        auto_class: The class of transformers that loads it, or "timm".
        generate: Whether a language model is run too, not only loaded. It computes in float32 if it is small, so that
            the comparison is exact and fast on every CPU, else in the dtype of its weights, since it may not fit.
        options: compare_with_package, whether this package's classes are run as well; of another script, its own.

    Raises:
        VerificationError: It does not load or run.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        # Under a name without a dot: from another transformers < 4.57 cannot import code.
        link, out = Path(scratch, "folder"), Path(scratch, "outputs.safetensors")
        link_or_copy(folder, link)
        options = {"auto_class": auto_class, "generate": generate, "compare_with_package": False, **options}
        options |= {"folder": str(link), "image": str(IMAGE), "out": str(out)}
        environment = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
        environment |= {"HF_HOME": f"{scratch}/home", "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        # As text, since a script's own folder becomes importable.
        command = [sys.executable, "-c", script.read_text(encoding="utf-8"), json.dumps(options)]
        done = subprocess.run(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode or not out.exists():
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            reason = reason.replace(str(link), "the folder")
            raise VerificationError(f"the folder does not load in a clean process: {reason}")
        return load_file(out)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a symbolic link to a file or a folder; a copy on a system without such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copyfile(source, target)


def relative_difference(ours: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return |ours - reference| / |reference|, Frobenius norms in float64; NaN where either is not finite."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def compare_outputs(ours: "torch.Tensor", reference: "torch.Tensor", name: str) -> dict[str, Any]:
    """
    Compare a folder's tokens for the image with those that `name` computed; return what provenance.json records.

    Raises:
        VerificationError: The relative difference is above TOLERANCE.
    """
    difference = relative_difference(ours, reference)
    if not difference <= TOLERANCE:
        what = f"the folder's tokens differ from those of {name} by {difference:.1e} (relative)"
        raise VerificationError(f"{what}: expected at most {TOLERANCE:.0e}")
    return {"reference": name, "relative_difference": difference, "tolerance": TOLERANCE, "picture": IMAGE.name}


def describe(figures: Mapping[str, Any]) -> str:
    """Return what a verification found, as a sentence."""
    if "placeholders" in figures:
        return f"loads in a clean process: {figures['tiles']} tiles become {figures['placeholders']} placeholders"
    if "loaded" in figures:
        return f"loads in a clean process, as {figures['loaded']}"
    return f"outputs match {figures['reference']}: relative difference {figures['relative_difference']:.1e}"
