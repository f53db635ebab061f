# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb that publishes a folder: `push`."""

import argparse
import sys
from pathlib import Path

from .arguments import Verbs, add_verb, pick
from .progress import log
from .startup import import_without_torch


CHECKS = """\
They always run. Before the upload: the folder loads in a clean process, no file contains credentials or local paths.
After it: the hashes on the Hub are those of the folder."""


def add_verbs(verbs: Verbs) -> None:
    push = add_verb(
        verbs, "push", run_push, "FOLDER OWNER/NAME [options]", "check a model folder and publish it on the Hub"
    )
    group = push.add_argument_group("input")
    group.add_argument("folder", type=Path, metavar="FOLDER", help="written by convert, compose or save_pretrained")
    group = push.add_argument_group("output")
    group.add_argument("repo", metavar="OWNER/NAME", help="the repository; created if it does not exist")
    group.add_argument("--private", action="store_true", help="create the repository as a private one")
    group.add_argument("--create-pr", action="store_true", help="open a pull request on an existing repository")
    group.add_argument(
        "--branch", metavar="B", help="to commit to, created from main if it does not exist; default: main"
    )
    group.add_argument("--tag", metavar="T", help="of the commit; the model card pins it")
    group.add_argument("--revision-note", metavar="TEXT", help="description of the commit")
    push.add_argument_group("checks", CHECKS)


def run_push(options: argparse.Namespace) -> int:
    """
    Check a model folder and publish it on the Hub in one commit; if interrupted, run it again to finish.

    examples:
      sailvit push sailvit-large OWNER/NAME --private
      sailvit push stage3-vit OWNER/NAME --tag v1 --revision-note "stage 3, 4,000 steps"
    """
    import_without_torch()
    from huggingface_hub.utils import disable_progress_bars

    from sailvit.hub import PublishError, push_folder

    if not sys.stderr.isatty():
        disable_progress_bars()
    names = ("private", "create_pr", "branch", "tag", "revision_note")
    try:
        done = push_folder(options.folder, options.repo, **pick(options, names), log=log)
    except PublishError as error:
        for problem in error.problems:
            print(f"{problem.kind:<12} {problem}", flush=True)
        raise
    print(f"files uploaded: {len(done.uploaded)}, deleted: {len(done.deleted)}; every hash matches the folder's")
    print(f"{done.url}  revision {done.tag or done.commit}")
    return 0
