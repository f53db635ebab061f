"""TODO convert/verify/outputs.py."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.errors import VerificationError


if TYPE_CHECKING:
    import torch

PICTURE = Path(__file__).parents[2] / "examples" / "raccoon.jpg"

LOADER_SCRIPT = Path(__file__).with_name("load_folder.py")

TOLERANCE = 1e-4  # relative, in float32; other arithmetic for the same weights gives about 1e-6


def describe(figures: Mapping[str, Any]) -> str:
    """What verify_folder found, for a person."""
    return f"its tokens are {figures['relative_difference']:.1e} from those of {figures['reference']}, relative"


def run_in_clean_process(folder: Path, scratch: Path) -> "dict[str, torch.Tensor]":
    from safetensors.torch import load_file

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
