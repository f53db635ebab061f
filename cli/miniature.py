# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb miniature."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import Verbs, add_verb
from .progress import log


SIZES = ("32px", "48px", "224px", "448px")  # of sailvit.examples.miniature.setting; a test compares them
QUICK = 0.05  # of the pictures, for --quick


def add_verbs(verbs: Verbs) -> None:
    miniature = add_verb(
        verbs, "miniature", run_miniature, "OUT [options]", "train a small SAILViT from nothing, on drawn pictures"
    )
    group = miniature.add_argument_group("output")
    group.add_argument("out", type=Path, metavar="OUT", help="folder of everything; the same command goes on in it")
    group = miniature.add_argument_group("input")
    group.add_argument(
        "--size", choices=SIZES, default="32px", help="of a tile, and the widths of the models; default: 32px"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of pictures, weights and order; default: 0")
    group.add_argument(
        "--quick", action="store_true", help=f"{QUICK:.0%}% of the pictures: minutes, but it learns little"
    )


def run_miniature(options: argparse.Namespace) -> int:
    """
    Draw a world of pictures, pretrain a vision encoder and a language model, refine them in three stages, probe them.

    examples:
      sailvit miniature miniature
      sailvit miniature miniature-48px --size 48px --seed 1
    """
    try:
        from sailvit.examples.miniature.run import run_miniature as run
        from sailvit.examples.miniature.setting import SIZES as SETTINGS
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "sailvit[train,evaluate]"') from error
    setting = SETTINGS[options.size].with_seed(options.seed)
    command = shlex.join(["sailvit", *sys.argv[1:]])
    return run(options.out, setting.scaled(QUICK) if options.quick else setting, log, command)
