"""Output folders that appear complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CheckpointError
from .sources import PROVENANCE


@contextmanager
def new_folder(out: Path, overwrite: bool = False, mark: str = PROVENANCE) -> Iterator[Path]:
    """
    A folder to fill, which is renamed to `out` when the block ends, and removed when it raises. A killed process
    leaves `.NAME.part` and `.NAME.lock`; the next attempt removes them. Raises a CheckpointError if `out` exists and
    may not be overwritten, which needs the file `mark` in it, or another process is writing it.
    """
    check_free(out, overwrite, mark)
    out = out.parent.resolve() / out.name
    part = out.with_name(f".{out.name}.part")
    new_parents = [parent for parent in part.parents if not parent.exists()]
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        what = "another process is writing it" if Path(lock.lock_file).exists() else "cannot be created: choose another"
        raise CheckpointError(f"{out}: {what}") from None
    except OSError as error:
        raise CheckpointError(f"{out}: {os.strerror(error.errno or 0)}: choose another name or folder") from error
    try:
        check_free(out, overwrite, mark)  # again: another process may have written it before the lock was free
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        for path in [*part.iterdir(), part]:
            sync(path)
        _rename(part, out)
        Path(lock.lock_file).unlink()
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        for parent in new_parents:
            with suppress(OSError):  # no longer empty
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"{out}: {os.strerror(error.errno)}: free space; nothing was left there") from error
        raise
    finally:
        lock.release()


def check_free(out: Path, overwrite: bool, mark: str = PROVENANCE) -> None:
    """Raise a CheckpointError if `out` exists and may not be overwritten, or has no `mark`, so is of others."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} is no folder: give another name")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists: give --overwrite, or another name")
    if out.exists() and any(out.iterdir()) and not (out / mark).exists():
        raise CheckpointError(f"{out} contains no {mark}, so sailvit did not write it: remove it yourself")


def check_space(folder: Path, nbytes: int) -> None:
    """Raise a CheckpointError if less than `nbytes` are free on the disk."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(f"{folder.parent}: {nbytes / 1e6:.1f} MB are to be written, {free / 1e6:.1f} MB are free")


def final_name(folder: Path) -> str:
    """The name that a folder of new_folder will have in the end."""
    return folder.name.removeprefix(".").removesuffix(".part")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(part: Path, out: Path) -> None:
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
    sync(out.parent)
