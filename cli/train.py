# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb train."""

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from .arguments import Verbs, add_verb, positive_integer
from .startup import import_with_torch, import_without_torch


if TYPE_CHECKING:
    from sailvit.train import Recipe


def add_verbs(verbs: Verbs) -> None:
    usage = "STAGE [KEY=VALUE ...] [options]"
    train = add_verb(verbs, "train", run_train, usage, "train a SAIL-VL in the paper's stages, or by a recipe of yours")
    group = train.add_argument_group("input")
    group.add_argument("stage", nargs="?", metavar="STAGE", help="a recipe, such as stage1, or a YAML file")
    group.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="replaces a value of the recipe; model=, data= and output= are needed to train",
    )
    group = train.add_argument_group("output")
    group.add_argument("--print-config", action="store_true", help="print all values of the recipe and their sources")
    group.add_argument("--list", action="store_true", help="print the recipes of this package")
    group.add_argument("--plan", action="store_true", help="print memory, FLOPs, steps and hours; no weights are read")
    group = train.add_argument_group("plan")
    group.add_argument("--gpus", type=positive_integer, default=1, metavar="N", help="accelerators; default: 1")
    group.add_argument("--gpu", metavar="NAME", help="such as h100; needed for hours")
    group.add_argument(
        "--samples", type=positive_integer, metavar="N", help="of an epoch; default: as in data=, or in the paper"
    )


def run_train(options: argparse.Namespace) -> int:
    """
    Train a SAIL-VL by a recipe, or go on where this was interrupted; the exit code is 75 after SIGTERM or max_hours.

    examples:
      sailvit train stage1 model=new-vl data=corpus.yaml output=runs/s1
      sailvit train stage3 model=new-vl --plan --gpus 64 --gpu h100
    """
    chosen = [name for name in ("print_config", "list", "plan") if getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"expected one of {', '.join('--' + name.replace('_', '-') for name in chosen)}")
    if options.list and options.stage:
        raise ValueError(f"expected --list alone, got {options.stage}")
    if not options.list and not options.stage:
        raise ValueError("expected STAGE, such as stage1, or --list")
    import_without_torch()
    if options.list:
        return _print_recipes()
    from sailvit.train import describe_recipe, load_recipe

    if options.print_config:
        print(describe_recipe(options.stage, options.overrides))
        return 0
    recipe = load_recipe(options.stage, options.overrides)
    import_with_torch()
    return _print_plan(recipe, options) if options.plan else _train(recipe)


def _print_recipes() -> int:
    from sailvit.train import list_recipes

    recipes = list_recipes()
    width = max(map(len, recipes))
    print(*(f"{name:<{width}}  {description}" for name, description in recipes.items()), sep="\n")
    return 0


def _print_plan(recipe: "Recipe", options: argparse.Namespace) -> int:
    from sailvit.train.run import plan_run

    _be_quiet()
    plan, origin = plan_run(recipe, options.gpus, options.gpu, options.samples)
    print(plan.describe())
    if origin:
        print(f"{'samples':<12}{origin}")
    return 0


def _train(recipe: "Recipe") -> int:
    from sailvit.train.failures import is_printed_by_first_rank
    from sailvit.train.run import TrainingError, run

    _be_quiet()
    rank = os.environ.get("RANK", "0")
    try:
        return run(recipe, lambda line: print(line, flush=True))
    except Exception as error:
        is_input = isinstance(error, (ValueError, OSError, ImportError))
        if not is_printed_by_first_rank(error):
            if (rank == "0" and is_input) or not (is_input or isinstance(error, TrainingError)):
                raise
            print(f"sailvit train: rank {rank}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if is_input else 1


def _be_quiet() -> None:
    """
    Leave out torch's notes to the authors of engines; progress bars of libraries where stderr is no terminal; and on
    all ranks but the first progress bars and warnings of transformers.
    """
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed 0.19 and accelerate 1.15 call them
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        return
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":
        transformers_logging.set_verbosity_error()
        logging.getLogger().setLevel(logging.ERROR)
