# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verbs about training data: `data check`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Group, Verbs, add_verb, count, pick, positive_integer
from .progress import log
from .startup import exit_at_interrupt


if TYPE_CHECKING:
    from sailvit.train import Corpus

REASONS = 10  # bad samples that are printed
LONGEST_SHOWN = 4000  # characters of a sample that is printed
FIGURES = Path("samples")


def add_verbs(verbs: Verbs) -> None:
    data = add_verb(verbs, "data", run_check, "check CORPUS --model M [options]", "check the samples of a training mix")
    group = data.add_argument_group("input")
    group.add_argument("action", choices=("check",), metavar="check", help=argparse.SUPPRESS)
    group.add_argument("corpus", type=Path, metavar="CORPUS", help="corpus.yaml")
    group.add_argument(
        "--model", required=True, metavar="M", help="the SAIL-VL to train: a folder or a name on the Hub"
    )
    group.add_argument("--cache-dir", type=_folder, metavar="DIR", help="default: in the cache of the datasets library")
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
        "--figures", type=_folder, metavar="DIR", help="write the tiles of shown samples; default: samples/"
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing files of --skipped and --figures")
    _add_packing(data.add_argument_group("packing"))


def _add_packing(group: Group) -> None:
    group.add_argument("--samples-per-step", type=positive_integer, metavar="N", help="of all ranks together")
    group.add_argument("--max-tokens-per-pack", type=positive_integer, metavar="T", help="default: 8192")
    group.add_argument("--max-tiles-per-pack", type=positive_integer, metavar="T", help="default: any number")
    group.add_argument("--ranks", type=positive_integer, metavar="R", help="processes; default: 1")
    group.add_argument(
        "--too-long", choices=("drop", "truncate", "fail"), help="samples longer than a pack; default: drop"
    )


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got an empty string")
    return Path(text)


def run_check(options: argparse.Namespace) -> int:
    """
    Count the samples and tokens of a training mix, and list its bad samples; the exit code is 2 if there are any.

    examples:
      sailvit data check corpus.yaml --model new-vl --show 3
      sailvit data check corpus.yaml --model new-vl --samples-per-step 512 --ranks 8 --json
    """
    packing = _packing_options(options)
    _check_output(options)
    with exit_at_interrupt("data"):
        from sailvit.train import (
            Corpus,
            PackedBatches,
            can_share_prompt,
            check_corpus,
            describe,
            load_processor,
            tile_cost,
        )

        _quiet_libraries()
        processor, config = load_processor(options.model)
    corpus = Corpus.from_yaml(
        options.corpus,
        processor,
        options.cache_dir,
        options.workers,
        max_bad_fraction=1,
        recheck=True,
        share_prompt=can_share_prompt(config),
        log=_log_to_stderr,
    )
    batches = PackedBatches(corpus, **packing, tile_cost=tile_cost(config)) if packing and len(corpus) else None
    if options.skipped:
        corpus.write_skipped(options.skipped, options.overwrite)
    report = check_corpus(corpus, batches)
    print(json.dumps(report.to_dict(), indent=2) if options.json else describe(report))
    if not options.json:
        _print_skipped(corpus)
    shown_are_good = _show(batches.corpus if batches else corpus, options)
    return 0 if shown_are_good and not corpus.skipped else 2


def _packing_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("samples_per_step", "max_tokens_per_pack", "max_tiles_per_pack", "ranks", "too_long")
    given = {name: value for name, value in pick(options, names).items() if value is not None}
    if given and "samples_per_step" not in given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --samples-per-step")
    return given


def _check_output(options: argparse.Namespace) -> None:
    if options.figures and not options.show:
        raise ValueError("--figures needs --show")
    first = (options.figures or FIGURES) / "sample-1.png"
    for path in [*([options.skipped] if options.skipped else []), *([first] if options.show else [])]:
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists: give another name, or --overwrite")


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


def _cut_middle(text: str) -> str:
    """Return a text whose middle is left out if it is longer than LONGEST_SHOWN."""
    cut, half = len(text) - LONGEST_SHOWN, LONGEST_SHOWN // 2
    return text if cut <= 0 else f"{text[:half]}\n[... {cut:,} characters are not shown ...]\n{text[-half:]}"


def _show(corpus: "Corpus", options: argparse.Namespace) -> bool:
    """Print samples and draw their tiles; return whether all of them could be read."""
    from sailvit.train import show_samples

    folder, bad = options.figures or FIGURES, 0
    output = sys.stderr if options.json else sys.stdout
    for number, sample in enumerate(show_samples(corpus, options.show), start=1):
        bad += sample.is_bad
        note = "" if sample.is_bad else "; trained tokens are in \u27e6\u27e7"
        print(f"\n--- {sample.title}{note}", _cut_middle(sample.text), sep="\n", file=output)
        if sample.tiles is not None:
            folder.mkdir(parents=True, exist_ok=True)
            sample.draw(folder / f"sample-{number}.png")
            print(f"tiles: {folder / f'sample-{number}.png'}", file=output)
    return not bad
