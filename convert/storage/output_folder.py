"""
Writes folders whole or not at all, and safetensors in a stream: what is held is one chunk of one tensor.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CheckpointError
from .sources import PROVENANCE, LocalFolder, Source


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A folder to fill, which becomes `out` when the block ends, and is gone if it does not end well. A kill leaves it
    behind as `.NAME.part`; the next attempt clears it away.

    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or another process is writing it.
    """
    check_free(out, overwrite)
    out = out.parent.resolve() / out.name
    part = out.with_name(f".{out.name}.part")
    made = [parent for parent in part.parents if not parent.exists()]
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: {os.strerror(error.errno or 0)}: give another name or place") from error
    lock = FileLock(part / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{out}: another process is writing it") from None
    try:
        _clear(part)
        yield part
        _sync(part)
        _put_in_place(part, out)
        (out / ".lock").unlink()  # not before: a second process would take a new one in the old place
    except OSError as error:
        _remove(part, made)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(f"{out}: {os.strerror(error.errno)}: make room; nothing was left there") from error
    except BaseException:
        _remove(part, made)
        raise
    finally:
        lock.release()


def _remove(part: Path, made: list[Path]) -> None:
    shutil.rmtree(part, ignore_errors=True)
    for parent in made:
        with suppress(OSError):  # somebody else's files are in it
            parent.rmdir()


def check_free(out: Path, overwrite: bool) -> None:
    """
    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or is nothing that was written here.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} is no folder: give another name")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists: give --overwrite, or another name")
    if out.exists() and any(out.iterdir()) and not (out / PROVENANCE).exists():
        raise CheckpointError(f"{out} holds no {PROVENANCE}, so no conversion wrote it: remove it yourself")


def check_separate(out: Path, sources: Iterable[Source]) -> None:
    """Raise CheckpointError if `out` is a source, contains one, or is inside one."""
    for source in sources:
        if isinstance(source, LocalFolder):
            folder, given, target = source.folder.resolve(), source.given.resolve(), out.resolve()
            if folder == target or target in folder.parents:
                raise CheckpointError(f"{out} contains the source {source.given}: choose another output folder")
            if given in (target, *target.parents):
                raise CheckpointError(f"{out} is inside the source {source.given}: choose another output folder")


def _clear(part: Path) -> None:
    for left in part.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != ".lock":
            left.unlink()


def _sync(folder: Path) -> None:
    """Has the disk hold the files of a folder, and the list of them."""
    for path in [*folder.iterdir(), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_path(out.parent)


def check_space(folder: Path, wanted: int) -> None:
    """
    Raises:
        CheckpointError: The disk has less room than `wanted` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CheckpointError(f"{folder.parent}: {wanted / 1e6:.1f} MB are to be written, {free / 1e6:.1f} MB are free")


def final_name(folder: Path) -> str:
    """What a folder will be called once it is in its place."""
    return folder.name.removeprefix(".").removesuffix(".part")
