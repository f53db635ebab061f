# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb suite."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import Verbs, add_verb, positive_integer, seed
from .startup import exit_on_signals, import_without_torch


# Those of sailvit.evaluate.suites.sets, whose import takes too long for --help; a test compares them.
HARNESSES = ("vlmevalkit", "lmms-eval")


def add_verbs(verbs: Verbs) -> None:
    usage = "NAME --model M --harness H --out DIR [options]"
    suite = add_verb(verbs, "suite", run_suite, usage, "run a benchmark suite with VLMEvalKit or lmms-eval")
    group = suite.add_argument_group("input")
    group.add_argument("name", nargs="?", metavar="NAME", help="opencompass, opensource or drawn; see --list")
    group.add_argument("--model", metavar="M", help="a SAIL-VL: a folder or a name on the Hub")
    group.add_argument("--harness", choices=HARNESSES)
    group.add_argument(
        "--python",
        type=_python,
        metavar="PATH",
        help="that has the harness; default: this one, for --rescore that of the bundle",
    )
    group.add_argument("--only", nargs="+", default=[], metavar="SET", help="data sets to take")
    group.add_argument("--leave-out", nargs="+", default=[], metavar="SET", help="data sets not to take")
    group.add_argument("--limit", type=positive_integer, metavar="N", help="questions of each data set; for trials")
    group.add_argument("--questions", type=positive_integer, default=60, metavar="N", help="of drawn; default: 60")
    group.add_argument("--seed", type=seed, default=0, metavar="S", help="of drawn; default: 0")
    group = suite.add_argument_group("compute")
    group.add_argument("--batch-size", type=positive_integer, default=1, metavar="N", help="lmms-eval; default: 1")
    group.add_argument("--processes", type=positive_integer, default=1, metavar="N", help="accelerators; default: 1")
    group.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help="default: as in the harness")
    group.add_argument("--no-msac", action="store_true", help="only one tiling of each image")
    group.add_argument(
        "--judge", metavar="J", help="default: those of the harness, by OPENAI_API_KEY; exact_matching: rules only"
    )
    group.add_argument("--predict-only", action="store_true", help="do not score; --rescore does it later")
    group = suite.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="everything that the run needs and gives")
    group.add_argument("--list", action="store_true", help="print the suites and their data sets")
    group.add_argument("--rescore", type=Path, metavar="DIR", help="score the kept predictions of an --out again")
    group.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="compare two --out, question by question"
    )
    group.add_argument("--json", action="store_true", help="print JSON")


def _python(text: str) -> Path:
    """Return the path of a Python, absolute, so that the bundle is scored with it from any folder."""
    return Path(shutil.which(text) or text).absolute()


def run_suite(options: argparse.Namespace) -> int:
    """
    Run a benchmark suite with a harness that is installed in a Python of its own, and keep everything in one folder.

    examples:
      sailvit suite opencompass --model sail-vl --harness vlmevalkit --python vlmevalkit/bin/python --out runs/oc
      sailvit suite --compare runs/base runs/refined
    """
    modes = [name for name in ("list", "rescore", "compare") if getattr(options, name)]
    if len(modes) > 1 or (modes and options.name):
        raise ValueError("expected one of NAME, --list, --rescore and --compare")
    exit_on_signals()
    import_without_torch()
    if not modes:
        return _run(options)
    return {"list": _list, "rescore": _rescore, "compare": _compare}[modes[0]](options)


def _run(options: argparse.Namespace) -> int:
    from sailvit.evaluate.suites.harness import DEFAULT_JUDGE, SuiteRun
    from sailvit.evaluate.suites.run import GOES_ON, local_folder, run_suite
    from sailvit.evaluate.suites.sets import SUITES, choose_data_sets

    if not options.name:
        raise ValueError(f"expected NAME, one of {', '.join(SUITES)}; or --list, --rescore, --compare")
    data_sets = choose_data_sets(options.name, options.only, options.leave_out)
    missing = [name for name in ("model", "harness", "out") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"expected {', '.join('--' + name for name in missing)}")
    run = SuiteRun(
        suite=options.name,
        data_sets=data_sets,
        harness=options.harness,
        model=local_folder(options.model),
        python=options.python or Path(sys.executable),
        batch_size=options.batch_size,
        processes=options.processes,
        msac=not options.no_msac,
        max_new_tokens=options.max_new_tokens,
        judge=options.judge or DEFAULT_JUDGE,
        limit=options.limit,
        predict_only=options.predict_only,
        questions=options.questions,
        seed=options.seed,
    )
    with _explained_interrupt(GOES_ON):
        content = run_suite(run, options.out, _log_to_stderr, _pass_on)
    _print_scores(content, options)
    return 0


def _rescore(options: argparse.Namespace) -> int:
    from sailvit.evaluate.suites.run import UNCHANGED, rescore

    with _explained_interrupt(UNCHANGED):
        content = rescore(options.rescore, options.python, options.judge, _log_to_stderr, _pass_on)
    _print_scores(content, options)
    return 0


@contextmanager
def _explained_interrupt(state: str) -> Iterator[None]:
    """Tell the state of things after Ctrl-C or a signal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _log_to_stderr(f"interrupted: {state}")
        raise


def _compare(options: argparse.Namespace) -> int:
    from sailvit.evaluate.suites.compare import compare_bundles

    result = compare_bundles(*options.compare)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    for key, (a, b) in result["different"].items():
        print(f"{key} differs: {a} in A, {b} in B")
    print(f"{'data set':<16} {'n':>6} {'A':>8} {'B':>8} {'B - A':>8}  {'95% interval':<18} {'p':>7}")
    for name, row in result["data_sets"].items():
        interval = f"{row['low']:+.4f} {row['high']:+.4f}"
        p = "" if row["p"] is None else f"{row['p']:.4f}"
        means = f"{row['a']:>8.4f} {row['b']:>8.4f} {row['difference']:>+8.4f}"
        left_out = f"  {row['left_out']} without a score left out" if row["left_out"] else ""
        print(f"{name:<16} {row['n']:>6} {means}  {interval:<18} {p:>7}{left_out}")
    for name, reason in result["skipped"].items():
        print(f"{name:<16} not compared: {reason}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from sailvit.evaluate.suites.sets import SUITES

    for suite, data_sets in SUITES.items():
        print(f"{suite} ({len(data_sets)})")
        for found in data_sets:
            names = f"{found.vlmevalkit:<20} {found.lmms_eval or '-':<26}"
            differs = found.lmms_eval and found.lmms_eval_judge != found.judge
            other = f", in lmms-eval {found.lmms_eval_judge}" if differs else ""
            print(f"  {found.name:<16} {names} {found.tiles:>2} tiles, judge: {found.judge}{other}")
    return 0


def _print_scores(content: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(content, indent=1))
        return
    for name, entry in content["data_sets"].items():
        scores = ", ".join(f"{key} {value:g}" for key, value in entry["scores"].items()) or "not scored"
        print(f"{name} ({entry['n']} questions): {scores}{_judge_note(entry)}")


def _judge_note(entry: dict[str, Any]) -> str:
    """Return what a reader of the scores should know of the judge; "" if it scored all, or none was asked."""
    model, failed = entry["judge"]["model"], entry["judge"]["failed"]
    if not entry["scores"] or model in (None, "exact_matching"):
        return ""
    if failed is None:
        return f"; judge {model}: the harness does not report its failures, and scores these answers, too"
    return f"; judge {model} failed to score {failed} of {entry['judge']['total']}" if failed else ""


def _log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pass_on(chunk: bytes) -> None:
    """Pass on output of the harness, so that its progress bars stay bars."""
    sys.stderr.buffer.write(chunk)
    sys.stderr.buffer.flush()
