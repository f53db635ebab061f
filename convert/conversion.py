"""Convert a checkpoint to a folder, as `sailvit convert` does: open, detect, plan, write, verify."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from .detect import plan_conversion
from .export.provenance import save_record
from .plan import SHARD_SIZE, ConversionPlan, Options
from .storage.files import hash_file
from .storage.output_folder import check_free, new_folder
from .storage.sources import PROVENANCE, check_separate, describe_source, find_source
from .storage.tensors import torch_name
from .storage.training_run import open_checkpoint


# A weight file is hashed if it is small (bytes), or if at least this share of its bytes is read.
SMALL_FILE, MOST_OF_FILE = 1 << 20, 0.9


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
    log: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionPlan:
    """
    Write a checkpoint, or one component of it, to a folder in another layout, resolution or dtype.

    Args (those that are not named here are documented in Options):
        source: File, folder or name on the Hub.
        out: The new folder; it is complete or does not exist.
        base: The model before the training: frozen or bf16-rounded parameters are its, an adapter is merged into it.
        average: More checkpoints of the same run; the mean of all is converted.
        revision: Branch, tag or commit of a name on the Hub.
        trust_pickle: Skip objects of unknown classes in torch.save files; otherwise they are refused.
        verify: Whether to load the folder in a clean process and compare its outputs with the source's.
        log: Called with each progress message.
        on_progress: Called with the bytes written so far and the total.

    Raises:
        CheckpointError: Invalid source or options; nothing was written.
        VerificationError: The folder does not load, or its outputs differ; it was removed.
    """
    base, inserted = (None if path is None else str(path) for path in (base, insert_vision))
    options = Options(part, to_layout, from_layout, prefix, image_size, dtype, max_shard_size, inserted, link)
    options.check()
    out, average = Path(out), [*map(str, average)]
    checkpoint = open_checkpoint(str(source), revision, base=base, average=average, trust_pickle=trust_pickle)
    local = [find_source(inserted)[0]] if inserted and Path(inserted).exists() else []
    check_separate(out, [*checkpoint.sources, *local])
    check_free(out, overwrite)
    plan = plan_conversion(checkpoint, options)
    logged = len(plan.notes)
    for note in plan.notes:
        log(note)
    with new_folder(out, overwrite) as folder, _hash_sources(plan) as hashes:
        digests = plan.write_weights(folder, SHARD_SIZE if max_shard_size is None else max_shard_size, on_progress)
        for note in plan.notes[logged:]:
            log(note)
        plan.write_folder(folder)
        plan.verification = plan.verify(folder) if verify else None
        _write_provenance(folder, plan, options, hashes(), digests)
    return plan


def _write_provenance(
    folder: Path, plan: ConversionPlan, options: Options, files: dict[str, dict[str, Any]], digests: dict[str, str]
) -> None:
    """Write provenance.json; files: file of the source -> its bytes and sha256; digests: written tensor -> sha256."""
    checkpoint, details, training = plan.checkpoint, plan.provenance(), plan.checkpoint.training_metadata
    source = {**describe_source(checkpoint.source), **details.pop("source", {}), "files": files}
    if before := checkpoint.document(PROVENANCE).get("source"):
        source["source"] = before
    content = {"source": source, **({"training": training} if training else {}), "options": options.provenance()}
    kept = {name: {"sha256": files[original]["sha256"]} for name, original in details.pop("kept", {}).items()}
    content |= {"dtype": torch_name(plan.dtype), **details, "verification": plan.verification}
    save_record(folder, content, kept, digests)


@contextmanager
def _hash_sources(plan: ConversionPlan) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """
    Hash the source files in the background, README.md among them for its licence; yields a function that returns
    file -> its bytes and sha256. Of a large weight file that is partly read, the bytes read are given instead.
    """
    checkpoint, stop = plan.checkpoint, threading.Event()
    read = {*checkpoint.opened, *checkpoint.documents, checkpoint.entry, "README.md"} & {*checkpoint.source.files}
    paths = {file: checkpoint.source.path(file) for file in sorted(read)}
    files: dict[str, dict[str, Any]] = {file: {"bytes": path.stat().st_size} for file, path in paths.items()}
    taken: Counter[Path] = Counter()
    for leaf in chain.from_iterable(tensor.leaves() for tensor in plan.source_tensors()):
        taken[leaf.file] += leaf.nbytes
    for file in checkpoint.opened.keys() & paths.keys():
        if files[file]["bytes"] > SMALL_FILE and taken[paths[file]] < MOST_OF_FILE * files[file]["bytes"]:
            files[file]["taken"] = taken[paths[file]]
    with ThreadPoolExecutor(1) as pool:
        hashes = {file: pool.submit(hash_file, paths[file], stop) for file in paths if "taken" not in files[file]}
        try:
            yield lambda: {**files, **{file: {**files[file], "sha256": hashes[file].result()} for file in hashes}}
        finally:
            stop.set()
