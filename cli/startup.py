# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Setup shared by verbs: signals, and imports without torch."""

import importlib.util
import signal
import sys


def import_without_torch() -> None:
    """
    Let submodules of `sailvit` be imported without the package's `__init__`, which registers the model classes and so
    imports torch: verbs that only read and write files start at once.
    """
    spec = importlib.util.find_spec("sailvit")
    sys.modules.setdefault("sailvit", importlib.util.module_from_spec(spec))


def exit_on_signals() -> None:
    """Exit on SIGTERM and SIGHUP as on an error, so that unfinished output is removed."""
    for end in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
