"""A checkpoint in, a folder out: the steps of `sailvit convert`."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .folder import RUNTIMES, check_expressible, crops_pictures, says_pictures, write_folder, write_provenance
from .layouts import Layout, Move, layout_named, plan_moves
from .problems import CheckpointError, raise_first
from .readers import PROVENANCE, TORCH_DTYPES, Checkpoint, StoredTensor, hash_file
from .sources import LocalFolder, Source, find_source
from .tower import Tower, find_tower
from .values import cast, compute_positions, is_finite, recorded_hashes, to_bytes, value_problems
from .verify import verify_folder
from .writer import NewTensor, check_free, check_space, new_folder, split_in_shards, write_weights


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Conversion:
    """
    What is to be done, or was.

    Attributes:
        checkpoint: The source.
        tower: What was found in it.
        layout: What is written.
        fields: Those of SAILViTConfig, of what is written.
        dtype: Of what is written, a key of readers.ITEM_SIZES.
        positions: How the positions were computed, where they are not the source's.
        notes: What was dropped or assumed, line by line.
        verification: The reference, and how far the folder's tokens are from its; None if they were not compared.
    """

    checkpoint: Checkpoint
    tower: Tower
    layout: Layout
    fields: dict[str, Any]
    dtype: str
    positions: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    verification: dict[str, Any] | None = None

    @property
    def learned(self) -> StoredTensor | None:
        """The source's learned positions."""
        return self.tower.tensors.get(self.tower.found.layout.names_of("preprocessor.pos_embed")[0])

    @property
    def resampled(self) -> bool:
        """Whether learned positions are written for another grid than the source's."""
        return self.learned is not None and self.tower.shape.grid_size != self.grid_size

    @property
    def grid_size(self) -> int | None:
        """Side of the square of positions that is written; None where they are left to be computed."""
        if self.fields["pos_embed_type"] == "sincos" and self.layout.has_sincos:
            return None
        return self.fields["image_size"] // self.fields["patch_size"]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to_layout: str = "sailvit",
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
) -> Conversion:
    """
    Writes the tower of a checkpoint to a folder, in another layout, resolution or precision; whole or not at all.

    Args:
        source: A file, a folder or a name on the Hub.
        out: The folder to be.
        to_layout: A key of LAYOUTS.
        from_layout: The layout of the source; recognised if not given.
        prefix: What stands before the tower's names, where more than one tower could be meant.
        image_size: Height and width in pixels; learned positions are resampled to it.
        dtype: One of DTYPES; the source's if not given.
        revision: Branch, tag or commit of a name on the Hub.
        max_shard_size: In bytes, or as "5GB".
        trust_pickle: Whether files of torch.save may run code of their own.
        overwrite: Whether `out` may be there already.
        verify: Whether the folder is loaded in a fresh process and its tokens are compared.
        say: Told what was found and done, line by line.
        progress: Told the bytes that are written, and how many there will be.

    Raises:
        CheckpointError: The source is not whole, or what is wanted of it cannot be; nothing was written.
        VerificationError: The folder gave other tokens than the source; nothing is left of it.
    """
    _check_options(image_size, dtype, max_shard_size)
    target = layout_named(to_layout)
    out, (origin, entry) = Path(out), find_source(str(source), revision)
    check_free(out, overwrite)
    _keep_apart(origin, out)
    job = _plan(Checkpoint(origin, entry, trust_pickle), from_layout, prefix, target, image_size, dtype)
    for line in (job.tower.found.reason, *job.notes):
        say(line)
    asked = {"image_size": image_size, "dtype": dtype, "max_shard_size": max_shard_size, "from_layout": from_layout,
             "to_layout": to_layout, "prefix": prefix}  # fmt: skip
    with new_folder(out, overwrite) as part, _hashing(job.checkpoint) as hashes:
        digests = _write_tensors(part, job, max_shard_size, progress)
        write_folder(part, job)
        if verify and job.layout.name in RUNTIMES:
            job.verification = verify_folder(part, job)
        write_provenance(part, job, asked, hashes(), digests)
    return job


def _check_options(image_size: int | None, dtype: str | None, max_shard_size: int | str) -> None:
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise CheckpointError(f"image size {image_size!r}: a whole number of pixels is wanted")
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} is wanted")
    split_in_shards({}, max_shard_size)


def _keep_apart(origin: Source, out: Path) -> None:
    if isinstance(origin, LocalFolder):
        source, target = origin.folder.resolve(), out.resolve()
        if source == target or target in source.parents:
            raise CheckpointError(f"{out} holds the source: write to another place")


def _plan(
    checkpoint: Checkpoint,
    from_layout: str | None,
    prefix: str | None,
    layout: Layout,
    image_size: int | None,
    dtype: str | None,
) -> Conversion:
    """What is to be done, once it is sure that it can be."""
    tower = find_tower(checkpoint, from_layout, prefix)
    harmless = ("mixed",) if dtype else ()
    raise_first([problem for problem in tower.problems if problem.kind not in harmless], checkpoint.source.name)
    fields = {**tower.fields, "image_size": image_size or tower.fields["image_size"]}
    if not layout.has_sincos:
        fields["pos_embed_type"] = "absolute"
    if fields["image_size"] % fields["patch_size"]:
        raise CheckpointError(f"--image-size {image_size}: not a multiple of the patch, {fields['patch_size']} pixels")
    job = Conversion(checkpoint, tower, layout, fields, TORCH_DTYPES[dtype] if dtype else next(iter(tower.dtypes)))
    if job.dtype not in map(TORCH_DTYPES.get, DTYPES):
        raise CheckpointError(f"{checkpoint.source.name}: the tower is {job.dtype}: choose with --dtype")
    check_expressible(job)
    job.positions = _how_positions(job)
    job.notes = _notes(job)
    _check_values(job)
    return job


def _how_positions(job: Conversion) -> dict[str, Any] | None:
    before, after = job.tower.shape.grid_size, job.grid_size
    if after in (before, None):
        return None
    if before is None:
        return {"to": [after, after], "method": "2-D sine-cosine, written out: the layout has no computed ones"}
    return {"from": [before, before], "to": [after, after], "method": "bicubic, antialiased, in float32"}


def _notes(job: Conversion) -> list[str]:
    found, notes = job.tower.found, []
    if found.wrappers:
        notes.append(f"left out of the names: {', '.join(found.wrappers)}")
    if found.heads:
        notes.append(f"dropped: a head, {len(found.heads)} tensors ({found.heads[0]}, ...)")
    for part, count in found.others.items():
        notes.append(f"not of the tower, left: {part} ({count} tensors)")
    if job.tower.shape.grid_size is None:
        notes.append("no learned positions: a `native` tower, with sine-cosine positions")
    if job.layout.name in RUNTIMES and not says_pictures(job.checkpoint):
        notes.append("the source does not say how pictures are normalised: ImageNet's mean and std, SAILViT's, assumed")
    if (job.fields["image_size"] // job.fields["patch_size"]) % job.fields.get("pixel_shuffle_factor", 2):
        notes.append(f"{job.fields['image_size']} pixels make a grid that the pixel shuffle does not divide")
    if job.layout.name in RUNTIMES and crops_pictures(job.checkpoint):
        notes.append("the source crops pictures to a square; what is written resizes them to it, as SAILViT does")
    if job.positions:
        grid = " x ".join(map(str, job.positions["to"]))
        notes.append(f"positions computed for {grid}: {job.positions['method']}")
    return notes


def _check_values(job: Conversion) -> None:
    """Holds the source's tensors against its provenance.json, and against checksums of their files, where there are."""
    hashes = recorded_hashes(job.checkpoint.document(PROVENANCE), "tensors")
    stored = {job.tower.found.names[name]: tensor for name, tensor in job.tower.tensors.items()}
    if hashes or any(tensor.mapped is not None for tensor in stored.values()):
        raise_first(value_problems(stored, hashes), job.checkpoint.source.name)


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


def _write_tensors(
    part: Path, job: Conversion, max_shard_size: int | str, progress: Callable[[int, int], None]
) -> dict[str, str]:
    tower, prefix = job.tower, job.layout.prefix
    tensors = [
        NewTensor(prefix + move.target.name, job.dtype, move.target.shape, lambda move=move: _chunks(job, move))
        for move in plan_moves(tower.found.layout, job.layout, tower.shape, job.grid_size)
    ]
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        progress(done, total)

    check_space(part, total)
    whole = job.layout.name in RUNTIMES and not RUNTIMES[job.layout.name].reads_shards
    return write_weights(part, tensors, total + 1 if whole else max_shard_size, count)


def _chunks(job: Conversion, move: Move) -> Iterator[np.ndarray]:
    """The bytes of a tensor to be written."""
    if not move.sources:
        yield cast(to_bytes(compute_positions(job.learned, job.fields["hidden_size"], job.grid_size)), "F32", job.dtype)
    for name, start, stop in move.sources:
        tensor, stored = job.tower.tensors[name], job.tower.found.names[name]
        for chunk in tensor.chunks(start, stop):
            if not is_finite(chunk, tensor.dtype):
                raise CheckpointError(f"{tensor.file}: {stored} holds NaN or infinity: the checkpoint is broken")
            written = cast(chunk, tensor.dtype, job.dtype)
            if written is not chunk and not is_finite(written, job.dtype):
                raise CheckpointError(f"{tensor.file}: {stored} has values beyond {job.dtype}: try --dtype bfloat16")
            yield written
