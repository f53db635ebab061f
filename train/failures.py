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
UNREACHABLE = (OSError, RuntimeError, ValueError)  # of a store that is not there, or no longer


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error comes from communication between ranks; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def explain_lost_rank(error: Exception, resume: str) -> TrainingError:
    """
    Return the error of a rank whose communication failed; that of the first such rank names those that do not answer.

    Args:
        resume: What the same command does next.
    """
    try:
        store = _open_store()
        _publish(store, "")
        if store.add("lost", 1) > 1:
            return TrainingError("stopped, since another rank did not answer")
        who = _describe_silent(_silent_ranks(store))
    except UNREACHABLE:
        who = "the connection to another rank is lost"
    return TrainingError(f"{who} ({first_line(error)}); {resume}")


def is_printed_by_first_rank(error: Exception) -> bool:
    """
    Return whether the first rank meets the same error, which it prints for all; call this on every rank that fails.

    Other ranks wait for it for a few seconds.
    """
    if _num_ranks() == 1:
        return False
    message = f"{type(error).__name__}: {error}"
    try:
        store = _open_store()
        _publish(store, message)
        if _rank() == 0:
            return False
        _wait(store, [_key(0)])
        return store.check([_key(0)]) and store.get(_key(0)).decode() == message
    except UNREACHABLE:
        return False


def all_ranks_stop() -> bool:
    """
    Return whether all ranks received SIGTERM; call this on every rank that did.

    Where a rank failed, its launcher sends SIGTERM to the others only.
    """
    if _num_ranks() == 1:
        return True
    keys = [f"SIGTERM of rank {rank}" for rank in range(_num_ranks())]
    try:
        store = _open_store()
        store.set(keys[_rank()], "")
        _wait(store, keys)
        return store.check(keys)
    except UNREACHABLE:
        return False


def _silent_ranks(store: dist.Store) -> list[int]:
    """Return the ranks that published no failure."""
    keys = [_key(rank) for rank in range(_num_ranks())]
    _wait(store, keys)
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _describe_silent(ranks: list[int]) -> str:
    if not ranks:
        return "stopped, since another rank failed"
    return f"no answer from rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, ended or stuck"


def _wait(store: dist.Store, keys: list[str]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.1)


def _publish(store: dist.Store, message: str) -> None:
    store.set(_key(_rank()), message)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _key(rank: int) -> str:
    return f"failure of rank {rank}"


def _open_store() -> dist.Store:
    """Return the store of the launcher; raises an error of UNREACHABLE."""
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", ""))
    socket.create_connection((address, port), WAIT_SECONDS).close()  # torch prints a page if it cannot connect
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=WAIT_SECONDS))
    return dist.PrefixStore(f"sailvit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
