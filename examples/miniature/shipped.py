# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The trained miniature that comes with the package, as folders for the Hub.

Write them anew from the last stage of a miniature: python -m sailvit.examples.miniature.shipped RUN/arms/refined/stage3
"""

import sys
from collections.abc import Callable
from pathlib import Path

from ...convert.conversion import convert_checkpoint
from ...convert.export.card import write_model_card


TRAINED = Path(__file__).parent / "trained"
ENCODER = TRAINED / "sailvit-miniature"
MULTIMODAL = TRAINED / "sail-vl-miniature"
LICENCE = "apache-2.0"  # of the weights: all that they were trained on is drawn by this package


def write_folders(model: str | Path, folder: Path = TRAINED, log: Callable[[str], None] = print) -> None:
    """
    Write a multimodal model and its vision encoder as folders that `sailvit push` accepts, in place of older ones.

    Args:
        model: A trained SAIL-VL, or the run that ended with it.
        folder: Where the two folders are written.
        log: Called with each progress message.

    Raises:
        CheckpointError: The model cannot be converted.
        VerificationError: A written folder does not load or computes something else.
    """
    for name, part in ((ENCODER.name, "vision"), (MULTIMODAL.name, None)):
        out = folder / name
        convert_checkpoint(model, out, part=part, overwrite=True, log=log)
        card = out / "README.md"
        card.write_text(card.read_text("utf-8").replace("---\n", f"---\nlicense: {LICENCE}\n", 1), "utf-8")
        write_model_card(out)


if __name__ == "__main__":
    write_folders(sys.argv[1])
