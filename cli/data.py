# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verbs about training data: `data check`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Group, Verbs, add_verb, count, positive_integer
from .progress import log


if TYPE_CHECKING:
    from sailvit.train import Corpus

REASONS = 10  # bad samples that are printed


def add_verbs(verbs: Verbs) -> None:
    data = add_verb(verbs, "data", run_check, "check CORPUS --model M [options]", "check the samples of a training mix")
    group = data.add_argument_group("input")
    group.add_argument("action", choices=("check",), metavar="check", help=argparse.SUPPRESS)
    group.add_argument("corpus", type=Path, metavar="CORPUS", help="corpus.yaml")
    group.add_argument(
        "--model", required=True, metavar="M", help="the SAIL-VL to train: a folder or a name on the Hub"
    )
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: in the cache of the datasets library")
    group.add_argument(
        "--workers", type=positive_integer, default=1, metavar="N", help="processes that count tokens; default: 1"
    )
    group = data.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--skipped", type=Path, metavar="FILE", help="write the bad samples and their reasons as JSONL")
    group.add_argument(
        "--show", type=count, default=0, metavar="N", help="print N random samples as the model sees them"
    )
    group.add_argument(
        "--figures", type=Path, metavar="DIR", help="write the tiles of shown samples; default: samples/"
    )

    _add_packing(data.add_argument_group("packing"))


def _add_packing(group: Group) -> None:
    group.add_argument("--samples-per-step", type=positive_integer, metavar="N", help="of all ranks together")
    group.add_argument("--max-tokens-per-pack", type=positive_integer, default=8192, metavar="T", help="default: 8192")
    group.add_argument("--max-tiles-per-pack", type=positive_integer, metavar="T", help="default: any number")
    group.add_argument("--ranks", type=positive_integer, default=1, metavar="R", help="processes; default: 1")
    group.add_argument(
        "--too-long",
        choices=("drop", "truncate", "fail"),
        default="drop",
        help="samples longer than a pack; default: drop",
    )


def run_check(options: argparse.Namespace) -> int:
    """
    Count the samples and tokens of a training mix, and list its bad samples; the exit code is 2 if there are any.

    examples:
      sailvit data check corpus.yaml --model new-vl --show 3
      sailvit data check corpus.yaml --model new-vl --samples-per-step 512 --ranks 8 --json
    """
    from sailvit.train import Corpus, PackedBatches, check_corpus, describe, load_processor, tile_cost

    _quiet_libraries()
    processor, config = load_processor(options.model)
    corpus = Corpus.from_yaml(
        options.corpus,
        processor,
        options.cache_dir,
        options.workers,
        max_bad_fraction=1,
        recheck=True,
        log=_log_to_stderr,
    )
    batches = None
    if options.samples_per_step and len(corpus):
        batches = PackedBatches(
            corpus,
            options.samples_per_step,
            options.max_tokens_per_pack,
            options.max_tiles_per_pack,
            ranks=options.ranks,
            too_long=options.too_long,
            tile_cost=tile_cost(config),
        )
    if options.skipped:
        corpus.write_skipped(options.skipped)
    report = check_corpus(corpus, batches)
    print(json.dumps(report.to_dict(), indent=2) if options.json else describe(report))
    if not options.json:
        _print_skipped(corpus)
    _show(batches.corpus if batches else corpus, options)
    return 2 if corpus.skipped else 0


def _quiet_libraries() -> None:
    """Leave out progress bars that are not on a terminal, and retries of the Hub client, whose errors are raised."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars

        disable_progress_bars()


def _log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_skipped(corpus: "Corpus") -> None:
    for entry in corpus.skipped[:REASONS]:
        log(f"  {entry}")
    if len(corpus.skipped) > REASONS:
        log(f"  and {len(corpus.skipped) - REASONS} more: --skipped FILE writes all of them")


def _show(corpus: "Corpus", options: argparse.Namespace) -> None:
    from sailvit.train import show_samples

    folder = options.figures or Path("samples")
    output = sys.stderr if options.json else sys.stdout
    for number, sample in enumerate(show_samples(corpus, options.show), start=1):
        print(f"\n--- {sample.title}; trained tokens are in \u27e6\u27e7", sample.text, sep="\n", file=output)
        if sample.tiles is not None:
            folder.mkdir(parents=True, exist_ok=True)
            sample.draw(folder / f"sample-{number}.png")
            print(f"tiles: {folder / f'sample-{number}.png'}", file=output)
