# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Failures of a run on several ranks: an error that all ranks meet is printed once, and the ranks that do not answer are
named by one that waited for them.

Ranks exchange messages through the store of the launcher (MASTER_ADDR), which works before the process group starts and
after it has failed.
"""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from ..convert.storage.files import first_line
from .trainer import TrainingError


WAIT_SECONDS = 5.0  # for the messages of other ranks; torchrun waits for 30 s after SIGTERM before it kills


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error comes from communication between ranks; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def explain_lost_rank(error: Exception, resume: str) -> TrainingError:
    """
    Return the error of a rank whose communication failed; that of the first such rank names those that do not answer.

    Args:
        resume: What the same command does next.
    """
    ranks, cause = int(os.environ.get("WORLD_SIZE", 1)), first_line(error)
    store = _open_store()
    if store is None:
        return TrainingError(f"the connection to another rank is lost ({cause}); {resume}")
    _publish(store, "")
    if store.add("lost", 1) > 1:
        return TrainingError("stopped, since another rank did not answer")
    silent = _silent_ranks(store, ranks)
    others = "rank" + "s" * (len(silent) > 1) + " " + ", ".join(map(str, silent)) if silent else ""
    who = f"no answer from {others}, ended or stuck" if silent else "stopped, since another rank failed"
    return TrainingError(f"{who} ({cause}); {resume}")


def is_printed_by_first_rank(error: Exception) -> bool:
    """
    Return whether the first rank meets the same error, which it prints for all; call this on every rank that fails.

    Other ranks wait for it for a few seconds.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or (store := _open_store()) is None:
        return False
    message = f"{type(error).__name__}: {error}"
    _publish(store, message)
    if _rank() == 0:
        return False
    _wait(store, [_key(0)])
    return store.check([_key(0)]) and store.get(_key(0)).decode() == message


def _silent_ranks(store: dist.Store, ranks: int) -> list[int]:
    """Return the ranks that published no failure."""
    _wait(store, [_key(rank) for rank in range(ranks)])
    return [rank for rank in range(ranks) if not store.check([_key(rank)])]


def _wait(store: dist.Store, keys: list[str]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.1)


def _publish(store: dist.Store, message: str) -> None:
    store.set(_key(_rank()), message)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _key(rank: int) -> str:
    return f"failure of rank {rank}"


def _open_store() -> dist.Store | None:
    """Return the store of the launcher; None if it cannot be reached."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    try:
        socket.create_connection((address, int(port)), WAIT_SECONDS).close()  # torch prints a page if it cannot connect
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=WAIT_SECONDS))
    except (OSError, RuntimeError, ValueError):
        return None
    return dist.PrefixStore(f"sailvit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
