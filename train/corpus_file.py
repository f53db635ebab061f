# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
corpus.yaml: the sources of a training mix, validated.

    sources:
      - {name: captions, path: captions.jsonl, image_root: images/, kind: caption}
      - {name: docs, path: "docs/*.parquet", kind: ocr, fraction: 0.5, min_rating: 4}
    kinds: {ocr: 0.5}
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ..image_processing_sailvit import MAX_TILES_LIMIT
from .settings import Strict, first_error, read_mapping


MOST_REPEATS = 1000  # of a sample in an epoch, to catch mistakes
Share = Annotated[float, Field(gt=0, le=1)]


class Source(Strict):
    """
    One source of samples. Relative paths are relative to the folder of corpus.yaml.

    Attributes:
        name: Name in messages and in skipped.jsonl.
        path: A JSON, JSONL or parquet file or a pattern of files; InternVL's meta JSON; a folder of `save_to_disk`; or,
            with `split`, a data set on the Hub.
        split, subset: Split and configuration of a data set on the Hub.
        image_root: Folder that relative paths of images and videos start from. Default: the folder of the file.
        allow_outside: Accept images outside of `image_root`.
        kind: Kind of the samples: caption, ocr, open_qa, short_qa, math, text or another. Default: the kind that a
            record names, or its independent turns, else "unknown".
        fraction: Use a random part of the samples.
        repeat: Use every sample this often in an epoch; a fractional part is a random part of the samples.
        min_rating: Drop turns with a lower rating, in any or in the named ratings of FineVision.
        independent_turns: The turns of a record are questions about the same images that do not depend on each other:
            each is a conversation of its own, and the images are encoded once for all.
        max_tiles, num_frames: Options of the processor for these samples.
    """

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    split: str | None = None
    subset: str | None = None
    image_root: str | None = None
    allow_outside: bool = False
    kind: str | None = Field(None, min_length=1)
    fraction: float = Field(1, gt=0, le=1)
    repeat: float = Field(1, gt=0, le=MOST_REPEATS)
    min_rating: float | dict[str, float] | None = None
    independent_turns: bool = False
    max_tiles: int | None = Field(None, ge=1, le=MAX_TILES_LIMIT)
    num_frames: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_subset(self) -> "Source":
        if self.subset and not self.split:
            raise ValueError("subset needs split: both are of a data set on the Hub")
        return self


class CorpusFile(Strict):
    """
    The content of corpus.yaml.

    Attributes:
        sources: The sources of samples.
        kinds: Kind -> its share of the samples; the other kinds are scaled evenly, so that the total stays (paper,
            appendix F).
        total: Samples of an epoch, if `kinds` is given. Default: those of the sources.
        seed: Seed of all random parts.
        max_bad_fraction: Stop if a larger part of the samples cannot be used.
    """

    sources: list[Source] = Field(min_length=1)
    kinds: dict[str, Share] = {}
    total: int | None = Field(None, ge=1, le=10**10)
    seed: int = Field(0, ge=0)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "CorpusFile":
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"the source name {twice[0]!r} is given twice")
        if self.total and not self.kinds:
            raise ValueError("total needs kinds, the shares of the total")
        if sum(self.kinds.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of kinds add up to {sum(self.kinds.values()):g}, expected at most 1")
        return self


def read_corpus_file(path: str | Path) -> CorpusFile:
    """
    Read and validate a corpus.yaml.

    Raises:
        ValueError: The file is no YAML, or a field is missing, unknown or out of range; the message names the first.
        OSError: The file cannot be read.
    """
    fields, _ = read_mapping(path, "sources")
    try:
        return CorpusFile.model_validate(fields)
    except ValidationError as error:
        fields_at = {(): CorpusFile.model_fields, ("sources",): Source.model_fields}
        raise ValueError(f"{path}: {first_error(error, fields, fields_at)}") from error


def expand_meta(sources: Iterable[Source], folder: Path) -> Iterator[tuple[Source, Path]]:
    """
    Yield every source with the folder that its paths start from; InternVL's meta JSON as the sources that it lists.

    `repeat_time` below 1 is a random part of the samples; InternVL itself takes the first lines.

    Raises:
        ValueError: An entry of a meta JSON lacks its annotation file, or its fields are out of range; two sources have
            the same name.
    """
    names: set[str] = set()
    for source, base in _expand(sources, folder):
        if source.name in names:
            raise ValueError(f"the source name {source.name!r} is given twice: an entry of a meta JSON has it, too")
        names.add(source.name)
        yield source, base


def _expand(sources: Iterable[Source], folder: Path) -> Iterator[tuple[Source, Path]]:
    for source in sources:
        entries = _read_meta(folder / source.path)
        if entries is None:
            yield source, folder
            continue
        for name, entry in entries.items():
            location = f"source {source.name}: {folder / source.path}: {name}"
            if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
                raise ValueError(f"{location}: expected an object with annotation, the path of a JSON or JSONL file")
            yield _meta_source(source, name, entry, location), _meta_folder(entry["annotation"], folder / source.path)


def _read_meta(path: Path) -> dict[str, Any] | None:
    """Return the entries of InternVL's meta JSON; None for other files."""
    if path.suffix != ".json" or not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(1024).lstrip()[:1] != b"{":  # a list of records is not parsed here: it may be large
            return None
    return read_json(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises ValueError if it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        hint = ": name a file with one record per line .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{path}: not JSON: {error}{hint}") from error


def _meta_source(source: Source, name: str, entry: Mapping[str, Any], location: str) -> Source:
    repeat = entry.get("repeat_time", 1)
    fields = {"path": entry["annotation"], "image_root": entry.get("root"), "max_tiles": entry.get("max_dynamic_patch")}
    fields = {**source.model_dump(), **{key: value for key, value in fields.items() if value}}
    try:
        fields |= {"name": f"{source.name}/{name}", "repeat": source.repeat * repeat}
        return Source(**fields)
    except (ValidationError, TypeError) as error:
        is_field = isinstance(error, ValidationError)
        message = first_error(error, fields, {(): Source.model_fields}) if is_field else f"repeat_time: {error}"
        raise ValueError(f"{location}: {message}") from error


def _meta_folder(annotation: str, meta: Path) -> Path:
    """Return the working folder if the path of an annotation starts there, as in InternVL, else the meta file's."""
    is_here = not Path(annotation).is_absolute() and Path(annotation).exists()
    return Path() if is_here else meta.parent
