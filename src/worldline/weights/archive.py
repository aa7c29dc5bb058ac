"""PyTorch's zip archives, `.pt` and TorchScript alike, read without running anything in them.

An archive `<root>/` holds `data.pkl` (the objects), `data/<key>` (the bytes of each storage) and
sometimes `byteorder`; TorchScript adds `constants.pkl` and `code/`. The pickle goes through an
unpickler that knows a dozen names: a tensor becomes a record of where it lies, a TorchScript
module an inert holder of its attributes, a piece of training state an empty stand-in, and every
other name is refused. No code member is opened.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.weights.source import FileTensor, TensorInfo

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

# Found in optimizers' and schedulers' state and in `_extra_state`. Nothing of them is needed, so
# none is built: each becomes an empty stand-in.
_STAND_INS = {
    ("_io", "BytesIO"),
    ("io", "BytesIO"),
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "bytes"),
    ("builtins", "complex"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("__builtin__", "bytearray"),
    ("__builtin__", "bytes"),
    ("__builtin__", "complex"),
    ("__builtin__", "frozenset"),
    ("__builtin__", "set"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "device"),
}

_LARGEST_PICKLE = 1 << 30  # bytes; the largest real one is below a megabyte
_DEEPEST = 100  # nested modules


class Refused(pickle.UnpicklingError):
    """The pickle names a class that could run code."""


class _Inert:
    """An object of the pickle that is not built; a TorchScript module keeps its attributes."""

    __slots__ = ("state",)

    def __init__(self, *values: object, **named: object) -> None:
        self.state: object = None

    def __new__(cls, *values: object, **named: object) -> _Inert:
        made = super().__new__(cls)
        made.state = None
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


class _Module(_Inert):
    """A TorchScript object."""

    __slots__ = ()


@dataclass(frozen=True)
class Storage:
    dtype: torch.dtype
    key: str
    nbytes: int


@dataclass(frozen=True)
class Record:
    """A tensor as the pickle tells it; `offset` and `strides` in elements."""

    storage: Storage
    info: TensorInfo
    offset: int
    strides: tuple[int, ...]


class Unpickler(pickle.Unpickler):
    """Knows tensors, dicts, lists and stand-ins.

    What `find_class` returns is immutable or takes its state by `__setstate__`, so that a hostile
    pickle cannot change it for the next file: builtin types, bound methods, `_Inert`.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils":
            rebuild: dict[str, Callable[..., Any]] = {
                "_rebuild_tensor_v2": self._tensor,
                "_rebuild_tensor_v3": self._tensor,
                "_rebuild_parameter": self._first,
                "_rebuild_parameter_with_state": self._first,
            }
            if name in rebuild:
                return rebuild[name]
        if module == "torch.jit._pickle":
            return self._first
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _STAND_INS:
            return _Inert
        raise Refused(f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> Storage:
        match identifier:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel):
                return Storage(dtype, key, numel * dtype.itemsize)
        raise pickle.UnpicklingError(f"an unknown persistent object {identifier!r:.80}")

    def _first(self, value: object = None, *rest: object) -> object:
        return value

    def _tensor(self, storage: Any, offset: Any, size: Any, strides: Any, *rest: Any) -> Record:
        shape, strides = tuple(size), tuple(strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise pickle.UnpicklingError("a malformed tensor")
        if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
            raise pickle.UnpicklingError("a malformed tensor")
        # Version 3 adds the dtype, since its storage is untyped bytes.
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
        info = TensorInfo(dtype, shape)
        if info.numel:
            last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if (last + 1) * dtype.itemsize > storage.nbytes:
                raise pickle.UnpicklingError("a tensor that reaches past its storage")
        return Record(storage, info, offset, strides)


@dataclass(frozen=True)
class ArchiveContents:
    """What an archive holds.

    Attributes:
        torchscript: whether it is a TorchScript archive.
        nesting: dotted path of the dict that was taken, "" for the outermost.
        tensors: in the order of the file.
        strays: names of values that are no tensors, beside the tensors.
        beside: the other keys of the outer dict, such as "optimizer".
    """

    torchscript: bool
    nesting: str
    tensors: dict[str, FileTensor]
    strays: tuple[str, ...]
    beside: tuple[str, ...]


def read_archive(path: Path) -> ArchiveContents:
    """Read the header of a zip archive.

    Raises:
        CheckpointError: it is cut short, damaged, no PyTorch file, or names unsafe classes.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {member.filename: member for member in archive.infolist()}
            return _read_members(path, archive, file, members)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {path.stat().st_size:,} bytes, and the "
            f"directory that ends such a file cannot be read ({error}); download it again"
        ) from error


def _read_members(
    path: Path,
    archive: zipfile.ZipFile,
    file: io.BufferedReader,
    members: Mapping[str, zipfile.ZipInfo],
) -> ArchiveContents:
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if not roots:
        raise CheckpointError(f"{path} is a zip archive, but not one that PyTorch wrote")
    root = min(roots, key=len)
    pickled = members[f"{root}data.pkl"]
    if pickled.file_size > _LARGEST_PICKLE:
        raise CheckpointError(f"{path} is refused: {pickled.filename} is {pickled.file_size:,} B")
    if _stored(pickled):
        file.seek(_data_start(path, file, pickled))
        text = file.read(pickled.file_size)
    else:
        text = archive.read(pickled)
    value = _unpickle(path, text)
    order = sys.byteorder
    if f"{root}byteorder" in members:
        order = "big" if archive.read(f"{root}byteorder").strip() == b"big" else "little"

    torchscript = f"{root}constants.pkl" in members or isinstance(value, _Module)
    nesting, value, beside = ("", value, ()) if torchscript else unnest(value)
    records: dict[str, Record] = {}
    strays: list[str] = []
    for name, item in _items(value):
        if isinstance(item, Record):
            records[name] = item
        elif not torchscript:
            strays.append(name)
    tensors = {
        name: _locate(path, file, root, members, name, record, order != sys.byteorder)
        for name, record in records.items()
    }
    return ArchiveContents(torchscript, nesting, tensors, tuple(strays), beside)


def _unpickle(path: Path, text: bytes) -> object:
    try:
        return Unpickler(io.BytesIO(text), encoding="utf-8").load()
    except Refused as error:
        raise CheckpointError(refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{path} is damaged: its list of tensors cannot be read ({error}); download it again"
        ) from error


def refusal(path: Path, name: str) -> str:
    """The message for a pickle that names a class outside the known ones."""
    return (
        f"{path} is refused: its pickle names {name}, and loading that could run code; "
        "only files of plain tensors are read, so save its state_dict() (or safetensors) instead"
    )


def unnest(value: object) -> tuple[str, object, tuple[str, ...]]:
    """Step into {"model": {...}} and {"state_dict": {...}}.

    Returns:
        The dotted path taken, the value there, and the other keys on the way.
    """
    path: list[str] = []
    beside: list[str] = []
    while isinstance(value, dict):
        inner = next((k for k in ("model", "state_dict") if isinstance(value.get(k), dict)), None)
        if inner is None:
            break
        path.append(inner)
        beside += [str(key) for key in value if key != inner]
        value = value[inner]
    return ".".join(path), value, tuple(beside)


def _items(value: object) -> Iterator[tuple[str, object]]:
    """Names and values of a dict, a list, a lone tensor or a TorchScript module."""
    if isinstance(value, _Module):
        yield from _attributes(value, "", 0)
    elif isinstance(value, dict):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
    else:
        yield "0", value


def _attributes(module: _Module, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _DEEPEST:
        raise CheckpointError(f"a TorchScript archive nests modules deeper than {_DEEPEST}")
    if not isinstance(module.state, dict):
        return
    for name, item in module.state.items():
        if isinstance(item, _Module):
            yield from _attributes(item, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", item


def _stored(member: zipfile.ZipInfo) -> bool:
    return member.compress_type == zipfile.ZIP_STORED


def _data_start(path: Path, file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: its local header has a length of its own."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is damaged: {member.filename} is not where the directory says "
            "(a download that was not finished?); download it again"
        )
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + int(name_length) + int(extra_length)


def _locate(
    path: Path,
    file: io.BufferedReader,
    root: str,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
    record: Record,
    swapped: bool,
) -> FileTensor:
    member = members.get(f"{root}data/{record.storage.key}")
    if member is None or member.file_size < record.storage.nbytes or member.flag_bits & 1:
        have = 0 if member is None else member.file_size
        raise CheckpointError(
            f"{path} is damaged: tensor {name} needs {record.storage.nbytes:,} bytes and the file "
            f"holds {have:,}; download it again"
        )
    offset = record.offset * record.info.dtype.itemsize
    if _stored(member):
        start = _data_start(path, file, member)
        return FileTensor(path, record.info, start + offset, record.strides, swapped)
    return FileTensor(path, record.info, offset, record.strides, swapped, member.filename)
