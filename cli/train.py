# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb train."""

import argparse

from .arguments import Verbs, add_verb


def add_verbs(verbs: Verbs) -> None:
    summary = "recipes of the paper's stages of training"
    train = add_verb(verbs, "train", run_train, "STAGE [KEY=VALUE ...] [options]", summary)
    group = train.add_argument_group("input")
    group.add_argument("stage", nargs="?", metavar="STAGE", help="a recipe, such as stage1, or a YAML file")
    group.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="replaces a value of the recipe, such as learning_rate.vision=1e-5",
    )
    group = train.add_argument_group("output")
    group.add_argument("--print-config", action="store_true", help="print all values of the recipe and their sources")
    group.add_argument("--list", action="store_true", help="print the recipes of this package")


def run_train(options: argparse.Namespace) -> int:
    """
    Print a recipe of training with the source of every value, or the names of all recipes.

    examples:
      sailvit train --list
      sailvit train stage3 trainable=vision,connector learning_rate.vision=1e-6 --print-config
    """
    if not options.list and not (options.stage and options.print_config):
        raise ValueError("expected --list, or STAGE and --print-config; this version of the command does not train")
    if options.list and options.stage:
        raise ValueError(f"expected --list alone, got {options.stage}")
    from sailvit.train import describe_recipe, list_recipes

    if options.list:
        recipes = list_recipes()
        width = max(map(len, recipes))
        print(*(f"{name:<{width}}  {description}" for name, description in recipes.items()), sep="\n")
    else:
        print(describe_recipe(options.stage, options.overrides))
    return 0
