# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The trained miniature that comes with the package, as folders for the Hub.

Write them anew from a finished miniature: python -m sailvit.examples.miniature.shipped OUT
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...convert.conversion import convert_checkpoint
from ...convert.export.card import RESULTS, write_model_card


TRAINED = Path(__file__).parent / "trained"
ENCODER = TRAINED / "sailvit-miniature"
MULTIMODAL = TRAINED / "sail-vl-miniature"
LICENCE = "apache-2.0"  # of the weights: all that they were trained on is drawn by this package
ABOUT = """
## What it is for

A toy, for tests and demonstrations: it knows drawn pictures of digits and shapes, in tiles of 32 pixels, and nothing
else. It was trained from nothing on pictures and texts that `sailvit miniature` draws and writes (seed 0), in less than
half an hour of a CPU.
"""
PROMPTS = """
It answers questions in the words that it was trained on, so ask one of these in place of "Describe the image.": "What
is where?", "Describe the picture in detail.", "What is top left?", "What colour is the object top left?", "How many red
objects are there?" (it never says 0: training asks for colours that are there). Of text and sums it reads little, of
pictures of several tiles less than half of the objects.
"""


def write_folders(
    model: str | Path,
    folder: Path = TRAINED,
    log: Callable[[str], None] = print,
    results: Mapping[str, Any] | None = None,
) -> None:
    """
    Write a multimodal model and its vision encoder as folders that `sailvit push` accepts, in place of older ones.

    Args:
        model: A trained SAIL-VL, or the run that ended with it.
        folder: Where the two folders are written.
        log: Called with each progress message.
        results: What `sailvit miniature` measured of both, as its results/refined.json has it; for the cards.

    Raises:
        CheckpointError: The model cannot be converted.
        VerificationError: A written folder does not load or computes something else.
    """
    for name, part, describe in ((ENCODER.name, "vision", _probes), (MULTIMODAL.name, None, _answers)):
        out = folder / name
        convert_checkpoint(model, out, part=part, overwrite=True, log=log)
        card = out / "README.md"
        card.write_text(card.read_text("utf-8").replace("---\n", f"---\nlicense: {LICENCE}\n", 1), "utf-8")
        if results is not None:
            (out / RESULTS).write_text(json.dumps([*describe(results)], indent=2) + "\n", "utf-8")
        write_model_card(out)
        text = card.read_text("utf-8")
        card.write_text(text + ABOUT + ("" if part else PROMPTS), "utf-8")


def _probes(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of the linear probe on each test set, as arguments of huggingface_hub.EvalResult."""
    for name, heads in results["probes"].items():
        yield _result("image-classification", name, "linear probe, accuracy", heads["linear"])


def _answers(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the share of right answers of each category, as arguments of huggingface_hub.EvalResult."""
    for name, entry in results["answers"].items():
        yield _result("visual-question-answering", name, "right answers, word for word", entry)


def _result(task: str, name: str, metric: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task_type": task,
        "dataset_type": "sailvit-miniature",
        "dataset_config": name,
        "dataset_name": f"miniature world ({entry['n']} held-out)",
        "metric_type": "accuracy",
        "metric_name": metric,
        "metric_value": round(entry["accuracy"], 3),
    }


if __name__ == "__main__":
    from .arms import REFINED  # needs the packages of training, which the demo does without

    miniature = Path(sys.argv[1])
    measured = json.loads((miniature / "results" / f"{REFINED}.json").read_text("utf-8"))
    write_folders(miniature / "arms" / REFINED / "stage3", results=measured)
