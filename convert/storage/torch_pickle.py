"""
Files of torch.save and other pickles, read by a restricted unpickler: nothing that a pickle names is imported or run.

Known globals of torch become functions of this module that compute positions in the file; globals on an allow-list
become inert OpaqueObjects; any other global is an error, or an OpaqueObject too if the user trusts the file. Only files
of torch before 1.6, which are no zip archives, are opened by torch.load.
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
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError
from .files import first_line
from .tensors import CHUNK, ITEM_SIZES, TORCH_DTYPES, StoredTensor, read_bytes, spans, to_bytes


if TYPE_CHECKING:
    import torch

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip

# Harmless globals whose values are not needed; torch.load(weights_only=True) allows them too.
IGNORED_GLOBALS = (
    "builtins.bytearray", "builtins.complex", "collections.Counter", "torch.Tensor", "torch.device",
    "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
)  # fmt: skip

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic number, lengths of its name and of its extra field

CORRUPT = "the file is truncated or corrupt, copy it again"


def read_pickle(path: Path, trust: bool = False) -> dict[str, StoredTensor]:
    """
    The tensors of a file of torch.save, nested dictionaries flattened to dotted names.

    Args:
        trust: Skip objects of unknown classes; of a file of torch before 1.6, run their code.

    Raises:
        CheckpointError: It names what could run code and is not trusted, or cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    content = read_saved(path, trust=trust) if zipfile.is_zipfile(path) else _load_legacy(path, trust)
    _flatten(content, "", path, tensors)
    if not tensors:
        raise CheckpointError(f"{path}: there is no tensor in it")
    return tensors


def read_saved(
    path: Path, allowed: Collection[str] = (), trust: bool = False, start: int = 0, length: int | None = None
) -> Any:
    """
    The object in a file of torch.save, with a StoredTensor for every tensor and an OpaqueObject for others.

    Args:
        allowed: Full names of classes that become OpaqueObjects.
        trust: Whether every class does.
        start, length: Its position in the file and its bytes, if the file has several.

    Raises:
        CheckpointError: It names something that is not allowed, or cannot be read.
    """
    length = path.stat().st_size - start if length is None else length
    with unpickling_errors(path), path.open("rb") as file:
        window = FileSlice(file, start, length)
        if not zipfile.is_zipfile(window):
            what = "no zip archive of torch.save: corrupt, or saved with _use_new_zipfile_serialization=False"
            raise CheckpointError(f"{path}: {what}: copy or save it again")
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise CheckpointError(f"{path}: it is compressed, which torch.save does not do")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: its numbers are big-endian: save it on another machine")
            content = io.BytesIO(archive.read(members["data.pkl"]))
            return _Unpickler(content, path, allowed, trust, StorageLocator(path, window, members)).load()


def read_opaque(path: Path, allowed: Collection[str], trust: bool = False) -> Any:
    """
    The object in a plain pickle, with an OpaqueObject for every object; arguments and errors as of read_saved.
    """
    with unpickling_errors(path), path.open("rb") as file:
        return _Unpickler(file, path, allowed, trust).load()


def corrupt_member(path: Path) -> str | None:
    """The first member of a zip archive of torch.save that fails its checksum, if any."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


@contextmanager
def unpickling_errors(location: Path | str) -> Iterator[None]:
    """Convert whatever a corrupt file makes its readers raise to a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ArithmeticError, AttributeError, EOFError,
            ImportError, LookupError, MemoryError, NotImplementedError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        what = f"not a file of torch.save, or a broken one: copy or download it again: {first_line(error)}"
        raise CheckpointError(f"{location}: {what}") from error


def _could_run_code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: opening it could run code ({name}): give --trust-pickle if you trust its author")


def _load_legacy(path: Path, trust: bool) -> Any:
    import torch

    with unpickling_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats; errors repeat it
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust)
        except pickle.UnpicklingError as error:
            if trust or not (name := re.search(r"GLOBAL (\S+)", str(error))):
                raise
            raise _could_run_code(path, name[1]) from error


def _flatten(value: Any, name: str, path: Path, tensors: dict[str, StoredTensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), path, tensors)
    elif isinstance(value, StoredTensor) or hasattr(value, "untyped_storage"):
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors have the name {name!r}")
        tensors[name] = value if isinstance(value, StoredTensor) else _loaded(value, name, path)


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor that torch.load has read."""

    tensor: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        item, data = ITEM_SIZES[self.dtype], to_bytes(self.tensor)
        for first, last in spans(start * item, self.nbytes if stop is None else stop * item, CHUNK):
            yield data[first:last]


def _loaded(tensor: "torch.Tensor", name: str, path: Path) -> LoadedTensor:
    dtype = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    return LoadedTensor(path, dtype, tuple(tensor.shape), tensor=tensor)


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """
    A tensor in a file that is not row-major; every read of a part reads all of it.

    Attributes:
        strides: In elements, one for each dimension.
    """

    strides: tuple[int, ...] = ()

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        item = ITEM_SIZES[self.dtype]
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements = read_bytes(StoredTensor(self.file, self.dtype, (span,), self.offset), 0, span).view(f"V{item}")
        steps = tuple(stride * item for stride in self.strides)
        ordered = np.lib.stride_tricks.as_strided(elements, self.shape, steps, writeable=False)
        data = np.ascontiguousarray(ordered).reshape(-1).view(np.uint8)
        for first, last in spans(start * item, self.nbytes if stop is None else stop * item, CHUNK):
            yield data[first:last]


class OpaqueObject:
    """
    An inert stand-in for an object of another package.

    Attributes:
        arguments: The arguments of its constructor.
        state: Its attributes.
    """

    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> "OpaqueObject":
        created = super().__new__(cls)
        created.arguments, created.state = arguments, {}
        return created

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"": state}

    def append(self, item: Any) -> None:
        """Ignore items of lists."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore items of dictionaries."""


class _Function:
    """A function that a pickle may call, but cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class FileSlice(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise ValueError("negative seek position")
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        read = self.file.read(max(min(len(buffer), self.length - self.position), 0))
        buffer[: len(read)] = read
        self.position += len(read)
        return len(read)


@dataclass(frozen=True)
class _Storage:
    """A torch storage: a range of bytes in a file."""

    file: Path
    offset: int
    nbytes: int
    dtype: str


class StorageLocator:
    """Finds the storages in a zip archive of torch.save."""

    def __init__(self, path: Path, window: FileSlice, members: dict[str, zipfile.ZipInfo]):
        self.path, self.window, self.members = path, window, members
        self.offsets: dict[str, int] = {}

    def storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id: ("storage", dtype, key, device, number of elements)."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"no storage: {kind!r}")
        member, nbytes = self.members[f"data/{key}"], count * ITEM_SIZES[dtype]
        if member.file_size < nbytes:
            what = f"data/{key}: expected {nbytes} bytes, got {member.file_size}: {CORRUPT}"
            raise CheckpointError(f"{self.path}: {what}")
        if key not in self.offsets:
            self.offsets[key] = self._data_offset(member)
        return _Storage(self.path, self.window.start + self.offsets[key], nbytes, dtype)

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Where a member's data begins: after its local header, whose length the directory does not have."""
        self.window.seek(member.header_offset)
        magic, name, extra = LOCAL_HEADER.unpack(self.window.read(LOCAL_HEADER.size))
        begin = member.header_offset + LOCAL_HEADER.size + name + extra
        if magic != b"PK\x03\x04" or begin + member.file_size > self.window.length:
            raise CheckpointError(f"{self.path}: {member.filename}: {CORRUPT}")
        return begin


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: Any, path: Path, allowed: Collection[str], trust: bool, locator: StorageLocator | None = None
    ):
        super().__init__(file)
        self.path, self.allowed, self.trust, self.locator = path, allowed, trust, locator

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in KNOWN_GLOBALS:
            return KNOWN_GLOBALS[full]
        if full in IGNORED_GLOBALS or full in self.allowed or self.trust:
            return _opaque_class(full)
        raise _could_run_code(self.path, full)

    def persistent_load(self, identity: Any) -> _Storage:
        if self.locator is None:
            raise pickle.UnpicklingError("a storage in a plain pickle")
        return self.locator.storage(identity)


@lru_cache(maxsize=1024)
def _opaque_class(full: str) -> type[OpaqueObject]:
    return type(full, (OpaqueObject,), {"__slots__": ()})


def _rebuild_tensor_v2(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> StoredTensor:
    return _tensor_in(storage, storage.dtype, offset, tuple(shape), tuple(strides), metadata)


def _rebuild_tensor_v3(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, metadata: Any = None
) -> StoredTensor:
    return _tensor_in(storage, dtype, offset, tuple(shape), tuple(strides), metadata)


def _tensor_in(
    storage: _Storage, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], metadata: Any
) -> StoredTensor:
    item, numbers = ITEM_SIZES[dtype], (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers) or metadata:
        raise pickle.UnpicklingError(f"no tensor: {numbers} {metadata or ''}")  # metadata: conjugate or negative bits
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) and (last + 1) * item > storage.nbytes:
        raise CheckpointError(f"{storage.file}: a tensor {list(shape)} exceeds its storage: {CORRUPT}")
    position = storage.offset + offset * item
    if prod(shape) <= 1 or strides == _row_major(shape, strides):
        return StoredTensor(storage.file, dtype, shape, position)
    return StridedTensor(storage.file, dtype, shape, position, strides=strides)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor; those of dimensions of size 1, which mean nothing, are taken from `strides`."""
    return tuple(strides[axis] if size == 1 else prod(shape[axis + 1 :]) for axis, size in enumerate(shape))


def _rebuild_parameter(data: StoredTensor, *others: Any) -> StoredTensor:
    return data


def _rebuild_from_type_v2(rebuild: _Function, kind: Any, arguments: Any, state: Any) -> StoredTensor:
    if not isinstance(rebuild, _Function):
        raise pickle.UnpicklingError("no tensor")
    return rebuild(*arguments)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode(encoding)


# Globals that torch writes, and what they resolve to here.
KNOWN_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "_codecs.encode": _Function(_encode),
    "torch.Size": _Function(tuple),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": _Function(_rebuild_from_type_v2),
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()},
}
