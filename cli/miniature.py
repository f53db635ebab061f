# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb miniature."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from .arguments import Verbs, add_verb, seed
from .progress import log


# Those of sailvit.examples.miniature, whose import takes too long for --help; a test compares them.
SIZES = ("32px", "48px", "224px", "448px")
ARMS = (
    "untrained", "base", "refined", "more_aim", "all_at_once", "stage3", "stages_1_3", "stages_2_3",
    "refined_untrained", "frozen_language", "step_by_step", "data_1_2", "data_1_4", "data_1_8", "half_caption",
    "half_ocr", "half_open_qa", "half_short_qa", "half_math", "half_text",
)  # fmt: skip
QUICK = 0.03  # of the pictures, for --quick
SEEDS = (0, 1, 2)


def add_verbs(verbs: Verbs) -> None:
    miniature = add_verb(
        verbs, "miniature", run_verb, "OUT [options]", "train a small SAILViT from nothing, on drawn pictures"
    )
    group = miniature.add_argument_group("input")
    group.add_argument("--size", choices=SIZES, help="of a tile, and the widths of the models; default: 32px")
    group.add_argument("--seed", type=seed, metavar="N", help="of pictures, weights and order; default: 0")
    group.add_argument(
        "--arms",
        nargs="*",
        choices=ARMS,
        metavar="ARM",
        help=f"compare ways to refine, for each of --seeds: all, or some of {', '.join(ARMS)}; "
        "those from frozen_language on have seed 0 alone",
    )
    group.add_argument("--seeds", nargs="+", type=seed, metavar="N", help="with --arms; default: 0 1 2")
    group.add_argument(
        "--quick", action="store_true", help=f"{QUICK:.0%}% of the pictures: minutes, but it learns little"
    )
    group = miniature.add_argument_group("output")
    group.add_argument("out", type=Path, metavar="OUT", help="folder of everything; the same command goes on in it")
    group.add_argument(
        "--summary", action="store_true", help="only write summary.json, summary.md and charts of the arms in OUT"
    )


def run_verb(options: argparse.Namespace) -> int:
    """
    Draw a world of pictures, pretrain a vision encoder and a language model, refine them in three stages, probe them.

    examples:
      sailvit miniature miniature
      sailvit miniature experiment --arms base refined more_aim all_at_once --seeds 0 1 2
    """
    _check(options)
    try:
        from sailvit.examples.miniature.run import run_arms, run_miniature
        from sailvit.examples.miniature.setting import SIZES as SETTINGS
        from sailvit.examples.miniature.summary import write_summary
        from sailvit.train.trainer import TrainingError
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "sailvit[train,evaluate]"') from error
    if options.summary:
        print(*write_summary(options.out), sep="\n")
        return 0
    _be_quiet()
    setting = SETTINGS[options.size or SIZES[0]].scaled(QUICK if options.quick else 1)
    command = shlex.join(["sailvit", *sys.argv[1:]])
    try:
        if options.arms is None:
            return run_miniature(options.out, setting.with_seed(options.seed or 0), log, command)
        return run_arms(options.out, setting, options.arms, options.seeds or SEEDS, log, command)
    except TrainingError as error:
        print(f"sailvit miniature: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError if an option has no meaning next to another one."""
    names = ("size", "seed", "arms", "seeds", "quick")
    given = [name for name in names if getattr(options, name) is not None and getattr(options, name) is not False]
    if options.summary and given:
        raise ValueError(f"--summary: expected OUT alone, got --{given[0]}, too: it takes all results in OUT")
    if options.seeds and options.arms is None:
        raise ValueError("--seeds: expected --arms, too; --seed is that of one miniature")
    if options.seed is not None and options.arms is not None:
        raise ValueError("--seed: expected --seeds, which are those of --arms")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: expected a folder, got a file")


def _be_quiet() -> None:
    """Leave out the bars of libraries, one for every small file, and what they say about models of random weights."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
