# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb miniature."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import Verbs, add_verb, count
from .progress import log


SIZES = ("32px", "48px", "224px", "448px")  # of sailvit.examples.miniature.setting; a test compares them
QUICK = 0.03  # of the pictures, for --quick
SEEDS = (0, 1, 2)


def add_verbs(verbs: Verbs) -> None:
    miniature = add_verb(
        verbs, "miniature", run_verb, "OUT [options]", "train a small SAILViT from nothing, on drawn pictures"
    )
    group = miniature.add_argument_group("input")
    group.add_argument(
        "--size", choices=SIZES, default="32px", help="of a tile, and the widths of the models; default: 32px"
    )
    group.add_argument("--seed", type=count, metavar="N", help="of pictures, weights and order; default: 0")
    group.add_argument(
        "--arms",
        nargs="*",
        metavar="ARM",
        help="compare ways to refine: these, or all without names; for each of --seeds",
    )
    group.add_argument("--seeds", nargs="+", type=count, metavar="N", help="with --arms; default: 0 1 2")
    group.add_argument(
        "--quick", action="store_true", help=f"{QUICK:.0%}% of the pictures: minutes, but it learns little"
    )
    group = miniature.add_argument_group("output")
    group.add_argument("out", type=Path, metavar="OUT", help="folder of everything; the same command goes on in it")
    group.add_argument("--summary", action="store_true", help="only write OUT/summary.json and .md of finished arms")


def run_verb(options: argparse.Namespace) -> int:
    """
    Draw a world of pictures, pretrain a vision encoder and a language model, refine them in three stages, probe them.

    examples:
      sailvit miniature miniature
      sailvit miniature experiment --arms base refined more_aim all_at_once --seeds 0 1 2
    """
    if options.seeds and options.arms is None:
        raise ValueError("--seeds: expected --arms, too; --seed is that of one miniature")
    if options.seed is not None and options.arms is not None:
        raise ValueError("--seed: expected --seeds, which are those of --arms")
    try:
        _be_quiet()
        from sailvit.examples.miniature.run import run_arms, run_miniature
        from sailvit.examples.miniature.setting import SIZES as SETTINGS
        from sailvit.examples.miniature.summary import write_summary
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "sailvit[train,evaluate]"') from error
    setting = SETTINGS[options.size].scaled(QUICK) if options.quick else SETTINGS[options.size]
    command = shlex.join(["sailvit", *sys.argv[1:]])
    if options.summary:
        write_summary(options.out)
        return 0
    if options.arms is None:
        return run_miniature(options.out, setting.with_seed(options.seed or 0), log, command)
    return run_arms(options.out, setting, options.arms, options.seeds or SEEDS, log, command)


def _be_quiet() -> None:
    """Leave out the bars of libraries, one for every small file."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
