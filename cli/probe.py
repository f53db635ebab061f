# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb `probe`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Group, Verbs, add_computation, add_verb, positive_integer, seed
from .progress import interval_timer, log, progress_bar
from .startup import import_with_torch, import_without_torch


if TYPE_CHECKING:
    from sailvit.evaluate.probe.run import ProbeOptions

HEADS = ("mlp", "linear", "knn", "whitened_knn")
LAST = "last"
TIMM = "timm:"


def add_verbs(verbs: Verbs) -> None:
    usage = "ENCODER [ENCODER ...] --data TRAIN --test T [T ...] --out DIR [options]"
    probe = add_verb(verbs, "probe", run_probe, usage, "compare vision encoders by heads on their frozen features")
    _add_input(probe.add_argument_group("input"))
    group = probe.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder: results.json, .md, .png")
    group.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier probe")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="of features; default: in the cache of the Hub")
    group.add_argument("--no-cache", action="store_true", help="keep features in memory")
    _add_heads(probe.add_argument_group("heads"))
    add_computation(probe.add_argument_group("compute"), 64, "images in a batch, up to 256")


def _add_input(group: Group) -> None:
    group.add_argument(
        "encoders",
        nargs="+",
        metavar="ENCODER",
        help="a folder, a name on the Hub, or timm:NAME; a multimodal model too",
    )
    group.add_argument(
        "--data", "--train", required=True, metavar="TRAIN", help="class folders, or a data set of the Hub or on disk"
    )
    group.add_argument("--test", nargs="+", required=True, metavar="T", help="test sets; NAME:SPLIT names a split")
    group.add_argument(
        "--layers",
        nargs="+",
        default=[LAST],
        type=_layer,
        metavar="L",
        help="blocks, from 1 or backwards from -1; default: last, after the encoder's final norm",
    )
    group.add_argument(
        "--preprocessing", default="own", metavar="NAME", help="that of one encoder for all; default: own"
    )
    group.add_argument("--class-token", action="store_true", help="average class and register tokens, too")


def _add_heads(group: Group) -> None:
    group.add_argument("--head", nargs="+", choices=HEADS, default=["mlp"], help="default: mlp, the paper's")
    group.add_argument("--epochs", type=positive_integer, default=10, metavar="N", help="default: 10, the paper's")
    group.add_argument("--hidden", type=positive_integer, metavar="N", help="units of the mlp; default: as features")
    group.add_argument(
        "--head-batch-size", type=positive_integer, metavar="N", help="default: 256, fewer for small training sets"
    )
    group.add_argument(
        "--learning-rates", nargs="+", type=_non_negative, metavar="R", help="to choose among; default: 1e-4 to 1e-2"
    )
    group.add_argument(
        "--weight-decays", nargs="+", type=_non_negative, metavar="W", help="to choose among; default: 0 to 1"
    )
    group.add_argument(
        "--strengths",
        nargs="+",
        type=_positive,
        metavar="C",
        help="of linear heads; default: powers of 10, 1e-3 to 1e3",
    )
    group.add_argument(
        "--neighbours", nargs="+", type=positive_integer, metavar="K", help="to choose among; default: 1, 5, 10, 20"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of split, heads and order; default: 0")


def _layer(text: str) -> int | str:
    if text != LAST and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of a block or {LAST}, got {text!r}")
    return text if text == LAST else int(text)


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _positive(text: str) -> float:
    if not _non_negative(text):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return float(text)


def run_probe(options: argparse.Namespace) -> int:
    """
    Compare vision encoders by heads on their frozen features, as in the paper; exit code 2 if an image is broken.

    examples:
      sailvit probe sailvit-large apple/aimv2-large-patch14-448 --data imagenet --test imagenet-a imagenet-r --out probe
      sailvit probe sailvit-large timm:vit_small_patch16_224 --data train --test val --head mlp linear knn --out probe
    """
    _check_names(options.encoders)
    import warnings

    from transformers import logging

    import_with_torch()
    try:
        from sailvit.evaluate.probe.run import run_probe as run
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "sailvit[evaluate]"') from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    results = run(
        options.encoders,
        options.data,
        options.test,
        options.out,
        _probe_options(options),
        options.overwrite,
        log,
        _image_progress,
    )
    if results is None:
        return 0
    print(options.out / "results.md")
    return 2 if results.skipped else 0


def _check_names(encoders: list[str]) -> None:
    """Raise ValueError for what cannot be a name, before torch is imported, which takes seconds."""
    import_without_torch()
    from sailvit.convert.storage.sources import check_name

    for name in encoders:
        if not name.startswith(TIMM):
            check_name(name)


def _probe_options(options: argparse.Namespace) -> "ProbeOptions":
    from sailvit.evaluate.probe.heads import HeadOptions
    from sailvit.evaluate.probe.run import ProbeOptions

    grids = {
        name: tuple(getattr(options, name))
        for name in ("learning_rates", "weight_decays", "strengths", "neighbours")
        if getattr(options, name)
    }
    head = HeadOptions(options.epochs, options.hidden, options.head_batch_size, seed=options.seed, **grids)
    return ProbeOptions(
        tuple(options.head),
        tuple(options.layers),
        None if options.preprocessing == "own" else options.preprocessing,
        options.class_token,
        options.device,
        options.dtype,
        options.batch_size,
        options.workers,
        options.cache_dir,
        not options.no_cache,
        head,
    )


@contextmanager
def _image_progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield `on_progress(done, total)`: a bar on a terminal, plain lines elsewhere; of the first process only."""
    line_is_due, is_first = interval_timer(at_once=False), os.environ.get("RANK", "0") == "0"
    options: dict[str, Any] = {"total": total, "unit": "image", "desc": title}
    with progress_bar(**options) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if bar.disable and is_first and line_is_due():
                print(f"{title}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

        yield on_progress
