# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a tqdm bar on a terminal, plain lines every ten seconds elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from tqdm import tqdm

INTERVAL = 10.0  # seconds between plain lines
MIN_BYTES = 100_000_000  # less takes no time worth a plain line


def log(line: str) -> None:
    """Print a line, above the bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def progress_bar(**options: Any) -> "tqdm":
    """Return a tqdm bar that is disabled unless stderr is a terminal."""
    from tqdm import tqdm

    return tqdm(disable=not sys.stderr.isatty(), **options)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield `on_progress(done, total)`, in bytes. The bar appears with its first call."""
    line_is_due = interval_timer(at_once=False)
    bar = None

    def on_progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = stack.enter_context(progress_bar(total=total, unit="B", unit_scale=True))
        bar.update(done - bar.n)
        if bar.disable and total >= MIN_BYTES and line_is_due():
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        yield on_progress


def interval_timer(at_once: bool) -> Callable[[], bool]:
    """Return a function that is True if INTERVAL has passed since it last was, or if `at_once` at its first call."""
    last = -math.inf if at_once else time.monotonic()

    def is_due() -> bool:
        nonlocal last
        now = time.monotonic()
        due = now - last > INTERVAL
        last = now if due else last
        return due

    return is_due
