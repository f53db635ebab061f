"""A checkpoint in, a folder out: the steps of `sailvit convert`, whatever kind of checkpoint it is."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from .export.provenance import write_provenance
from .models.aimv2 import plan_aimv2
from .models.internlm2 import is_internlm2
from .models.internvit import is_internvit, plan_internvit
from .models.sailvl import PREFIXES, is_sailvl, match_names, plan_whole
from .models.sailvl_parts import has_other_tower, plan_connector, plan_language, plan_other_tower
from .plan import SHARD_SIZE, ConversionPlan, Options
from .storage.checkpoint import Checkpoint
from .storage.errors import CheckpointError
from .storage.files import hash_file
from .storage.output_folder import check_free, new_folder
from .storage.sources import LocalFolder, Source, find_source
from .storage.training_run import open_checkpoint, training_notes


# What is asked of a tower alone, as attributes of Options.
# Files of weights are hashed if they are small, or if about all of them is taken.
SMALL, WHOLE = 1 << 20, 0.9
TOWER_OPTIONS = ("to_layout", "from_layout", "prefix", "image_size")


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    part: str | None = None,
    insert_vision: str | Path | None = None,
    base: str | Path | None = None,
    average: Sequence[str | Path] = (),
    to_layout: str | None = None,
    from_layout: str | None = None,
    prefix: str | None = None,
    image_size: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str | None = None,
    trust_pickle: bool = False,
    link: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    log: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionPlan:
    """
    Writes a checkpoint, or a part of it, to a folder, in another layout, resolution or precision; whole or not at all.

    Args:
        source: A file, a folder or a name on the Hub.
        out: The folder to be.
        part: One of job.PARTS; if not given, all of a SAIL-VL, else the one part that the source is.
        insert_vision: A file, a folder or a name on the Hub, whose tower takes the place of a SAIL-VL's.
        base: A file, a folder or a name on the Hub: what the training began with: it has what a stage left frozen and
            did not save, or rounded, and an adapter is merged into it.
        average: More checkpoints of the run of `source`: the mean of all of them is converted.
        to_layout: A key of LAYOUTS, for a tower; "sailvit" if not given.
        from_layout: The layout of the source; recognised if not given.
        prefix: What stands before the tower's names, where more than one tower could be meant.
        image_size: Height and width in pixels; learned positions are resampled to it.
        dtype: One of job.DTYPES; the source's if not given, float32 where masters stand beside rounded tensors.
        revision: Branch, tag or commit of a name on the Hub.
        max_shard_size: In bytes, or as "5GB", the default where files are written anew; if it is given, they are.
        trust_pickle: Skip objects of unknown classes in files of torch.save; else they are refused.
        link: Whether files of weights that stay as they are may be hard links to the source's, where reflinks cannot
            be made; else they are copied. What writes into a hard link in place changes the source too.
        overwrite: Whether `out` may be there already.
        verify: Whether the folder is loaded in a fresh process and held against the source.
        log: Called with each progress message.
        on_progress: Called with the bytes written so far and the total.

    Raises:
        CheckpointError: The source is not whole, or what is wanted of it cannot be; nothing was written.
        VerificationError: The folder is not what the source is; nothing is left of it.
    """
    inserted = None if insert_vision is None else str(insert_vision)
    asked = Options(part, to_layout, from_layout, prefix, image_size, dtype, max_shard_size, inserted, link)
    asked.check()
    out, begun = Path(out), None if base is None else str(base)
    checkpoint = open_checkpoint(
        str(source), revision, base=begun, average=[str(other) for other in average], trust_pickle=trust_pickle
    )
    check_free(out, overwrite)
    tower = [find_source(inserted)[0]] if inserted and Path(inserted).exists() else []
    for origin in (*checkpoint.sources, *tower):
        keep_apart(origin, out)
    job = _plan(checkpoint, asked)
    if link and not job.kept:
        raise CheckpointError(f"{source}: --link: no file of weights stays as it is, to be linked: leave it out")
    job.notes += training_notes(checkpoint)
    for line in job.notes:
        log(line)
    with new_folder(out, overwrite) as new, _hashing(job) as hashes:
        digests = job.write_weights(new, SHARD_SIZE if max_shard_size is None else max_shard_size, on_progress)
        for line in job.write_notes():
            job.notes.append(line)
            log(line)
        job.write_folder(new)
        job.verification = job.verify(new) if verify else None
        write_provenance(
            new, checkpoint, hashes(), digests, options=_told(asked), dtype=job.dtype, record=job.record(),
            verification=job.verification,
        )  # fmt: skip
    return job


def _told(asked: Options) -> dict[str, Any]:
    """The options as provenance.json has them: without places on this machine."""
    options = asdict(asked)
    if asked.insert_vision and Path(asked.insert_vision).exists():
        options["insert_vision"] = Path(asked.insert_vision).resolve().name
    return options


def _plan(checkpoint: Checkpoint, asked: Options) -> ConversionPlan:
    """What is to be done, once it is sure that it can be."""
    part = asked.part or _default_part(checkpoint)
    _check_options(checkpoint, part, asked)
    if asked.dtype is None:
        own = match_names(checkpoint.weight_map).under(PREFIXES[part]).values() if part in PREFIXES else ()
        asked = replace(asked, dtype=checkpoint.default_dtype(own))
    plans = {"vision": _plan_vision, "connector": plan_connector, "language": plan_language, "all": plan_whole}
    return plans[part](checkpoint, asked)


def _default_part(checkpoint: Checkpoint) -> str:
    """All of a SAIL-VL; of anything else the part it is."""
    if is_sailvl(checkpoint):
        return "all"
    return "language" if is_internlm2(checkpoint.weight_map) else "vision"


def _check_options(checkpoint: Checkpoint, part: str, asked: Options) -> None:
    """
    Raises:
        CheckpointError: Options that mean nothing together, or nothing for this source.
    """
    source, is_whole = checkpoint.source.name, is_sailvl(checkpoint)
    for name in () if part == "vision" or is_internlm2(checkpoint.weight_map) else TOWER_OPTIONS:
        if getattr(asked, name) is not None:
            what = "all of a SAIL-VL: add --part vision" if part == "all" else f"--part {part}: leave it out"
            raise CheckpointError(f"{source}: --{name.replace('_', '-')} is for a tower, not for {what}")
    if asked.insert_vision is not None and asked.part not in (None, "all"):
        raise CheckpointError(f"{source}: --insert-vision makes a whole model: leave out --part {asked.part}")
    if not is_whole and (part in ("all", "connector") or asked.insert_vision is not None):
        wanted = "--insert-vision" if asked.insert_vision is not None else f"--part {part}"
        raise CheckpointError(
            f"{source}: no SAIL-VL (vision_model.*, mlp1.*, language_model.*), as {wanted} wants; `sailvit compose` "
            "makes one of a tower and a language model"
        )


def _plan_vision(checkpoint: Checkpoint, asked: Options) -> ConversionPlan:
    """An AIMv2 tower, an InternViT, or whatever other tower a SAIL-VL has."""
    if asked.from_layout is None and is_internvit(checkpoint.weight_map):
        return plan_internvit(checkpoint, asked)
    if asked.from_layout is None and has_other_tower(checkpoint):
        return plan_other_tower(checkpoint, asked)
    return plan_aimv2(checkpoint, asked)


def keep_apart(origin: Source, out: Path) -> None:
    """
    Raises:
        CheckpointError: `out` is the source, holds it, or is inside of it.
    """
    if isinstance(origin, LocalFolder):
        source, requested, target = origin.folder.resolve(), origin.requested.resolve(), out.resolve()
        if source == target or target in source.parents:
            raise CheckpointError(f"{out} holds the source: write to another place")
        if requested in (target, *target.parents):
            raise CheckpointError(f"{out} is inside of the source {origin.requested}: write to another place")


@contextmanager
def _hashing(job: ConversionPlan) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """
    Hashes the files that are read, while other work is done; the card is read for its licence. Of files of weights
    from which little is taken, only that is told: hashing them would mean reading all of them.
    """
    checkpoint, stop = job.checkpoint, threading.Event()
    asked = {*checkpoint.opened, *checkpoint.documents, checkpoint.entry, "README.md"}
    paths = {file: checkpoint.source.path(file) for file in sorted(asked & {*checkpoint.source.files})}
    taken: Counter[Path] = Counter()
    for piece in chain.from_iterable(tensor.leaves() for tensor in job.inputs()):
        taken[piece.file] += piece.nbytes
    sizes = {file: path.stat().st_size for file, path in paths.items()}
    large = {file for file in checkpoint.opened.keys() & paths.keys() if sizes[file] > SMALL}
    partly = {file: taken[paths[file]] for file in large if taken[paths[file]] < WHOLE * sizes[file]}
    with ThreadPoolExecutor(1) as pool:
        pending: dict[str, Future[str]] = {
            file: pool.submit(hash_file, path, stop) for file, path in paths.items() if file not in partly
        }
        try:
            yield lambda: {
                file: {
                    "bytes": size,
                    **({"taken": partly[file]} if file in partly else {"sha256": pending[file].result()}),
                }
                for file, size in sizes.items()
            }
        finally:
            stop.set()
