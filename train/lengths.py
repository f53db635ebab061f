# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tokens and tiles of every sample, from the tokenizer and the headers of images, without decoding pixels.

They are computed once and cached under a hash of what they depend on: the content of the file, the tokenizer, the chat
template, the tiling options, and the options of the source. A change of an image file is not noticed.
"""

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from PIL import Image

from ..processing_sailvl import SAILVLProcessor, TokenCounts
from .cache import hash_of, locked, new_file
from .formats import BadSample, FilteredSample, FormatOptions, Sample, parse_record
from .rows import Rows, read_records


BATCH_SIZE = 200
ROWS_PER_PROCESS = 500  # fewer rows than this are not worth starting a process for
UNKNOWN = ""  # the kind of a sample whose record names none
# Options of the image processor that decide on the number of tiles.
TILING_OPTIONS = ("do_tile", "min_tiles", "max_tiles", "use_thumbnail", "msac", "size", "do_exif_transpose")
COLUMNS = {"tokens": np.int32, "answers": np.int32, "tiles": np.int32}
FEATURES = Features({**{name: Value("int32") for name in COLUMNS}, "kind": Value("string"), "reason": Value("string")})
VERSION = 1  # raise it when the counts of the same sample change


@dataclass(frozen=True)
class Lengths:
    """
    Tokens and tiles of every row of a file.

    Attributes:
        tokens, answers, tiles: (rows,) int32, as in TokenCounts; memory-mapped; 0 for rows that are not used.
        kinds: (rows,) indices into `kind_names`, the kinds that the records name; memory-mapped.
        skipped: Row and reason of every bad sample.
        fingerprint: Changes with everything that the lengths depend on.
    """

    tokens: np.ndarray
    answers: np.ndarray
    tiles: np.ndarray
    kinds: np.ndarray
    kind_names: list[str]
    skipped: list[tuple[int, str]]
    fingerprint: str


@dataclass(frozen=True)
class SampleReader:
    """
    Reads the records of a source as samples.

    Attributes:
        processor: Tokenizes the samples.
        formats: How the records are read.
        processor_options: Options of the processor for these samples: max_tiles, num_frames.
    """

    processor: SAILVLProcessor
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
        return replace(parse_record(record, self.formats), options=self.processor_options)

    def count(self, samples: list[Sample]) -> list[TokenCounts | str]:
        """Return the counts of samples, or the reason why one cannot be used."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                counts = self.processor.count_tokens([s.messages for s in samples], **self.processor_options)
        except (ValueError, TypeError, OSError) as error:
            if len(samples) == 1:
                return [" ".join(str(error).split())]
            return [count for sample in samples for count in self.count([sample])]
        return [count if count.answers else "no token of an answer" for count in counts]

    def fingerprint(self) -> str:
        processor = self.processor
        tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        described = {
            "version": VERSION,
            "tokenizer": {key: tokenizer[key] for key in tokenizer.keys() - {"padding", "truncation"}},
            "special_tokens": processor.tokenizer.special_tokens_map,
            "chat_template": processor.chat_template,
            "image_seq_length": processor.image_seq_length,
            "tiling": {name: getattr(processor.image_processor, name) for name in TILING_OPTIONS},
            "processor_options": dict(self.processor_options),
            "formats": {name: value for name, value in asdict(self.formats).items() if name != "kind"},
        }
        return hash_of(described)


def compute_lengths(rows: Rows, reader: SampleReader, cache_dir: Path, num_proc: int | None = None) -> Lengths:
    """
    Return the lengths of all rows, from the cache if they are there.

    Args:
        rows: The rows of a file.
        reader: Reads and counts the samples.
        cache_dir: The cache.
        num_proc: Processes to use.

    Raises:
        OSError: The cache cannot be written.
    """
    fingerprint = hash_of([rows.fingerprint, rows.is_lines, reader.fingerprint()])
    folder = cache_dir / "lengths" / fingerprint
    with locked(folder):
        if not folder.exists():
            with new_file(folder) as temporary:
                temporary.mkdir()
                counted = _count_rows(rows, reader, fingerprint, temporary / "counted.arrow", num_proc)
                _write_lengths(counted.data, temporary)
                del counted  # closes its files
                for file in temporary.glob("counted*"):
                    file.unlink()
    facts = json.loads((folder / "facts.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*COLUMNS, "kinds")}
    skipped = [(row, reason) for row, reason in facts["skipped"]]
    return Lengths(**arrays, kind_names=facts["kind_names"], skipped=skipped, fingerprint=fingerprint)


def _count_rows(rows: Rows, reader: SampleReader, fingerprint: str, file: Path, num_proc: int | None) -> Dataset:
    processes = min(num_proc or 1, 1 + len(rows) // ROWS_PER_PROCESS)
    return rows.dataset.with_format("arrow").map(
        functools.partial(_count_table, reader=reader),
        batched=True,
        batch_size=BATCH_SIZE,
        remove_columns=rows.dataset.column_names,
        features=FEATURES,
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(file),
        new_fingerprint=fingerprint,
        desc=Path(rows.path).name,
    )


def _write_lengths(table: Any, folder: Path) -> None:
    """Write columns of FEATURES as the files that `compute_lengths` reads."""
    for name in COLUMNS:
        np.save(folder / f"{name}.npy", table[name].to_numpy())
    kinds = table["kind"].combine_chunks().dictionary_encode()
    np.save(folder / "kinds.npy", kinds.indices.to_numpy(zero_copy_only=False).astype(np.int32))
    skipped = [(row, reason) for row, reason in enumerate(table["reason"].to_pylist()) if reason]
    (folder / "facts.json").write_text(json.dumps({"kind_names": kinds.dictionary.to_pylist(), "skipped": skipped}))


def _count_table(table: pa.Table, reader: SampleReader) -> dict[str, list[Any]]:
    """Return the columns of FEATURES for some rows."""
    results: list[TokenCounts | str] = []
    samples: dict[int, Sample] = {}
    for record in read_records(table):
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
    columns = dict(zip(COLUMNS, map(list, zip(*counts, strict=True)), strict=True))
    kinds = [(samples[index].kind or UNKNOWN) if index in samples else UNKNOWN for index in range(len(results))]
    return {**columns, "kind": kinds, "reason": [result if isinstance(result, str) else "" for result in results]}
