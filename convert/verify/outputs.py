"""TODO convert/verify/outputs.py."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.errors import VerificationError


if TYPE_CHECKING:
    import torch

PICTURE = Path(__file__).parents[2] / "examples" / "raccoon.jpg"

LOADER_SCRIPT = Path(__file__).with_name("load_folder.py")

TOLERANCE = 1e-4  # relative, in float32; other arithmetic for the same weights gives about 1e-6


def relative_difference(ours: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return |ours - reference| / |reference|, Frobenius norms in float64; NaN where either is not finite."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def compare_outputs(ours: "torch.Tensor", reference: "torch.Tensor", name: str) -> dict[str, Any]:
    """
    Compare a folder's outputs with those of a reference.

    Args:
        name: What computed the reference.

    Returns:
        What provenance.json records under "verification".

    Raises:
        VerificationError: The relative difference is above TOLERANCE.
    """
    difference = relative_difference(ours, reference)
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"the folder's tokens differ from those of {name} by {difference:.1e} (relative): expected at most "
            f"{TOLERANCE:.0e}"
        )
    return {"reference": name, "relative_difference": difference, "tolerance": TOLERANCE, "picture": PICTURE.name}


def describe(figures: Mapping[str, Any]) -> str:
    """Return a line about the result of a verification."""
    if "placeholders" in figures:
        return "it loads in a clean process: {tiles} tiles of an image are {placeholders} placeholders".format(
            **figures
        )
    if "loaded" in figures:
        return f"it loads in a clean process, as {figures['loaded']}"
    return f"its tokens are {figures['relative_difference']:.1e} from those of {figures['reference']}, relative"


def run_in_clean_process(folder: Path, scratch: Path | None = None) -> "dict[str, torch.Tensor]":
    from safetensors.torch import load_file

    if scratch is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run_in_clean_process(folder, Path(temporary))
    script = "import sys; exec(compile(open(sys.argv[1]).read(), sys.argv.pop(1), 'exec'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [
        sys.executable,
        "-c",
        script,
        str(LOADER_SCRIPT),
        str(folder),
        str(PICTURE),
        str(scratch / "tokens.safetensors"),
    ]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise VerificationError(f"the folder does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
    return load_file(scratch / "tokens.safetensors")
