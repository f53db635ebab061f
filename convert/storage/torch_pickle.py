"""
Files of torch.save and other pickles, read by a restricted unpickler: nothing that a pickle names is imported or run.

Known globals of torch become functions of this module, which compute positions in the file. Globals on an allow-list
become inert OpaqueObjects. Any other global is an error; of a trusted file it becomes an OpaqueObject too. Only files
of torch before 1.6, which are no zip archives, are opened by torch.load.
"""

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .errors import CheckpointError
from .files import first_line
from .tensors import ITEM_SIZES, TORCH_DTYPES, StoredTensor, read_bytes, to_bytes


if TYPE_CHECKING:
    import torch

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip

# Harmless globals whose values are not needed; torch.load(weights_only=True) allows them too.
IGNORED_GLOBALS = {
    "builtins.bytearray", "builtins.complex", "collections.Counter", "torch.Tensor", "torch.device",
    "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
}  # fmt: skip

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic number, lengths of its name and of its extra field

NO_TORCH_FILE = "not a file of torch.save, or a broken one: copy or download it again"


def read_pickle(path: Path, trust: bool = False) -> dict[str, StoredTensor]:
    """
    The tensors of a file of torch.save, nested dictionaries flattened to dotted names.

    Args:
        trust: Skip objects of unknown classes; in a file of torch before 1.6, run their code.

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
            return _Unpickler(content, path, allowed, trust, window, members).load()


def read_opaque(path: Path, allowed: Collection[str], trust: bool = False) -> Any:
    """The object in a plain pickle, with an OpaqueObject for every object; arguments and errors as of read_saved."""
    with unpickling_errors(path), path.open("rb") as file:
        return _Unpickler(file, path, allowed, trust).load()


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
        raise CheckpointError(f"{location}: {NO_TORCH_FILE}: {first_line(error)}") from error


def _could_run_code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: opening it could run code ({name}): give --trust-pickle if you trust its author")


def _load_legacy(path: Path, trust: bool) -> Any:
    import torch

    with unpickling_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust)
        except pickle.UnpicklingError as error:
            if trust or not (name := re.search(r"GLOBAL (\S+)", str(error))):
                raise CheckpointError(f"{path}: {NO_TORCH_FILE}") from error  # torch's text advises to trust it
            raise _could_run_code(path, name[1]) from error


def _flatten(value: Any, name: str, path: Path, tensors: dict[str, StoredTensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), path, tensors)
    elif (isinstance(value, StoredTensor) and not isinstance(value, Storage)) or hasattr(value, "untyped_storage"):
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors have the name {name!r}")
        tensors[name] = value if isinstance(value, StoredTensor) else _loaded(value, name, path)


class Storage(StoredTensor):
    """A storage of torch: flat elements in a file, of which tensors are views."""


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor that torch.load has read."""

    tensor: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return self.cut(to_bytes(self.tensor), start, stop)


def _loaded(tensor: "torch.Tensor", name: str, path: Path) -> LoadedTensor:
    dtype = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    return LoadedTensor(path, dtype, tuple(tensor.shape), tensor=tensor)


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """A tensor in a file that is not row-major, `strides` in elements; to read a part is to read all of it."""

    strides: tuple[int, ...] = ()

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        item = ITEM_SIZES[self.dtype]
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements = read_bytes(StoredTensor(self.file, self.dtype, (span,), self.offset), 0, span).view(f"V{item}")
        steps = tuple(stride * item for stride in self.strides)
        ordered = np.lib.stride_tricks.as_strided(elements, self.shape, steps, writeable=False)
        return self.cut(np.ascontiguousarray(ordered).reshape(-1).view(np.uint8), start, stop)


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

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"": state}

    def append(self, item: Any) -> None:
        """Ignore items of lists."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore items of dictionaries."""


@lru_cache(maxsize=1024)
def _opaque_class(full: str) -> type[OpaqueObject]:
    return type(full, (OpaqueObject,), {"__slots__": ()})


class _Function:
    """A function that a pickle may call, but cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class FileSlice:
    """Part of a file, with the methods of a file that zipfile needs."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length = file, start, length

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.length}[whence]
        if position < 0:
            raise OSError("negative seek position")
        return self.file.seek(self.start + position) - self.start

    def read(self, count: int = -1) -> bytes:
        rest = max(self.length - self.tell(), 0)
        return self.file.read(rest if count is None or count < 0 else min(count, rest))


class _Unpickler(pickle.Unpickler):
    """
    Args:
        window, members: Of the zip archive that has the storages, if there is one.
    """

    def __init__(
        self, file: Any, path: Path, allowed: Collection[str], trust: bool, window: FileSlice | None = None,
        members: Mapping[str, zipfile.ZipInfo] | None = None,
    ):  # fmt: skip
        super().__init__(file)
        self.path, self.allowed, self.trust = path, allowed, trust
        self.window, self.members, self.offsets = window, members or {}, {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in KNOWN_GLOBALS:
            return KNOWN_GLOBALS[full]
        if full in IGNORED_GLOBALS or full in self.allowed or self.trust:
            return _opaque_class(full)
        raise _could_run_code(self.path, full)

    def persistent_load(self, identity: Any) -> Storage:
        """A storage from ("storage", dtype, key, device, number of elements)."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"no storage: {kind!r}")
        member, nbytes = self.members[f"data/{key}"], count * ITEM_SIZES[dtype]
        if member.file_size < nbytes:
            raise pickle.UnpicklingError(f"data/{key}: expected {nbytes} bytes, got {member.file_size}")
        if key not in self.offsets:
            self.offsets[key] = self.window.start + self._data_offset(member)
        return Storage(self.path, dtype, (count,), self.offsets[key])

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Where a member's data begins: after its local header, whose length the directory does not have."""
        self.window.seek(member.header_offset)
        magic, name, extra = LOCAL_HEADER.unpack(self.window.read(LOCAL_HEADER.size))
        begin = member.header_offset + LOCAL_HEADER.size + name + extra
        if magic != b"PK\x03\x04" or begin + member.file_size > self.window.length:
            raise pickle.UnpicklingError(f"{member.filename} is truncated")
        return begin


def _rebuild_tensor_v3(
    storage: Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str,
    metadata: Any = None,
) -> StoredTensor:  # fmt: skip
    shape, strides, item = tuple(shape), tuple(strides), ITEM_SIZES[dtype]
    numbers = (offset, *shape, *strides)
    is_valid = isinstance(storage, Storage) and len(shape) == len(strides)
    if not is_valid or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"no tensor: {numbers}")
    if metadata:  # its elements are stored conjugated or negated
        raise pickle.UnpicklingError(f"a tensor with {metadata}, which is not supported")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) and (last + 1) * item > storage.nbytes:
        raise pickle.UnpicklingError(f"a tensor {list(shape)} exceeds its storage")
    position = storage.offset + offset * item
    row_major = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if prod(shape) <= 1 or all(size == 1 or s == r for size, s, r in zip(shape, strides, row_major, strict=True)):
        return StoredTensor(storage.file, dtype, shape, position)
    return StridedTensor(storage.file, dtype, shape, position, strides=strides)


def _rebuild_tensor_v2(
    storage: Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> StoredTensor:
    return _rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype, metadata)


# Globals that torch writes, and what they resolve to here.
KNOWN_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "_codecs.encode": _Function(lambda text, encoding: text.encode("latin1")),
    "torch.Size": _Function(tuple),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(lambda data, *others: data),
    "torch._utils._rebuild_parameter_with_state": _Function(lambda data, *others: data),
    "torch._tensor._rebuild_from_type_v2": _Function(lambda rebuild, kind, arguments, state: rebuild(*arguments)),
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()},
}
