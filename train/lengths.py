# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tokens and tiles of every sample, from the tokenizer and the headers of images, without decoding pixels.

They are computed once and cached under a hash of what they depend on: the content of the file, the tokenizer, the chat
template, the tiling options, and the options of the source. A change of an image file is noticed when it is read.
"""

import functools
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Value
from PIL import Image

from ..processing_sailvl import SAILVLProcessor, TokenCounts
from .cache import hash_of, locked, new_file
from .formats import BadSample, FilteredSample, FormatOptions, Sample, parse_record
from .rows import Rows, read_records
from .tile_processor import TileProcessor


BATCH_SIZE = 200
ROWS_PER_PROCESS = 500  # fewer rows than this are not worth starting a process for
NO_KIND = ""  # the kind of a sample whose record names none
# Options of the image processor that decide on the number of tiles.
TILING_OPTIONS = ("do_tile", "min_tiles", "max_tiles", "use_thumbnail", "msac", "size", "do_exif_transpose")
COLUMNS = ("tokens", "answers", "tiles")
FEATURES = Features({**{name: Value("int32") for name in COLUMNS}, "kind": Value("string"), "reason": Value("string")})
VERSION = 1  # raise it when the counts of the same sample change


@dataclass(frozen=True)
class Lengths:
    """
    Tokens and tiles of every row of a file.

    Attributes:
        folder: Where the arrays are.
        kind_names: The kinds that the records name, in the order of their numbers.
        skipped: Row and reason of every bad sample.
        num_used: Rows that are samples and can be used.
        digest: A hash of all of it.
    """

    folder: Path
    kind_names: list[str]
    skipped: list[tuple[int, str]]
    num_used: int
    digest: str

    def column(self, name: str) -> np.ndarray:
        """Return tokens, answers, tiles (rows,) int32, 0 for rows that are not used, or kinds (rows,) int32."""
        return np.load(self.folder / f"{name}.npy")


@dataclass(frozen=True)
class SampleReader:
    """
    Reads the records of a source as samples.

    Attributes:
        processor: Tokenizes the samples, or makes tiles of their pictures alone.
        processor_hash: `hash_processor` of it.
        formats: How the records are read.
        processor_options: Options of the processor for these samples: max_tiles, num_frames.
    """

    processor: SAILVLProcessor | TileProcessor
    processor_hash: str
    formats: FormatOptions
    processor_options: Mapping[str, Any]

    def read(self, record: Mapping[str, Any] | BadSample | None) -> Sample:
        """
        Return the sample of a record from `Rows.records`.

        Raises:
            BadSample: The record is bad.
            FilteredSample: The record is no sample, or filtered out.
        """
        if isinstance(record, BadSample):
            raise record
        if record is None:
            raise FilteredSample("an empty line")
        sample = replace(parse_record(record, self.formats), options=self.processor_options)
        return self.processor.select(sample) if isinstance(self.processor, TileProcessor) else sample

    def count(self, samples: list[Sample]) -> list[TokenCounts | str]:
        """Return the counts of samples, or the reason why one cannot be used."""
        chats = [sample.conversations for sample in samples]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                counts = self.processor.count_tokens([c for chat in chats for c in chat], **self.processor_options)
        except ImportError:  # of PyAV, which all videos need
            raise
        except Exception as error:  # decoders raise nearly anything on a broken file
            if len(samples) == 1:
                return [" ".join(str(error).split()) or type(error).__name__]
            return [count for sample in samples for count in self.count([sample])]
        remaining = iter(counts)
        pairs = zip(samples, chats, strict=True)
        return [_of_sample(list(islice(remaining, len(chat))), sample.share_prompt) for sample, chat in pairs]

    def hash(self) -> str:
        """Return a hash of all that the counts of a record depend on."""
        formats = {**asdict(self.formats), "image_root": str(Path(self.formats.image_root or "").resolve())}
        return hash_of([VERSION, self.processor_hash, dict(self.processor_options), formats])


def _of_sample(counts: list[TokenCounts], share_prompt: bool) -> TokenCounts | str:
    """Return the counts of a sample from those of its conversations, which all show the same tiles."""
    if not all(count.answers for count in counts):
        return "no token of an answer"
    first, *others = counts
    tokens = first.tokens + sum(count.tokens - (count.prefix if share_prompt else 0) for count in others)
    return TokenCounts(tokens, sum(count.answers for count in counts), first.tiles, first.prefix)


def hash_processor(processor: SAILVLProcessor | TileProcessor) -> str:
    """Return a hash of tokenizer, chat template and tiling options."""
    tiling = {name: getattr(processor.image_processor, name) for name in TILING_OPTIONS}
    if isinstance(processor, TileProcessor):
        return hash_of({"patches": processor.patches, "tiling": tiling})
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    described = {
        "tokenizer": {key: tokenizer[key] for key in tokenizer.keys() - {"padding", "truncation"}},
        "special_tokens": processor.tokenizer.special_tokens_map,
        "chat_template": processor.chat_template,
        "image_seq_length": processor.image_seq_length,
        "tiling": tiling,
    }
    return hash_of(described)


def measure(rows: Rows, reader: SampleReader, cache_dir: Path, num_proc: int | None = None) -> Lengths:
    """
    Return the lengths of all rows, from the cache if they are there.

    Args:
        rows: The rows of a file.
        reader: Reads and counts the samples.
        cache_dir: The cache.
        num_proc: Processes to use.

    Raises:
        OSError: The cache cannot be written.
        ImportError: There is a video file, and PyAV is not installed.
    """
    fingerprint = hash_of([rows.fingerprint, rows.is_lines, reader.hash()])
    folder = cache_dir / "lengths" / fingerprint
    with locked(folder):
        if not folder.exists():
            with new_file(folder) as temporary:
                temporary.mkdir()
                counted = _count_rows(rows, reader, fingerprint, temporary / "counted.arrow", num_proc)
                _save_table(temporary, counted.data)
                del counted  # closes its files
                for file in temporary.glob("counted*"):
                    file.unlink()
        return _load(folder)


def remeasure_skipped(lengths: Lengths, rows: Rows, reader: SampleReader) -> Lengths:
    """Return the lengths after another look at the bad samples, whose images may be there by now."""
    indices = [row for row, _ in lengths.skipped]
    found: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for start in range(0, len(indices), BATCH_SIZE):
        table = rows.dataset.select(indices[start : start + BATCH_SIZE])[:]
        for name, values in _count_table(table, rows.is_json, reader).items():
            found[name] += values
    if found["reason"] == [reason for _, reason in lengths.skipped]:
        return lengths
    names = list(dict.fromkeys([*lengths.kind_names, *found["kind"]]))
    columns = {name: lengths.column(name) for name in (*COLUMNS, "kinds")}
    for name in COLUMNS:
        columns[name][indices] = found[name]
    columns["kinds"][indices] = [names.index(kind) for kind in found["kind"]]
    skipped = [(row, reason) for row, reason in zip(indices, found["reason"], strict=True) if reason]
    with locked(lengths.folder):
        with new_file(lengths.folder) as temporary:
            temporary.mkdir()
            _save(temporary, columns, names, skipped)
            shutil.rmtree(lengths.folder)
        return _load(lengths.folder)


def _count_rows(rows: Rows, reader: SampleReader, fingerprint: str, file: Path, num_proc: int | None) -> Dataset:
    processes = min(num_proc or 1, 1 + rows.length // ROWS_PER_PROCESS)
    with _interrupts_to_this_process():
        return rows.dataset.map(
            functools.partial(_count_table, is_json=rows.is_json, reader=reader),
            batched=True,
            batch_size=BATCH_SIZE,
            remove_columns=rows.dataset.column_names,
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(file),
            new_fingerprint=fingerprint,
            desc=Path(rows.path).name,
        )


@contextmanager
def _interrupts_to_this_process() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C: this one ends them, without a traceback of each."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    was_interrupted = False

    def note(number: int, frame: Any) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        if os.getpid() == own:
            raise KeyboardInterrupt

    own = os.getpid()
    if is_main:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:  # datasets waits for its processes, and raises what it meets
        if was_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)


def _save_table(folder: Path, table: Any) -> None:
    """Save columns of FEATURES."""
    kinds = table["kind"].combine_chunks().dictionary_encode()
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    columns["kinds"] = kinds.indices.to_numpy(zero_copy_only=False).astype(np.int32)
    skipped = [(row, reason) for row, reason in enumerate(table["reason"].to_pylist()) if reason]
    _save(folder, columns, kinds.dictionary.to_pylist(), skipped)


def _save(
    folder: Path, columns: Mapping[str, np.ndarray], kind_names: list[str], skipped: list[tuple[int, str]]
) -> None:
    digest = xxhash.xxh3_128(json.dumps([kind_names, skipped]).encode())
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
        digest.update(np.ascontiguousarray(column))
    facts = {"kind_names": kind_names, "skipped": skipped, "num_used": int(np.count_nonzero(columns["tokens"]))}
    (folder / "facts.json").write_text(json.dumps({**facts, "digest": digest.hexdigest()}))


def _load(folder: Path) -> Lengths:
    facts = json.loads((folder / "facts.json").read_text())
    return Lengths(folder, **{**facts, "skipped": [(row, reason) for row, reason in facts["skipped"]]})


def _count_table(table: pa.Table, is_json: bool, reader: SampleReader) -> dict[str, list[Any]]:
    """Return the columns of FEATURES for some rows."""
    results: list[TokenCounts | str] = []
    samples: dict[int, Sample] = {}
    for record in read_records(table, is_json):
        result: TokenCounts | str = ""
        try:
            samples[len(results)] = reader.read(record)
        except FilteredSample:
            pass
        except BadSample as error:
            result = str(error)
        results.append(result)
    for index, count in zip(samples, reader.count([*samples.values()]) if samples else (), strict=True):
        results[index] = count
    counts = [TokenCounts(0, 0, 0) if isinstance(result, str) else result for result in results]
    columns = {name: [getattr(count, name) for count in counts] for name in COLUMNS}
    kinds = [(samples[index].kind or NO_KIND) if index in samples else NO_KIND for index in range(len(results))]
    return {**columns, "kind": kinds, "reason": [result if isinstance(result, str) else "" for result in results]}
