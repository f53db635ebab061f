# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Setup shared by verbs: signals, and imports without torch."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def import_without_torch() -> None:
    """
    Let submodules of `sailvit` be imported without the package's `__init__`, which registers the model classes and so
    imports torch: verbs that only read and write files start at once.
    """
    spec = importlib.util.find_spec("sailvit")
    sys.modules.setdefault("sailvit", importlib.util.module_from_spec(spec))


def import_with_torch() -> None:
    """Run the package's `__init__` after `import_without_torch`, for verbs that turn out to need the model classes."""
    package = sys.modules["sailvit"]
    if not hasattr(package, "__version__"):
        package.__spec__.loader.exec_module(package)


def exit_on_signals() -> None:
    """Exit on SIGTERM and SIGHUP as on an error, so that unfinished output is removed."""
    for end in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(end, lambda number, frame: sys.exit(128 + number))


@contextmanager
def exit_at_interrupt(verb: str) -> Iterator[None]:
    """Exit at once on Ctrl-C, with 130: some packages catch KeyboardInterrupt while they are imported, and go on."""

    def leave(number: int, frame: object) -> None:
        os.write(2, f"sailvit {verb}: interrupted\n".encode())
        os._exit(130)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, leave) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
