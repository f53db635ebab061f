"""
Checkpoints on disk as named tensors, read lazily: safetensors and torch pickles, in one file or in shards.

Opening reads headers; the data of a tensor is read in chunks when it is asked for. Only the shards that hold tensors
which are asked for are opened.
"""

import hashlib
import io
import json
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .problems import CheckpointError, Problem
from .sources import ENGINE_ENTRIES, HubHeaders


if TYPE_CHECKING:
    import torch

    from .sources import Source

PROVENANCE = "provenance.json"
CHUNK = 1 << 20  # bytes read at a time
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

# Bytes of an element, under the names of the safetensors format.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
# Bits of a number without its sign, and from which value on they mean an infinity or NaN.
FLOAT_BITS = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor that lies in a file, row-major.

    Attributes:
        file: Where it lies.
        dtype: A key of ITEM_SIZES.
        shape: Its dimensions.
        offset: Of its first byte in the file.
        mapped: The tensor of a pickle, which torch has mapped into memory; `offset` says nothing then.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    mapped: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    def __setstate__(self, state: Any) -> None:
        """What a pickle says of a tensor is checked when its place is found; it may not be changed thereafter."""
        raise pickle.UnpicklingError("a tensor has no state")

    def pieces(self) -> Iterable["StoredTensor"]:
        """Where it is read from: itself, or the tensors it is computed from."""
        return (self,)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Its elements from `start` to `stop`, as bytes (uint8), at most CHUNK of them at a time."""
        item = ITEM_SIZES[self.dtype]
        first, last = start * item, self.nbytes if stop is None else stop * item
        if self.mapped is not None:
            import torch

            flat = self.mapped.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield from (flat[at : min(at + CHUNK, last)] for at in range(first, last, CHUNK))
            return
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first)
            for at in range(first, last, CHUNK):
                yield _read(file, min(CHUNK, last - at), self.file)


def _read(file: BinaryIO, count: int, path: Path) -> np.ndarray:
    chunk = np.empty(count, np.uint8)
    rest = memoryview(chunk)
    while rest:
        got = file.readinto(rest)
        if not got:
            raise CheckpointError(f"{path}: the file ends early: it was cut while it was read")
        rest = rest[got:]
    return chunk


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file, in hexadecimal, or of its beginning if it is stopped."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while not (stop and stop.is_set()) and (got := file.readinto(buffer)):
            digest.update(buffer[:got])
    return digest.hexdigest()


def read_safetensors(path: Path, opened: BinaryIO | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a safetensors file, by its header alone.

    Args:
        path: Where the file is, or what to call it.
        opened: The file, if it is elsewhere.

    Raises:
        CheckpointError: The header is not what the format asks for, or the file is shorter or longer than it says.
    """
    with opened or path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: the file is cut short or no safetensors: copy or download it again")
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, {LONGEST_HEADER} is the most there can be"
            )
        header = _parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not a map of texts")
    spans = {name: _read_entry(path, name, entry) for name, entry in header.items()}
    return _place(path, spans, 8 + length, size)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            raise CheckpointError(f"{path}: the header names something twice")
        return seen

    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        for name in header:
            name.encode()
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read, copy or download the file again: {error}") from error
    return header


def _read_entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """First byte, last byte + 1, dtype and shape of one tensor, each checked on its own."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r}: the header wants dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: tensor {name!r}: the dtype {dtype!r} is not known")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{path}: tensor {name!r}: {numbers!r} is not a list of whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets {offsets} do not hold {dtype} {shape}")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _place(
    path: Path, spans: dict[str, tuple[int, int, str, tuple[int, ...]]], data: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors, once it is sure that they lie one after the other and fill the file."""
    end = 0
    for name, (start, stop, _, _) in sorted(spans.items(), key=lambda entry: entry[1][:2]):
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}: the header is broken, download the file again")
        end = stop
    if data + end != size:
        kind = "cut short" if size < data + end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: {size} bytes instead of {data + end}; copy or download it again")
    return {name: StoredTensor(path, dtype, shape, data + start) for name, (start, _, dtype, shape) in spans.items()}


def read_pickle(path: Path, trust: bool = False) -> dict[str, StoredTensor]:
    """
    The tensors of a file that torch.save wrote, nested dictionaries flattened to names with dots.

    Args:
        trust: Whether the file may run code of its own.

    Raises:
        CheckpointError: It wants to run code and is not trusted, or cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    _flatten(_load_pickle(path, trust), "", path, tensors)
    if not tensors:
        raise CheckpointError(f"{path}: there is no tensor in it")
    return tensors


def _load_pickle(path: Path, trust: bool) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever torch has to say of old or odd formats: the error says it too
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=not trust)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if trust or not wanted:
            raise CheckpointError(f"{path}: not a file of torch.save, or a broken one: download it again") from error
        raise CheckpointError(
            f"{path}: opening it could run code ({wanted[1]}): give --trust-pickle if you trust who made it"
        ) from error
    except (RuntimeError, EOFError, IndexError, KeyError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a file of torch.save, or a broken one: {_line(error)}") from error


def broken_member(path: Path) -> str | None:
    """The first part of a file of torch.save whose bytes are not those that were written, by its checksum."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _line(text: object) -> str:
    """The first line of a message."""
    return (str(text).strip() or type(text).__name__).splitlines()[0].strip()


def _flatten(value: Any, name: str, path: Path, tensors: dict[str, StoredTensor]) -> None:
    import torch

    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), path, tensors)
    elif isinstance(value, torch.Tensor):
        dtype = TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        if dtype is None or value.layout is not torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is {value.dtype}, {value.layout}, on {value.device}")
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors have the name {name!r}")
        tensors[name] = StoredTensor(path, dtype, tuple(value.shape), mapped=value)


def read_index(path: Path) -> dict[str, str]:
    """
    Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        CheckpointError: It is no index, or names a file outside its folder.
    """
    index = read_json(path)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError(f"{path}: no index of shards: weight_map has to map names of tensors to names of files")
    for file in set(weights.values()):
        if is_outside(file):
            raise CheckpointError(f"{path}: the shard {file!r} lies outside its folder: correct weight_map")
    return weights


def is_outside(file: str) -> bool:
    """Whether a name that stands in a file could lead out of the folder of that file."""
    parts = PurePosixPath(file).parts
    return not parts or file.startswith("/") or ".." in parts or "\\" in file or ":" in file or "\0" in file


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


class Checkpoint:
    """
    The tensors of a source, by name; their shards are opened when they are asked for.

    Attributes:
        source: The folder or repository it lies in.
        entry: Name of the file that stands for it: the one file of weights, or the index of the shards.
        opened: Every file of weights that was opened -> the tensors in it.
        documents: Every JSON file beside them that was asked for -> its content.
        engine: What a training engine's files say of the training, once they are opened.
    """

    def __init__(self, source: "Source", entry: str, trust_pickle: bool = False):
        self.source = source
        self.entry = entry
        self.trust_pickle = trust_pickle
        self.opened: dict[str, dict[str, StoredTensor]] = {}
        self.documents: dict[str, dict[str, Any]] = {}
        self.engine: dict[str, Any] = {}

    @property
    def headers_only(self) -> bool:
        """Whether no tensor can be read, but only what the headers say of it."""
        return isinstance(self.source, HubHeaders)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> name of the file that holds it."""
        if self.entry.endswith(".index.json"):
            return read_index(self.source.path(self.entry))
        return dict.fromkeys(self.open(self.entry), self.entry)

    @property
    def files(self) -> list[str]:
        """The files of weights there should be."""
        return sorted(set(self.weight_map.values()))

    def open(self, file: str) -> dict[str, StoredTensor]:
        """
        The tensors of one of the files, by its header.

        Raises:
            CheckpointError: The file is missing or broken.
        """
        if file not in self.opened and file.endswith(ENGINE_ENTRIES):
            from .engines import read_engine  # which knows this module

            self.opened[file], self.engine = read_engine(self.source, file, self.trust_pickle)
        if file not in self.opened:
            path = self.source.path(file)
            if file.endswith(".safetensors"):
                self.opened[file] = read_safetensors(path, self.source.open(file))
            else:
                self.opened[file] = read_pickle(path, self.trust_pickle)
        return self.opened[file]

    def document(self, file: str) -> dict[str, Any]:
        """
        A JSON file beside the weights; empty if there is none.

        Raises:
            CheckpointError: It is not a JSON object.
        """
        if file not in self.documents:
            self.documents[file] = read_json(self.source.path(file)) if file in self.source.files else {}
        return self.documents[file]

    def __getitem__(self, name: str) -> StoredTensor:
        file = self.weight_map[name]
        tensors = self.open(file)
        if name not in tensors:
            raise CheckpointError(f"{self.entry} says that {name} is in {file}, which does not hold it")
        return tensors[name]

    def shard_problems(self) -> list[Problem]:
        """What is wrong with the files themselves: all of them are opened."""
        problems = []
        for file in self.files:
            try:
                self.open(file)
            except CheckpointError as error:
                problems.append(Problem("file", file, str(error).split(": ", 1)[-1]))
                continue
            problems += self.name_problems(file)
        return problems

    def name_problems(self, file: str) -> list[Problem]:
        """Where the index and one of its files, which is open, name different tensors."""
        named, held = {name for name, place in self.weight_map.items() if place == file}, self.opened[file].keys()
        return [
            *(
                Problem("shard", name, f"{self.entry} says it is in {file}, which does not hold it")
                for name in named - held
            ),
            *(Problem("shard", name, f"in {file}, but {self.entry} does not say so") for name in sorted(held - named)),
        ]
