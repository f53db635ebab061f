"""
Files of torch.save and other pickles, read by a restricted unpickler: nothing that a pickle names is imported or run.
Known globals of torch become functions of this module, which compute positions in the file. Globals on an allow-list
become inert OpaqueObjects. Any other global is an error; of a trusted file it becomes an OpaqueObject too.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .files import first_line
from .tensors import CHUNK, ITEM_SIZES, TORCH_DTYPES, ComputedTensor, StoredTensor, read_bytes, spans


STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip

# Globals whose values are not needed: those that torch.load(weights_only=True) allows too, and classes of .metadata
# (torch.distributed.checkpoint) and of DeepSpeed's files.
IGNORED_GLOBALS = {
    "builtins.bytearray", "builtins.complex", "collections.Counter", "torch.Tensor", "torch.device",
    "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"torch.distributed.checkpoint.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip

# The beginning of a file of torch before 1.6: its magic number, pickled.
BEFORE_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic number, bytes of its name and of its extra field

NO_TORCH_FILE = "not a file of torch.save, or a broken one: copy or download it again"


def read_pickle(path: Path, trust: bool = False) -> dict[str, StoredTensor]:
    """
    The tensors of a file of torch.save, by the dotted names of nested dictionaries; other objects are skipped. Raises a
    CheckpointError as read_saved does, and if there is no tensor, or two have one name.
    """
    tensors: dict[str, StoredTensor] = {}
    _flatten(read_saved(path, trust=trust), "", path, tensors)
    if not tensors:
        raise CheckpointError(f"{path}: there is no tensor in it")
    return tensors


def read_saved(path: Path, trust: bool = False, start: int = 0, length: int | None = None) -> Any:
    """
    The object in a file of torch.save, or in `length` bytes of a file from `start` on, with a StoredTensor for every
    tensor and an OpaqueObject for others; with `trust` also for those of unknown classes, else a CheckpointError.
    """
    with unpickling_errors(path), FileSlice(path, start, length) as file:
        if file.read(len(BEFORE_1_6)) == BEFORE_1_6:
            raise CheckpointError(f"{path}: its format is that of torch before 1.6: load and save it with torch>=1.6")
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise CheckpointError(f"{path}: it is compressed, which torch.save does not do")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: its numbers are big-endian: save it on another machine")
            content = io.BytesIO(archive.read(members["data.pkl"]))
            return _Unpickler(content, path, trust, cache(lambda key: _locate(file, members[f"data/{key}"]))).load()


def read_opaque(path: Path, trust: bool = False) -> Any:
    """The object in a plain pickle without tensors, with an OpaqueObject for every object; errors as of read_saved."""
    with unpickling_errors(path), path.open("rb") as file:
        return _Unpickler(file, path, trust).load()


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


def _flatten(value: Any, name: str, path: Path, tensors: dict[str, StoredTensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), path, tensors)
    elif isinstance(value, StoredTensor) and not isinstance(value, Storage):
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors have the name {name!r}")
        tensors[name] = value


class Storage(StoredTensor):
    """A storage of torch: flat elements in a file, of which tensors are views."""


class OpaqueObject:
    """An inert stand-in for an object of another package: `arguments` of its constructor, attributes in `state`."""

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


class FileSlice(io.BufferedReader):
    """`length` bytes of a file from `start` on, or the rest of it."""

    def __init__(self, path: Path, start: int, length: int | None):
        super().__init__(io.FileIO(path))
        self.start, self.length = start, path.stat().st_size - start if length is None else length
        self.seek(0)

    def tell(self) -> int:
        return super().tell() - self.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.length}[whence]
        if position < 0:
            raise io.UnsupportedOperation("negative seek position")  # to zipfile an OSError, else a ValueError
        return super().seek(self.start + position) - self.start

    def read(self, count: int | None = -1) -> bytes:
        rest = max(self.length - self.tell(), 0)
        return super().read(rest if count is None or count < 0 else min(count, rest))


def _locate(file: FileSlice, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where in its file the data of a member begins, after its local header (4.3.7 of APPNOTE.TXT), and its bytes."""
    file.seek(member.header_offset)
    magic, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    begin = member.header_offset + LOCAL_HEADER.size + name + extra
    if magic != zipfile.stringFileHeader or begin + member.file_size > file.length:
        raise pickle.UnpicklingError(f"{member.filename} is truncated")
    return file.start + begin, member.file_size


class _Unpickler(pickle.Unpickler):
    """`locate` maps the key of a storage to its position in the file and its bytes; without it there are none."""

    def __init__(self, file: Any, path: Path, trust: bool, locate: Callable[[str], tuple[int, int]] = {}.__getitem__):
        super().__init__(file)
        self.path, self.trust, self.locate = path, trust, locate

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in KNOWN_GLOBALS:
            return KNOWN_GLOBALS[full]
        if full in IGNORED_GLOBALS or self.trust:
            return _opaque_class(full)
        raise CheckpointError(f"{self.path}: opening it could run code ({full}): --trust-pickle skips such objects")

    def persistent_load(self, identity: Any) -> Storage:
        """A storage from ("storage", dtype, key, device, number of elements)."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"no storage: {kind!r}")
        (position, size), nbytes = self.locate(key), count * ITEM_SIZES[dtype]
        if size < nbytes:
            raise pickle.UnpicklingError(f"data/{key}: expected {nbytes} bytes, got {size}")
        return Storage(self.path, dtype, (count,), position)


def _rebuild_tensor_v3(
    storage: Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, metadata: Any = None
) -> StoredTensor:
    shape, strides, item = tuple(shape), tuple(strides), ITEM_SIZES[dtype]
    numbers = (offset, *shape, *strides)
    is_valid = isinstance(storage, Storage) and len(shape) == len(strides)
    if not is_valid or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"no tensor: {numbers}")
    if metadata:  # its elements are stored conjugated or negated
        raise pickle.UnpicklingError(f"a tensor with {metadata}, which is not supported")
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) and (offset + span) * item > storage.nbytes:
        raise pickle.UnpicklingError(f"a tensor {list(shape)} exceeds its storage")
    position = storage.offset + offset * item
    row_major = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if prod(shape) <= 1 or all(size == 1 or s == r for size, s, r in zip(shape, strides, row_major, strict=True)):
        return StoredTensor(storage.file, dtype, shape, position)
    read = partial(_read_strided, StoredTensor(storage.file, dtype, (span,), position), shape, strides)
    return ComputedTensor(storage.file, dtype, shape, position, read=read)


def _read_strided(
    stored: StoredTensor, shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int
) -> Iterator[np.ndarray]:
    """A part of a tensor that is not row-major, from all elements that it spans; `strides` in elements."""
    item = ITEM_SIZES[stored.dtype]
    elements, steps = read_bytes(stored, 0, *stored.shape).view(f"V{item}"), [stride * item for stride in strides]
    ordered = np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)
    data = np.ascontiguousarray(ordered).reshape(-1).view(np.uint8)
    return (data[first:last] for first, last in spans(start * item, stop * item, CHUNK))


# Globals that torch writes, and what they resolve to here.
KNOWN_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "_codecs.encode": _Function(lambda text, encoding: text.encode("latin1")),
    "torch.Size": _Function(tuple),
    "torch._utils._rebuild_tensor_v2": _Function(
        lambda storage, *others: _rebuild_tensor_v3(storage, *others[:5], storage.dtype, *others[5:])
    ),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(lambda data, *others: data),
    "torch._utils._rebuild_parameter_with_state": _Function(lambda data, *others: data),
    "torch._tensor._rebuild_from_type_v2": _Function(lambda rebuild, kind, arguments, state: rebuild(*arguments)),
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{name}": dtype for name, dtype in {**STORAGES, **TORCH_DTYPES}.items()},
}
