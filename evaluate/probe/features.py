"""
Features of images, extracted once and cached by content.

A chunk is a file with the features of CHUNK images in order. Its folder is named after a hash of all that the features
depend on besides the images, and the file after the hashes of the images. A killed run loses the chunk that it was
at. Chunks have fixed borders, and an unreadable image is a black one in its batch, so neither an interruption nor a
broken file changes the last bits of other features.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ...convert.storage.files import first_line, read_json
from ..datasets import Group, LabelledImages, Skipped, decode, hash_content
from ..encoders import Encoder, Preprocessing


FORMAT = 1  # of the cache; raised when its files change
CHUNK = 256  # images of a file, at most, and of a batch
SETTLED_SECONDS = 2.0  # a file may change again within the resolution of its time stamps
OLD_SECONDS = 3600  # a file that is being written is not older
READERS = 8  # threads that hash image files
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of a group."""

    group: Group
    number: int  # of the group in the data set
    indices: range
    start: int  # number of the first image in the data set


@dataclass
class Features:
    """Features (N, layers, D), in float32, of the images of a data set, in parts that are read when they are used."""

    parts: list[Callable[[int], torch.Tensor]]  # position of a layer -> (n, D)
    readable: torch.Tensor  # (N,), bool; the features of other images are to be ignored
    skipped: list[Skipped]
    content: str  # sha256 of the hashes of the image files, in order

    def layer(self, position: int) -> torch.Tensor:
        """Return the features (n, D) of the readable images from one layer."""
        values = torch.cat([part(position) for part in self.parts])
        return values if self.readable.all() else values[self.readable]


def default_cache() -> Path:
    return Path(constants.HF_HOME) / "sailvit" / "features"


def extract_features(
    encoder: Encoder,
    images: LabelledImages,
    cache_dir: Path | None,
    batch_size: int = 64,
    workers: int = 0,
    on_progress: Progress = lambda done, total: None,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """
    Write the chunks of a data set that the cache lacks: of `ranks` processes, this one every `ranks`-th.

    Args:
        encoder: Its features; they depend on the batch size in the last bits only.
        images: The images.
        cache_dir: The cache, shared by all processes.
        batch_size: Images that the encoder runs on at a time, at most CHUNK.
        workers: Processes that read and preprocess images ahead.
        on_progress: Called with the images done, and those of this process.

    Raises:
        ValueError: Features are not finite; the cache is of another format.
        OSError: The disk cannot hold the features.
    """
    cache = FeatureCache(cache_dir, encoder)
    chunks = split_chunks(images)
    if rank == 0:  # for the processes together
        cache.check_space([chunk for chunk in chunks if cache.known_file(chunk) is None])
    cache.prepare()
    chunks = chunks[rank::ranks]
    total, done = sum(len(chunk.indices) for chunk in chunks), 0
    missing: list[tuple[Chunk, Path]] = []

    def select() -> Iterator[Chunk]:
        """Yield chunks without a file; what is cached counts at once."""
        nonlocal done
        for chunk in chunks:
            file = cache.file_of(chunk)
            if file.exists():
                done += len(chunk.indices)
                on_progress(done, total)
            else:
                missing.append((chunk, file))
                yield chunk

    for features, errors in _encode_chunks(encoder, images, select(), batch_size, workers):
        chunk, file = missing.pop(0)
        _check_finite(encoder, chunk, features, errors)
        cache.write(file, features, errors)
        done += len(chunk.indices)
        on_progress(done, total)


def read_features(encoder: Encoder, images: LabelledImages, cache_dir: Path) -> Features:
    """
    Return the features that `extract_features` wrote.

    Raises:
        ValueError: A chunk is missing.
    """
    cache, parts, skipped, digest = FeatureCache(cache_dir, encoder), [], list(images.skipped), hashlib.sha256()
    readable = torch.ones(len(images), dtype=torch.bool)
    for chunk in split_chunks(images):
        file = cache.file_of(chunk)
        if not file.exists():
            raise ValueError(
                f"{file} is missing: all processes need the same --cache-dir, and images that do not change"
            )
        digest.update(file.stem.encode())
        errors = _read_errors(file)
        _note_errors(images, chunk, errors, readable, skipped)
        parts.append(lambda position, file=file: _read_layer(file, position))
    return Features(parts, readable, skipped, digest.hexdigest())


def compute_features(encoder: Encoder, images: LabelledImages, batch_size: int = 64, workers: int = 0) -> Features:
    """Return features without a cache, in memory."""
    chunks, parts, skipped, digest = split_chunks(images), [], list(images.skipped), hashlib.sha256()
    readable = torch.ones(len(images), dtype=torch.bool)
    encoded = _encode_chunks(encoder, images, iter(chunks), batch_size, workers)
    for chunk, (features, errors) in zip(chunks, encoded, strict=True):
        _check_finite(encoder, chunk, features, errors)
        digest.update(_hash_chunk(_hash_images(chunk)).encode())
        _note_errors(images, chunk, errors, readable, skipped)
        parts.append(lambda position, features=features: features[:, position])
    return Features(parts, readable, skipped, digest.hexdigest())


def split_chunks(images: LabelledImages) -> list[Chunk]:
    chunks, offset = [], 0
    for number, group in enumerate(images.groups):
        for start in range(0, len(group), CHUNK):
            indices = range(start, min(start + CHUNK, len(group)))
            chunks.append(Chunk(group, number, indices, offset + start))
        offset += len(group)
    return chunks


def _note_errors(
    images: LabelledImages, chunk: Chunk, errors: dict[str, str], readable: torch.Tensor, skipped: list[Skipped]
) -> None:
    for row, reason in errors.items():
        readable[chunk.start + int(row)] = False
        skipped.append(Skipped(images.name, chunk.group.name(chunk.indices[int(row)]), reason))


def _read_errors(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return json.loads(opened.metadata()["errors"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: damaged: remove it, and it is extracted again: {first_line(error)}") from error


def _read_layer(file: Path, position: int) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_slice("features")[:, position]


# The cache


class FeatureCache:
    """The chunks of one encoder, and what is known of image files by their time stamps."""

    def __init__(self, root: Path, encoder: Encoder):
        self.root, self.encoder = root, encoder
        self.settings = {"format": FORMAT, **encoder.describe()}
        self.folder = root / _hash_json(self.settings)[:32]

    def prepare(self) -> None:
        """Create the folder; raise ValueError if the cache is of another format, OSError if it cannot be written."""
        mark = self.root / "format.json"
        if mark.exists() and read_json(mark).get("format") != FORMAT:
            raise ValueError(f"{self.root}: a cache of another version of this package: remove it, or give --cache-dir")
        for rest in (*self.root.glob("images/*/.*.part"), *self.folder.glob(".*.part")):  # of a killed process
            with suppress(FileNotFoundError):  # another process may remove it
                if time.time() - rest.stat().st_mtime > OLD_SECONDS:
                    rest.unlink()
        _write_json(mark, {"format": FORMAT})
        _write_json(self.folder / "encoder.json", {"name": self.encoder.name, **self.settings})

    def check_space(self, chunks: list[Chunk]) -> None:
        """Raise OSError if the disk cannot hold the features of chunks."""
        count = sum(len(chunk.indices) for chunk in chunks)
        needed = count * len(self.encoder.layers) * self.encoder.width * 4
        parent = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            what = f"features of {count:,} images and {len(self.encoder.layers)} layers need {needed / 1e9:.2f} GB"
            raise OSError(f"{self.root}: {what}, {free / 1e9:.2f} GB are free: give fewer --layers, or --cache-dir")

    def known_file(self, chunk: Chunk) -> Path | None:
        """Return the existing file of a chunk whose images are unchanged by their time stamps, without reading them."""
        file = self._remembered(self._memo_name(chunk))
        return file if file and file.exists() else None

    def file_of(self, chunk: Chunk) -> Path:
        """Return the file of a chunk; its images are read and hashed if one has changed or is new."""
        name = self._memo_name(chunk)
        if file := self._remembered(name):
            return file
        started, hashes = time.time(), _hash_images(chunk)
        content = _hash_chunk(hashes)
        # An image that cannot be read now, for example from a network disk, is read again by the next call.
        is_settled = None not in hashes and name and name == self._memo_name(chunk)
        if is_settled and _newest(chunk) < started - SETTLED_SECONDS:
            _write_json(self._memo(name), {"content": content})
        return self._file(content)

    def write(self, file: Path, features: torch.Tensor, errors: dict[str, str]) -> None:
        temporary = file.with_name(f".{uuid4().hex}.part")
        try:
            save_file({"features": features}, temporary, metadata={"errors": json.dumps(errors)})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            what = f"the cache cannot be written: {first_line(error)}"
            raise OSError(f"{self.root}: {what}: free space, or give --cache-dir") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _file(self, content: str) -> Path:
        return self.folder / f"{content}.safetensors"

    def _remembered(self, name: str) -> Path | None:
        """Return the file of a chunk by the time stamps of its images, of which a memo has this name."""
        with suppress(OSError, ValueError, KeyError):
            return self._file(read_json(self._memo(name))["content"])
        return None

    def _memo(self, name: str) -> Path:
        return self.root / "images" / name[:2] / f"{name}.json"

    def _memo_name(self, chunk: Chunk) -> str:
        try:
            signatures = chunk.group.signatures(chunk.indices)
        except OSError:  # an image was removed: it is read, and named
            return ""
        return _hash_json(signatures) if signatures else ""


def _newest(chunk: Chunk) -> float:
    """Return the newest time stamp of the files of a chunk."""
    group = chunk.group
    files = [Path(file["filename"]) for file in group.images.cache_files] if group.column else group.images
    chosen = files if group.column else [files[index] for index in chunk.indices]
    return max(max(stat.st_mtime, stat.st_ctime) for stat in (file.stat() for file in chosen))


def _hash_images(chunk: Chunk) -> list[bytes | None]:
    """Return the hash of each image file, None for one that cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda index: _hash_image(chunk.group, index), chunk.indices))


def _hash_image(group: Group, index: int) -> bytes | None:
    try:
        return hash_content(group.read(index))
    except (OSError, ValueError):
        return None


def _hash_chunk(hashes: Iterable[bytes | None]) -> str:
    unreadable = hash_content(b"unreadable")
    return hashlib.sha256(b"".join(one or unreadable for one in hashes)).hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # nothing is there if the folder could not be created
            temporary.unlink()
        what = error.strerror or str(error)
        raise OSError(f"{path.parent}: the cache cannot be written: {what}: give another --cache-dir") from error


# Encoding


class _Batches(Dataset):
    """Batches of chunks as pixels; an unreadable image is black, and named with its reason."""

    def __init__(self, groups: list[Group], preprocessing: Preprocessing, shape: tuple[int, int, int]):
        self.groups, self.preprocessing, self.shape = groups, preprocessing, shape

    def __getitem__(self, batch: tuple[int, range]) -> tuple[torch.Tensor, dict[int, str], str]:
        """Return pixels (B, 3, H, W), the reason for each unreadable image by row, and why the run has to stop."""
        number, indices = batch
        pixels, errors = torch.zeros(len(indices), *self.shape), {}
        for row, index in enumerate(indices):
            try:
                one = self.preprocessing(decode(self.groups[number].read(index)))
            except (OSError, ValueError, RuntimeError, TypeError) as error:
                errors[row] = first_line(error)
                continue
            if tuple(one.shape) != self.shape:
                return pixels, errors, self._wrong_shape(self.groups[number].name(index), one.shape)
            pixels[row] = one
        return pixels, errors, ""

    def _wrong_shape(self, image: str, shape: torch.Size) -> str:
        return (
            f"{image}: expected pixels of shape {self.shape} as of other images, got {tuple(shape)} from the "
            f"preprocessing of {self.preprocessing.name}: give --preprocessing NAME of an encoder that makes one size"
        )


class _BatchSampler:
    """The batches of chunks, selected when the loader asks for them; remembers which one ends a chunk."""

    def __init__(self, chunks: Iterator[Chunk], batch_size: int):
        self.chunks, self.batch_size, self.ends = chunks, min(batch_size, CHUNK), []

    def __iter__(self) -> Iterator[tuple[int, range]]:
        for chunk in self.chunks:
            for start in range(0, len(chunk.indices), self.batch_size):
                batch = chunk.indices[start : start + self.batch_size]
                self.ends.append(batch[-1] == chunk.indices[-1])
                yield chunk.number, batch


def _encode_chunks(
    encoder: Encoder, images: LabelledImages, chunks: Iterator[Chunk], batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, dict[str, str]]]:
    """Yield the features (n, layers, D) of every chunk on the CPU, and the reasons of unreadable images by row."""
    sampler = _BatchSampler(chunks, batch_size)
    loader = DataLoader(
        _Batches(images.groups, encoder.preprocessing, encoder.pixel_shape),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=encoder.device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    features, errors, rows = [], {}, 0
    for pixels, broken, failure in _loaded(loader):
        if failure:
            raise ValueError(failure)
        features.append(encoder.encode(pixels.to(encoder.device, non_blocking=True)))
        errors |= {str(rows + row): reason for row, reason in broken.items()}
        rows += len(pixels)
        if sampler.ends.pop(0):
            yield torch.cat(features).cpu(), errors
            features, errors, rows = [], {}, 0


def _loaded(loader: DataLoader) -> Iterator[tuple[torch.Tensor, dict[int, str], str]]:
    """Yield the batches of a loader; raise OSError if one of its processes was killed, as by a lack of memory."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that reads images ended: {first_line(error)}: give fewer --workers") from error


def _start_worker(worker: int) -> None:
    """Ignore Ctrl-C, which the parent handles; the workers share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.multiprocessing.set_sharing_strategy("file_system")


def _check_finite(encoder: Encoder, chunk: Chunk, features: torch.Tensor, errors: dict[str, str]) -> None:
    finite = features.isfinite().flatten(1).all(1)
    bad = [row for row in range(len(features)) if not finite[row] and str(row) not in errors]
    if bad:
        image = chunk.group.name(chunk.indices[bad[0]])
        raise ValueError(
            f"{encoder.name}: features of {image} are NaN or infinite: check the weights, or give --dtype float32"
        )
