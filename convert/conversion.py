"""A checkpoint in, a folder out: the steps of `sailvit convert`, whatever kind of checkpoint it is."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .aimv2 import plan_tower
from .folder import write_provenance
from .job import Job, Options
from .problems import CheckpointError
from .readers import Checkpoint, hash_file
from .sources import LocalFolder, Source, find_source
from .writer import check_free, new_folder


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to_layout: str | None = None,
    from_layout: str | None = None,
    prefix: str | None = None,
    image_size: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    trust_pickle: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Job:
    """
    Writes a checkpoint, or a part of it, to a folder, in another layout, resolution or precision; whole or not at all.

    Args:
        source: A file, a folder or a name on the Hub.
        out: The folder to be.
        to_layout: A key of LAYOUTS, for a tower; "sailvit" if not given.
        from_layout: The layout of the source; recognised if not given.
        prefix: What stands before the tower's names, where more than one tower could be meant.
        image_size: Height and width in pixels; learned positions are resampled to it.
        dtype: One of job.DTYPES; the source's if not given.
        revision: Branch, tag or commit of a name on the Hub.
        max_shard_size: In bytes, or as "5GB".
        trust_pickle: Whether files of torch.save may run code of their own.
        overwrite: Whether `out` may be there already.
        verify: Whether the folder is loaded in a fresh process and held against the source.
        say: Told what was found and done, line by line.
        progress: Told the bytes that are written, and how many there will be.

    Raises:
        CheckpointError: The source is not whole, or what is wanted of it cannot be; nothing was written.
        VerificationError: The folder is not what the source is; nothing is left of it.
    """
    asked = Options(None, to_layout, from_layout, prefix, image_size, dtype, max_shard_size)
    asked.check()
    out, (origin, entry) = Path(out), find_source(str(source), revision)
    check_free(out, overwrite)
    _keep_apart(origin, out)
    job = _plan(Checkpoint(origin, entry, trust_pickle), asked)
    for line in job.notes:
        say(line)
    with new_folder(out, overwrite) as part, _hashing(job.checkpoint) as hashes:
        digests = job.write_weights(part, max_shard_size, progress)
        job.write_folder(part)
        job.verification = job.verify(part) if verify else None
        write_provenance(part, job, asdict(asked), hashes(), digests)
    return job


def _plan(checkpoint: Checkpoint, asked: Options) -> Job:
    """What is to be done, once it is sure that it can be."""
    return plan_tower(checkpoint, asked)


def _keep_apart(origin: Source, out: Path) -> None:
    if isinstance(origin, LocalFolder):
        source, target = origin.folder.resolve(), out.resolve()
        if source == target or target in source.parents:
            raise CheckpointError(f"{out} holds the source: write to another place")


@contextmanager
def _hashing(checkpoint: Checkpoint) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Hashes the files that are read, while other work is done; the card is read for its licence."""
    stop = threading.Event()
    asked = {*checkpoint.opened, *checkpoint.documents, checkpoint.entry, "README.md"}
    files = sorted(asked & {*checkpoint.source.files})
    with ThreadPoolExecutor(1) as pool:
        paths = {file: checkpoint.source.path(file) for file in files}
        pending: dict[str, Future[str]] = {file: pool.submit(hash_file, path, stop) for file, path in paths.items()}
        try:
            yield lambda: {
                file: {"sha256": digest.result(), "bytes": paths[file].stat().st_size}
                for file, digest in pending.items()
            }
        finally:
            stop.set()
