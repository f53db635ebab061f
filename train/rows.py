# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files of records -> rows that are memory-mapped.

JSON, JSONL and parquet files are written to the cache as Arrow files, once per content. A line of JSONL is stored as it
is and parsed when it is read, so that a bad line is one bad sample.
"""

import gzip
import io
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import xxhash
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from .cache import content_hash, hash_of, locked, new_file
from .corpus_file import Source, read_json
from .formats import BadSample


BATCH_BYTES = 16 << 20  # of text in an Arrow batch
HUB_TIMEOUT = 20.0  # seconds
OPEN_FILES = 64  # Arrow files that a process has open
# JSONL files up to this size (in bytes), so many of a folder at least and at most, share one entry of the cache.
SMALL_FILE, MANY_FILES, MOST_FILES = 1 << 16, 16, 1024
TEXT = "json"  # the column that holds a record of a JSON or JSONL file
LINES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Rows:
    """
    The records of one file or data set, or of several small files of a folder.

    Attributes:
        path: The file, the folder or the name on the Hub; the first of several files.
        source: An Arrow file, which is opened when it is needed, or a data set in Arrow format.
        fingerprint: Changes with the content.
        is_json: Whether a row is the text of a JSON object, in the column TEXT.
        is_lines: Whether a row is a line of a file.
        parts: Of several files, the path of each and its first row.
    """

    path: str
    source: Dataset | Path
    fingerprint: str
    is_json: bool = False
    is_lines: bool = False
    parts: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.path} and {len(self.parts) - 1} more" if self.parts else self.path

    @cached_property
    def length(self) -> int:
        return len(self.dataset)

    @property
    def dataset(self) -> Dataset:
        """The rows, in Arrow format."""
        return _open_arrow(self.source) if isinstance(self.source, Path) else self.source

    def record(self, row: int) -> Mapping[str, Any] | BadSample | None:
        """Return the record of a row, as `read_records` yields it."""
        return next(read_records(self.dataset[row : row + 1], self.is_json))

    def location(self, row: int) -> tuple[str, dict[str, int]]:
        """Return the path of the file of a row, and its line (from 1) or index (from 0) there, under that name."""
        path, first = self.path, 0
        if self.parts:
            path, first = self.parts[bisect_right(self.parts, row, key=lambda part: part[1]) - 1]
        return path, {"line": row - first + 1} if self.is_lines else {"index": row}


@lru_cache(maxsize=OPEN_FILES)
def _open_arrow(path: Path) -> Dataset:
    return Dataset.from_file(str(path)).with_format("arrow")


def read_records(table: pa.Table, is_json: bool) -> Iterator[Mapping[str, Any] | BadSample | None]:
    """Yield the record of every row of a part of `Rows.dataset`; the error of a bad one; None for an empty line."""
    yield from map(parse_json, table[TEXT].to_pylist()) if is_json else table.to_pylist()


def parse_json(line: bytes) -> Mapping[str, Any] | BadSample | None:
    """Return the record of a line of JSONL; an error if it is none; None for an empty line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadSample(f"not JSON: {error}")
    if not isinstance(record, dict):
        return BadSample(f"expected a JSON object, got {type(record).__name__}")
    return record


def open_rows(source: Source, folder: Path, cache_dir: Path) -> list[Rows]:
    """
    Return the rows of a source, file by file.

    Args:
        source: The source.
        folder: Folder that a relative path starts from.
        cache_dir: Where Arrow files are written.

    Raises:
        ValueError: Nothing matches the path, or a file is not of a known format.
        OSError: A file cannot be read, or the cache cannot be written.
    """
    path = folder / source.path
    if path.is_dir():
        return [_open_saved(path, source, cache_dir)]
    names = sorted(glob(str(path), recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
    files = [Path(name) for name in names if Path(name).is_file()]
    if path.is_file():
        files = [path]
    if files and source.split:
        raise ValueError(f"source {source.name}: {path} is a file: split is for folders of save_to_disk and the Hub")
    if files:
        return [*_open_files(files, cache_dir)]
    if source.split:
        return [_open_hub(source)]
    raise ValueError(f"source {source.name}: {path} matches no file (for a data set on the Hub, give its split, too)")


def _open_saved(path: Path, source: Source, cache_dir: Path) -> Rows:
    """Open a folder that `save_to_disk` of datasets wrote."""
    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"source {source.name}: {path} is no folder of save_to_disk: give a pattern of files, as in {path}/*.jsonl"
        ) from error
    except IndexError as error:  # datasets cannot open a folder without rows
        raise ValueError(f"source {source.name}: {path} contains no records") from error
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"source {source.name}: expected a split of {', '.join(dataset)}, got {source.split}")
        dataset = dataset[source.split]
    files = sorted({entry["filename"] for entry in dataset.cache_files})
    hashes = [content_hash(Path(file), cache_dir) for file in files]
    return _loaded(str(path), dataset, hash_of([hashes, source.split]))


def _open_hub(source: Source) -> Rows:
    try:
        if not HF_HUB_OFFLINE:  # one request: load_dataset would retry for a minute if the Hub cannot be reached
            HfApi().dataset_info(source.path, timeout=HUB_TIMEOUT)
        dataset = load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # datasets raises its own and the Hub client's errors
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"source {source.name}: {source.path}, split {source.split}: {message}") from error
    return _loaded(source.path, dataset, dataset._fingerprint)


def _loaded(path: str, dataset: Dataset, fingerprint: str) -> Rows:
    if not len(dataset):
        raise ValueError(f"{path}: contains no records")
    return Rows(path, dataset.with_format("arrow"), fingerprint)


def _open_files(files: Iterable[Path], cache_dir: Path) -> Iterator[Rows]:
    """Yield the rows of files, consecutive small JSONL files of a folder together."""

    def folder_of_small(file: Path) -> Path | None:
        is_small = file.name.lower().endswith(".jsonl") and file.stat().st_size <= SMALL_FILE
        return file.parent if is_small else None

    for folder, group in groupby(files, key=folder_of_small):
        own = [*group]
        if folder is None or len(own) < MANY_FILES:
            yield from (_open_file(file, cache_dir) for file in own)
        else:
            for start in range(0, len(own), MOST_FILES):
                yield _open_small(own[start : start + MOST_FILES], cache_dir)


def _open_small(files: Sequence[Path], cache_dir: Path) -> Rows:
    """Return the rows of JSONL files, which are read and hashed each time."""
    parts, lines, hashes = [], [], []
    for file in files:
        content = file.read_bytes()
        if not content:
            raise ValueError(f"{file}: contains no records")
        parts.append((str(file), len(lines)))
        lines += io.BytesIO(content)
        hashes.append(xxhash.xxh3_128_hexdigest(content))
    fingerprint = hash_of(hashes)
    arrow = cache_dir / "rows" / f"{fingerprint}-lines.arrow"
    with locked(arrow):
        if not arrow.exists():
            _write_arrow(arrow, [_text_batch(lines)], files[0])
    return Rows(str(files[0]), arrow, fingerprint, is_json=True, is_lines=True, parts=tuple(parts))


def _open_file(file: Path, cache_dir: Path) -> Rows:
    name = file.name.lower()
    if name.endswith(LINES):
        return _cached(file, cache_dir, _read_lines, is_json=True, is_lines=True)
    if name.endswith(".json"):
        return _cached(file, cache_dir, _read_array, is_json=True)
    if name.endswith(".parquet"):
        return _cached(file, cache_dir, _read_parquet)
    raise ValueError(f"{file}: expected a .json, {', '.join(LINES)} or .parquet file")


def _cached(
    file: Path,
    cache_dir: Path,
    read: Callable[[Path], Iterable[pa.RecordBatch]],
    is_json: bool = False,
    is_lines: bool = False,
) -> Rows:
    """Return the rows of a file, from its Arrow file in the cache, which is written if it does not exist."""
    fingerprint = content_hash(file, cache_dir)
    arrow = cache_dir / "rows" / f"{fingerprint}{'-lines' if is_lines else ''}.arrow"
    with locked(arrow):
        if not arrow.exists():
            _write_arrow(arrow, read(file), file)
    return Rows(str(file), arrow, fingerprint, is_json, is_lines)


def _write_arrow(target: Path, batches: Iterable[pa.RecordBatch], file: Path) -> None:
    with new_file(target) as temporary:
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise ValueError(f"{file}: contains no records")
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in iterator:
                writer.write_batch(batch)


def _read_lines(file: Path) -> Iterator[pa.RecordBatch]:
    lines, size = [], 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size > BATCH_BYTES:
                    yield _text_batch(lines)
                    lines, size = [], 0
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: truncated or corrupt: {error}") from error
    if lines:
        yield _text_batch(lines)


def _read_array(file: Path) -> Iterator[pa.RecordBatch]:
    """Read the list of records of a JSON file, which has to fit into memory."""
    records = read_json(file)
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected a list of records or InternVL's meta JSON, got {type(records).__name__}")
    for start in range(0, len(records), 1000):
        yield _text_batch([json.dumps(record).encode() for record in records[start : start + 1000]])


def _text_batch(lines: list[bytes]) -> pa.RecordBatch:
    return pa.record_batch({TEXT: pa.array(lines, pa.large_binary())})


def _read_parquet(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=100)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a valid parquet file: {' '.join(str(error).split())}") from error
