# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb that reads a checkpoint and reports on it: `inspect`."""

import argparse
import json

from .arguments import Verbs, add_source, add_trust_pickle, add_verb, pick
from .progress import byte_progress
from .startup import import_without_torch


def add_verbs(verbs: Verbs) -> None:
    inspect = add_verb(verbs, "inspect", run_inspect, "SRC [options]", "show what a checkpoint is, and its problems")
    add_source(inspect.add_argument_group("input"))
    inspect.add_argument_group("output").add_argument("--json", action="store_true", help="print JSON")
    checks = inspect.add_argument_group("checks")
    checks.add_argument("--deep", action="store_true", help="read the data too: NaN, infinity, hashes")
    add_trust_pickle(checks)


def run_inspect(options: argparse.Namespace) -> int:
    """
    Show the format, contents and problems of a checkpoint; the exit code is 2 if there are problems.

    examples:
      sailvit inspect sailvit-large --deep
      sailvit inspect apple/aimv2-large-patch14-448 --json
    """
    import_without_torch()
    from sailvit.convert import inspect_checkpoint
    from sailvit.convert.inspect import table

    names = ("revision", "from_layout", "prefix", "trust_pickle", "deep")
    with byte_progress() as on_progress:
        report = inspect_checkpoint(options.source, **pick(options, names), on_progress=on_progress)
    print(json.dumps(report.to_dict(), indent=2) if options.json else table(report))
    return 0 if report.ok else 2
