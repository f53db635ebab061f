"""
Files of torch.save and other pickles, read without torch and without running anything they name.

A pickle is a program that may call what it names. Here a name stands for something inert: a record of what the call
was given, or the place in the file where a tensor lies. Names that are neither torch's own nor on the list that the
reader was given are refused; where a file is trusted they become records too, and still nothing runs.
"""

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError
from .files import _line
from .tensors import ITEM_SIZES, TORCH_DTYPES, StoredTensor


if TYPE_CHECKING:
    pass


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


STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip

# What torch writes about a tensor besides its numbers.
IGNORED_GLOBALS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.device", "torch.serialization._get_layout")

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip file: mark, lengths of its name and of what follows it


class OpaqueObject:
    """
    What stands for an object of another package: what it was made of. It does nothing.

    Attributes:
        made: The arguments it was called with.
        state: What was put into it then, by name.
    """

    __slots__ = ("made", "state")

    def __new__(cls, *made: Any) -> "OpaqueObject":
        record = super().__new__(cls)
        record.made, record.state = made, {}
        return record

    def __init__(self, *made: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"": state}

    def append(self, item: Any) -> None:
        """Of a kind of list: nothing is kept."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Of a kind of dictionary: nothing is kept."""


class _Call:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


@dataclass(frozen=True)
class _Storage:
    """Elements that lie one after the other in a file."""

    file: Path
    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """
    A tensor that lies in a file in another order than row by row; it is read whole.

    Attributes:
        strides: Elements from one to the next, for each dimension.
    """

    strides: tuple[int, ...] = ()

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        item = ITEM_SIZES[self.dtype]
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = StoredTensor(self.file, self.dtype, (span,), self.offset)
        elements = np.concatenate([*flat.chunks()]).view(f"V{item}")
        steps = tuple(stride * item for stride in self.strides)
        ordered = np.lib.stride_tricks.as_strided(elements, self.shape, steps, writeable=False)
        data = np.ascontiguousarray(ordered).reshape(-1).view(np.uint8)
        yield data[start * item : self.nbytes if stop is None else stop * item]


def read_saved(
    path: Path, allowed: Collection[str] = (), trust: bool = False, start: int = 0, length: int | None = None
) -> Any:
    """
    What torch.save wrote, with a StoredTensor in the place of every tensor and a Record in that of other objects.

    Args:
        path: The file.
        allowed: Full names of classes of which records are made.
        trust: Whether records are made of any class.
        start: Where in the file it begins, if it is one of several.
        length: Its bytes, likewise.

    Raises:
        CheckpointError: It names something that is not allowed, or cannot be read.
    """
    length = path.stat().st_size - start if length is None else length
    with explained(path), path.open("rb") as file:
        window = FileSlice(file, start, length)
        if not zipfile.is_zipfile(window):
            what = "no zip file of torch.save: broken, or written without use_new_zipfile_serialization: copy it again"
            raise CheckpointError(f"{path}: {what}")
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise CheckpointError(f"{path}: it is compressed, which torch.save does not do")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: its numbers are big-endian: save it on another machine")
            content = io.BytesIO(archive.read(members["data.pkl"]))
            places = StorageLocator(path, window, start, length, members)
            return _Reader(content, path, allowed, trust, places).load()


def read_record(path: Path, allowed: Collection[str], trust: bool = False) -> Any:
    """
    A plain pickle, with a Record in the place of every object.

    Args:
        allowed: Full names of classes of which records are made.
        trust: Whether records are made of any class.

    Raises:
        CheckpointError: It names something that is not allowed, or cannot be read.
    """
    with explained(path), path.open("rb") as file:
        return _Reader(file, path, allowed, trust).load()


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Whatever a broken file makes its readers raise is one error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ArithmeticError, AttributeError, EOFError,
            LookupError, MemoryError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:  # fmt: skip
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: broken, or not what it is called: copy it again: {reason}") from error


class FileSlice(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if self.at < 0:
            raise ValueError("before the beginning")
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        read = self.file.read(max(min(len(buffer), self.length - self.at), 0))
        buffer[: len(read)] = read
        self.at += len(read)
        return len(read)


class StorageLocator:
    """Where the storages of a zip file lie."""

    def __init__(self, path: Path, window: FileSlice, start: int, length: int, members: dict[str, zipfile.ZipInfo]):
        self.path, self.window, self.start, self.length, self.members = path, window, start, length, members
        self.found: dict[str, int] = {}

    def storage(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"no storage: {kind!r}")
        member, nbytes = self.members[f"data/{key}"], count * ITEM_SIZES[dtype]
        if member.file_size < nbytes:
            raise CheckpointError(f"{self.path}: data/{key} has {member.file_size} bytes, not {nbytes}: copy it again")
        if key not in self.found:
            self.found[key] = self._data_of(member)
        return _Storage(self.path, self.start + self.found[key], nbytes, dtype)

    def _data_of(self, member: zipfile.ZipInfo) -> int:
        """Where the data of a member begin: behind a header of its own."""
        self.window.seek(member.header_offset)
        mark, name, extra = LOCAL_HEADER.unpack(self.window.read(LOCAL_HEADER.size))
        begin = member.header_offset + LOCAL_HEADER.size + name + extra
        if mark != b"PK\x03\x04" or begin + member.file_size > self.length:
            raise CheckpointError(f"{self.path}: {member.filename} is cut short: copy it again")
        return begin


class _Reader(pickle.Unpickler):
    """Makes records, and tensors that say where they lie."""

    def __init__(
        self, file: Any, path: Path, allowed: Collection[str], trust: bool, places: StorageLocator | None = None
    ):
        super().__init__(file)
        self.path, self.allowed, self.trust, self.places = path, allowed, trust, places

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in KNOWN_GLOBALS:
            return KNOWN_GLOBALS[full]
        if full in IGNORED_GLOBALS or full in self.allowed or self.trust:
            return _record_class(full)
        raise CheckpointError(
            f"{self.path}: opening it could run code ({full}): give --trust-pickle if you trust who made it"
        )

    def persistent_load(self, identity: Any) -> _Storage:
        if self.places is None:
            raise pickle.UnpicklingError("a storage, where there are none")
        return self.places.storage(identity)


@lru_cache(maxsize=1024)
def _record_class(full: str) -> type[OpaqueObject]:
    return type(full, (OpaqueObject,), {"__slots__": ()})


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *others: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor_v2, which has the dtype of its storage."""
    return _place(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_typed(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, *others: Any
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3, whose storage is of bytes."""
    return _place(storage, dtype, offset, tuple(shape), tuple(strides))


def _place(
    storage: _Storage, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> StoredTensor:
    item, numbers = ITEM_SIZES[dtype], (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"no tensor: {numbers}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) and (last + 1) * item > storage.nbytes:
        raise CheckpointError(f"{storage.file}: a tensor {list(shape)} reaches beyond its storage: copy it again")
    where = storage.offset + offset * item
    if prod(shape) <= 1 or strides == _row_major(shape, strides):
        return StoredTensor(storage.file, dtype, shape, where)
    return StridedTensor(storage.file, dtype, shape, where, strides=strides)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of rows one after the other; that of a dimension of one element means nothing, and is kept."""
    wanted = []
    for index, size in enumerate(shape):
        wanted.append(strides[index] if size == 1 else prod(shape[index + 1 :]))
    return tuple(wanted)


def _parameter(data: StoredTensor, *others: Any) -> StoredTensor:
    return data


def _from_type(rebuild: _Call, kind: Any, arguments: Any, state: Any) -> StoredTensor:
    """torch._tensor._rebuild_from_type_v2, of a tensor with attributes, which are dropped."""
    if not isinstance(rebuild, _Call):
        raise pickle.UnpicklingError("no tensor")
    return rebuild(*arguments)


def _encode(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {coding}")
    return text.encode(coding)


# What torch names in the files it writes, and what is made of it here.
KNOWN_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "_codecs.encode": _Call(_encode),
    "torch.Size": _Call(tuple),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_typed),
    "torch._utils._rebuild_parameter": _Call(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Call(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Call(_from_type),
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()},
}
