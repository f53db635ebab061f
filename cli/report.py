# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb `report`."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import DTYPES, Group, Verbs, add_verb, positive_integer
from .progress import log


def add_verbs(verbs: Verbs) -> None:
    usage = "RUNS [RUNS ...] --out HTML [options]"
    report = add_verb(verbs, "report", run_report, usage, "compare the stages of training with their base model")
    _add_input(report.add_argument_group("input"))
    group = report.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, required=True, metavar="HTML", help="the page; its tables go to a .md file next to it"
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing files")
    group = report.add_argument_group("compute")
    group.add_argument("--device", metavar="D", help="cpu, cuda, ...; default: a GPU if there is one")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="to compute in, for all models; default: float32, as runs are",
    )


def _add_input(group: Group) -> None:
    group.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="a folder that `sailvit train` wrote, or a folder of these"
    )
    group.add_argument(
        "--base", metavar="M", help="the model before the first stage; default: the folder or Hub name in the records"
    )
    group.add_argument(
        "--probe", nargs="+", type=Path, default=[], metavar="DIR", help="results of `sailvit probe` of these models"
    )
    group.add_argument("--images", type=Path, metavar="DIR", help="images to encode; default: the package's photograph")
    group.add_argument(
        "--max-images", type=positive_integer, default=64, metavar="N", help="of them, evenly spaced; default: 64"
    )


def run_report(options: argparse.Namespace) -> int:
    """
    Compare stages of training and their base model in one HTML page; the exit code is 2 if an image is broken.

    examples:
      sailvit report runs --out report.html
      sailvit report runs/s1 runs/s2 runs/s3 --base new-vl --probe stages --images photos --out report.html
    """
    from transformers import logging

    try:
        from sailvit.evaluate.report.build import build_report
        from sailvit.evaluate.report.page import check_outputs, write_report
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "sailvit[evaluate]"') from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    check_outputs(options.out, options.overwrite)
    report = build_report(
        options.runs,
        options.base,
        options.probe,
        options.images,
        options.max_images,
        options.device,
        options.dtype,
        log,
    )
    for path in write_report(report, options.out, options.overwrite, shlex.join(["sailvit", *sys.argv[1:]])):
        log(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 2 if report.unreadable else 0
