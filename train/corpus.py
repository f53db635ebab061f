# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The samples of a training mix, with their lengths.

    corpus.yaml -> sources -> rows of files -> lengths of every row -> mix: the samples of an epoch

Everything that grows with the number of samples is memory-mapped from the cache and shared by the processes of a node.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..processing_sailvl import SAILVLProcessor
from .cache import MappedArrays, cache_errors, hash_of, store_arrays
from .corpus_file import MOST_REPEATS, CorpusFile, Source, expand_meta, read_corpus_file
from .formats import FORMATS, JOINT, UNKNOWN, BadSample, FilteredSample, FormatOptions, Sample
from .lengths import COLUMNS, Lengths, SampleReader, hash_processor, measure, remeasure_skipped
from .mix import draw, scale_kinds
from .rows import Rows, open_rows
from .tile_processor import TileProcessor


TOO_LONG = ("drop", "truncate", "fail")


class TooManyBadSamplesError(ValueError):
    """More samples are bad than `max_bad_fraction` allows."""


@dataclass(frozen=True)
class Skipped:
    """A bad sample, which is left out: its source, file, line (from 1) or index (from 0), and the reason."""

    source: str
    path: str
    location: Mapping[str, int]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "path": self.path, **self.location, "reason": self.reason}

    def __str__(self) -> str:
        ((name, number),) = self.location.items()
        return f"{self.source}: {self.path}, {name} {number}: {self.reason}"


@dataclass(frozen=True)
class SourceFile:
    """The rows of one file of a source; `start` is the number of its first row in the corpus."""

    source: Source
    rows: Rows
    reader: SampleReader
    start: int

    def kind_of(self, record_kind: str) -> str:
        return self.source.kind or record_kind or UNKNOWN


@dataclass(frozen=True, eq=False, repr=False)
class Corpus(Sequence):
    """
    The samples of an epoch, each with its lengths. `corpus[index]` reads a sample.

    Attributes:
        processor: The processor that the lengths are computed with.
        files: The files of all sources.
        arrays: tokens, answers, tiles (samples,) int32; rows (samples,) int64, numbered over all files; kinds
            (samples,) int32; turns (samples,) int32, the messages that a sample is truncated to, 0 for all.
        kind_names: The kinds, in the order of `kinds`; of samples with turns of several kinds also that of each turn.
        skipped: The bad samples of all files.
        fingerprint: Changes with the samples, their order and their lengths.
        cache_dir: The cache.
        too_long: What `fit` did to samples that are too long, and to how many: {"dropped": 3}.
        max_bad_fraction: The part of the samples that may be bad.
    """

    processor: SAILVLProcessor | TileProcessor
    files: tuple[SourceFile, ...]
    arrays: MappedArrays
    kind_names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str
    cache_dir: Path
    too_long: Mapping[str, int] = field(default_factory=dict)
    max_bad_fraction: float = 1.0

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        processor: SAILVLProcessor | TileProcessor,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
        max_bad_fraction: float | None = None,
        recheck: bool = False,
        share_prompt: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> "Corpus":
        """
        Read a corpus.yaml, and compute the lengths of its samples where they are not in the cache.

        Args:
            path: The file.
            processor: The processor of the model to train.
            cache_dir: Default: `sailvit` in the cache of the datasets library.
            num_proc: Processes that compute lengths. Default: 1.
            max_bad_fraction: Default: that of the file.
            recheck: Look again at samples that were bad before; this is always done if they are too many.
            share_prompt: Let independent turns share the tokens up to the last image, as `can_share_prompt` allows.
            log: Called with each progress message.

        Raises:
            ValueError: A field of the file, a source or its format is wrong.
            TooManyBadSamplesError: More samples are bad than `max_bad_fraction` allows.
            OSError: A file cannot be read, or the cache cannot be written.
            ImportError: There is a video file, and PyAV is not installed.
        """
        content = read_corpus_file(path)
        cache = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "sailvit")
        most = content.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
        with cache_errors(cache):
            files = list(_open_files(content, Path(path).parent, processor, cache, share_prompt, log))
            lengths = [measure(file.rows, file.reader, cache, num_proc) for file in files]
        if recheck or _are_too_many(lengths, most):
            pairs = zip(files, lengths, strict=True)
            lengths = [remeasure_skipped(one, file.rows, file.reader) for file, one in pairs]
        skipped = tuple(_list_skipped(files, lengths))
        if _are_too_many(lengths, most):
            raise TooManyBadSamplesError(_describe_bad(skipped, lengths, most))
        if not sum(_count_bad(lengths)):
            raise ValueError(f"{path}: its sources have no samples: they are empty, or min_rating leaves none")
        pairs = zip(files, lengths, strict=True)
        kinds = {file.kind_of(name) for file, one in pairs for name in one.kind_names}
        kinds = tuple(sorted(kinds.union(*(name.split(JOINT) for name in kinds))))
        described = [[file.source.model_dump(), file.rows.length] for file in files]
        mix = [content.kinds, content.total, content.seed]
        fingerprint = hash_of([described, mix, [one.digest for one in lengths]])
        with cache_errors(cache):
            arrays = store_arrays(_folder(cache, fingerprint), lambda: _mix(content, files, lengths, kinds))
        return cls(processor, tuple(files), arrays, kinds, skipped, fingerprint, cache, max_bad_fraction=most)

    @property
    def tokens(self) -> np.ndarray:
        return self.arrays["tokens"]

    @property
    def answers(self) -> np.ndarray:
        return self.arrays["answers"]

    @property
    def tiles(self) -> np.ndarray:
        return self.arrays["tiles"]

    @property
    def kinds(self) -> np.ndarray:
        return self.arrays["kinds"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        """
        Return a sample; its images are not decoded.

        Raises:
            BadSample: It cannot be read: its images were removed since the lengths were computed.
            IndexError: There is no such sample.
        """
        file, row = self._find(index)
        try:
            sample = file.reader.read(file.rows.record(row))
        except FilteredSample as error:  # files in use were changed
            raise BadSample(str(error)) from error
        if file.source.kind:
            sample = replace(sample, turn_kinds=())
        turns = int(self.arrays["turns"][index])
        return replace(sample, messages=sample.messages[:turns]) if turns else sample

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of a sample, and its line (from 1) or index (from 0) there."""
        file, row = self._find(index)
        return file.source.name, next(iter(file.rows.location(row)[1].values()))

    def skip(self, index: int, reason: str) -> Skipped:
        """Return the entry of skipped.jsonl for a sample that turns out to be bad when it is read."""
        file, row = self._find(index)
        return Skipped(file.source.name, *file.rows.location(row), reason)

    def write_skipped(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the bad samples to a JSONL file; raises FileExistsError if it exists, unless it may be replaced."""
        lines = "".join(json.dumps(entry.to_dict()) + "\n" for entry in self.skipped)
        with Path(path).open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(lines)

    def count_kinds(self) -> dict[str, int]:
        """Return the number of samples of every kind."""
        counts = np.bincount(self.arrays["kinds"], minlength=len(self.kind_names))
        return {name: int(count) for name, count in zip(self.kind_names, counts, strict=True) if count}

    def fit(self, max_tokens: int, max_tiles: int | None = None, too_long: str = "drop") -> "Corpus":
        """
        Return the corpus whose samples all fit into a pack.

        Args:
            max_tokens: Tokens of a pack.
            max_tiles: Tiles of a pack; None: any number.
            too_long: "drop" leaves samples that are too long out; "truncate" removes turns from their end, and drops a
                sample whose first turn is too long; "fail" raises an error.

        Raises:
            ValueError: A sample is too long and `too_long` is "fail", or no sample is left.
        """
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long: expected one of {', '.join(TOO_LONG)}, got {too_long!r}")
        limit = np.iinfo(np.int32).max if max_tiles is None else max_tiles
        excess = np.flatnonzero((self.tokens > max_tokens) | (self.tiles > limit))
        if not len(excess):
            return self
        if too_long == "fail":
            raise ValueError(self._describe_excess(excess, max_tokens, max_tiles))
        fingerprint = hash_of([self.fingerprint, max_tokens, max_tiles, too_long])

        def compute() -> dict[str, np.ndarray]:
            return self._without(excess, self._truncate(excess, max_tokens, limit) if too_long == "truncate" else {})

        arrays = store_arrays(_folder(self.cache_dir, fingerprint), compute)
        dropped, truncated = len(self) - len(arrays["tokens"]), np.count_nonzero(arrays["turns"])
        if dropped == len(self):
            raise ValueError(self._describe_excess(excess, max_tokens, max_tiles))
        done = {"dropped": dropped, "truncated": int(truncated)}
        return replace(self, arrays=arrays, fingerprint=fingerprint, too_long=done)

    def __repr__(self) -> str:
        return f"Corpus({len(self)} samples of {len(self.files)} files)"

    def _find(self, index: int) -> tuple[SourceFile, int]:
        row = int(self.arrays["rows"][index])
        file = self.files[bisect_right(self.files, row, key=lambda file: file.start) - 1]
        return file, row - file.start

    def _describe_excess(self, excess: np.ndarray, max_tokens: int, max_tiles: int | None) -> str:
        first = int(excess[0])
        source, number = self.locate(first)
        got = f"{self.tokens[first]} tokens, {self.tiles[first]} tiles"
        limit = f"{max_tokens} tokens" + ("" if max_tiles is None else f", {max_tiles} tiles")
        return (
            f"{len(excess)} of {len(self)} samples do not fit into a pack of {limit}: the first is {source} {number}, "
            f"{got}; raise max_tokens_per_pack, lower max_tiles, or set too_long to truncate or drop"
        )

    def _truncate(self, excess: np.ndarray, max_tokens: int, max_tiles: int) -> dict[int, tuple[int, int, int, int]]:
        """Return index -> (messages, tokens, answers, tiles) of the samples that fit with fewer turns."""
        shorter = {}
        for index in map(int, excess):
            reader, sample = self._find(index)[0].reader, self[index]
            for end in range(len(sample.messages) - 2, 1, -2):
                counts = reader.count([replace(sample, messages=sample.messages[:end])])[0]
                if not isinstance(counts, str) and counts.tokens <= max_tokens and counts.tiles <= max_tiles:
                    shorter[index] = (end, *(getattr(counts, name) for name in COLUMNS))
                    break
        return shorter

    def _without(self, excess: np.ndarray, shorter: Mapping[int, tuple[int, ...]]) -> dict[str, np.ndarray]:
        names = ("turns", *COLUMNS)
        arrays = {name: np.array(self.arrays[name]) for name in (*names, "rows", "kinds")}
        for index, values in shorter.items():
            for name, value in zip(names, values, strict=True):
                arrays[name][index] = value
        keep = np.ones(len(self), bool)
        keep[[index for index in excess if index not in shorter]] = False
        return {name: array[keep] for name, array in arrays.items()}


def _folder(cache: Path, fingerprint: str) -> Path:
    return cache / "corpora" / fingerprint


def _open_files(
    content: CorpusFile,
    folder: Path,
    processor: SAILVLProcessor | TileProcessor,
    cache: Path,
    share_prompt: bool,
    log: Callable[[str], None],
) -> Iterator[SourceFile]:
    start, processor_hash = 0, hash_processor(processor)
    for source, base in expand_meta(content.sources, folder):
        options = {name: getattr(source, name) for name in ("max_tiles", "num_frames")}
        options = {name: value for name, value in options.items() if value is not None}
        for rows in open_rows(source, base, cache):
            _check_columns(source, rows)
            image_root = base / source.image_root if source.image_root else _folder_of(rows)
            formats = _format_options(source, image_root, share_prompt and source.independent_turns)
            log(f"{source.name}: {rows}, {rows.length:,} rows")
            yield SourceFile(source, rows, SampleReader(processor, processor_hash, formats, options), start)
            start += rows.length


def _format_options(source: Source, image_root: Path | None, share_prompt: bool) -> FormatOptions:
    try:
        names = ("allow_outside", "min_rating", "num_frames", "independent_turns")
        return FormatOptions(image_root, **{name: getattr(source, name) for name in names}, share_prompt=share_prompt)
    except ValueError as error:
        raise ValueError(f"source {source.name}: {error}") from error


def _folder_of(rows: Rows) -> Path | None:
    """Return the folder that a file is in; None for a data set on the Hub."""
    return Path(rows.path).parent if Path(rows.path).exists() else None


def _check_columns(source: Source, rows: Rows) -> None:
    names = rows.dataset.column_names
    if not rows.is_json and not any({*keys} <= {*names} for keys in FORMATS):
        got, known = ", ".join(names)[:200], " or ".join(map(" + ".join, FORMATS))
        raise ValueError(f"source {source.name}: {rows.path}: expected a column {known}, got {got}")


def _list_skipped(files: Sequence[SourceFile], lengths: Sequence[Lengths]) -> Iterator[Skipped]:
    for file, one in zip(files, lengths, strict=True):
        for row, reason in one.skipped:
            yield Skipped(file.source.name, *file.rows.location(row), reason)


def _count_bad(lengths: Sequence[Lengths]) -> tuple[int, int]:
    """Return the number of bad samples, and of all."""
    bad = sum(len(one.skipped) for one in lengths)
    return bad, bad + sum(one.num_used for one in lengths)


def _are_too_many(lengths: Sequence[Lengths], most: float) -> bool:
    bad, total = _count_bad(lengths)
    return bad > most * total


def _describe_bad(skipped: Sequence[Skipped], lengths: Sequence[Lengths], most: float) -> str:
    bad, total = _count_bad(lengths)
    reasons = "; ".join(map(str, skipped[:10]))
    return f"{bad} of {total} samples are bad, more than max_bad_fraction {most:g}: {reasons}"


def _mix(
    content: CorpusFile, files: Sequence[SourceFile], lengths: Sequence[Lengths], kind_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the arrays of the samples of an epoch."""
    index_of = {name: index for index, name in enumerate(kind_names)}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "rows", "kinds")}
    for file, one in zip(files, lengths, strict=True):
        used = np.flatnonzero(one.column("tokens"))
        for name in COLUMNS:
            columns[name].append(one.column(name)[used])
        columns["rows"].append(used + file.start)
        kinds = np.array([index_of[file.kind_of(name)] for name in one.kind_names], np.int32)
        columns["kinds"].append(kinds[one.column("kinds")[used]])
    table = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    chosen = _choose(content, files, table["rows"])
    if content.kinds:
        chosen = _choose_kinds(content, table["kinds"][chosen], chosen, kind_names)
    table = {name: array[chosen] for name, array in table.items()}
    return {**table, "turns": np.zeros(len(chosen), np.int32)}


def _choose(content: CorpusFile, files: Sequence[SourceFile], rows: np.ndarray) -> np.ndarray:
    """Return the indices of the samples after `fraction` and `repeat` of every source."""
    chosen = []
    for source, begin, end in _spans(files):
        entries = np.arange(np.searchsorted(rows, begin), np.searchsorted(rows, end))
        for index, factor in enumerate((source.fraction, source.repeat)):
            if len(entries) and factor != 1:
                seed = [content.seed, index, *source.name.encode()]
                entries = draw(entries, max(1, round(factor * len(entries))), seed)
        chosen.append(entries)
    return np.concatenate(chosen)


def _spans(files: Sequence[SourceFile]) -> Iterator[tuple[Source, int, int]]:
    """Yield every source with its first row and the row after its last one."""
    for _, group in groupby(files, key=lambda file: file.source.name):
        own = [*group]
        yield own[0].source, own[0].start, own[-1].start + own[-1].rows.length


def _choose_kinds(content: CorpusFile, kinds: np.ndarray, chosen: np.ndarray, kind_names: Sequence[str]) -> np.ndarray:
    """Return the indices of the samples after the kinds are set to their shares."""
    if (content.total or 0) > MOST_REPEATS * len(chosen):
        raise ValueError(f"total: expected at most {MOST_REPEATS} times the {len(chosen)} samples, got {content.total}")
    counts = {name: int((kinds == index).sum()) for index, name in enumerate(kind_names)}
    wanted = scale_kinds({name: count for name, count in counts.items() if count}, content.kinds, content.total)
    drawn = []
    for name, count in wanted.items():
        if count:
            drawn.append(draw(chosen[kinds == kind_names.index(name)], count, [content.seed, 2, *name.encode()]))
    return np.sort(np.concatenate(drawn))
