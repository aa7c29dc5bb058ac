"""PyTorch's pickled files, read without running anything in them.

A zip archive `<root>/` (`.pt`, TorchScript) holds `data.pkl` (the objects), `data/<key>` (the bytes
of each storage) and sometimes `byteorder`; TorchScript adds `constants.pkl` and `code/`. A file
from before PyTorch 1.6, which the 45 GB of T5-11B may well be, is four pickles (a magic number, a
version, the byte order, the objects), a fifth with the keys of the storages, and then the number of
elements and the bytes of each storage.

The pickles go through an unpickler that knows a dozen names: a tensor becomes a record of where it
lies, a TorchScript module an inert holder of its attributes, a piece of training state an empty
stand-in, and every other name is refused. No code member is opened.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from worldline.errors import CheckpointError
from worldline.weights.source import Checkpoint, FileTensor, TensorInfo

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

# Found in the state of optimizers and schedulers and in `_extra_state`. None is needed, so none is
# built: each becomes an empty stand-in.
_BUILTINS = ("bytearray", "bytes", "complex", "frozenset", "set", "slice")
_STAND_INS = {
    "_io": ("BytesIO",),
    "io": ("BytesIO",),
    "_codecs": ("encode",),
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "collections": ("Counter", "defaultdict"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "torch": ("device",),
}

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LARGEST_PICKLE = 1 << 30  # bytes; the largest real one is below a megabyte
_DEEPEST = 100  # nested modules


class Refused(pickle.UnpicklingError):
    """The pickle names a class that could run code."""


class _Inert:
    """An object of the pickle that is not built; a TorchScript module keeps its attributes."""

    state: object = None

    def __new__(cls, *values: object, **named: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...


class _Module(_Inert):
    """A TorchScript object."""


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    nbytes: int


@dataclass(frozen=True)
class _Record:
    """A tensor as the pickle describes it; `offset` and `strides` in elements."""

    storage: _Storage
    info: TensorInfo
    offset: int
    strides: tuple[int, ...]

    def locate(self, path: Path, start: int) -> FileTensor:
        """The tensor in a file; `start` is where its storage begins."""
        position = start + self.offset * self.info.dtype.itemsize
        return FileTensor(path, self.info, position, self.strides)


class Unpickler(pickle.Unpickler):
    """Knows tensors, dicts, lists and stand-ins.

    What `find_class` returns is immutable or takes its state by `__setstate__`, so that a hostile
    pickle cannot change it for the next file: builtin types, bound methods, `_Inert`.

    Attributes:
        storages: key -> storage, of all that the pickle names.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3":
                return self._tensor
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return self._first
            case "torch.jit._pickle", _:
                return self._first
            case "torch", "Size":
                return tuple
            case "torch.storage", "UntypedStorage":
                return torch.uint8
        if module == "torch":
            dtype = _STORAGES.get(name, getattr(torch, name, None))
            if isinstance(dtype, torch.dtype):
                return dtype
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if name in _STAND_INS.get(module, ()):
            return _Inert
        raise Refused(f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            # a legacy file has a sixth field, for a view that very old versions wrote
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view):
                if view in ([], [None]):
                    storage = _Storage(dtype, key, numel * dtype.itemsize)
                    return self.storages.setdefault(key, storage)
        raise pickle.UnpicklingError(f"an unknown persistent object {identifier!r:.80}")

    def _first(self, value: object = None, *rest: object) -> object:
        return value

    def _tensor(self, storage: Any, offset: Any, size: Any, strides: Any, *rest: Any) -> _Record:
        shape, strides = tuple(size), tuple(strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise pickle.UnpicklingError("a malformed tensor")
        if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
            raise pickle.UnpicklingError("a malformed tensor")
        # Version 3 adds the dtype, since its storage is untyped bytes.
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
        record = _Record(storage, TensorInfo(dtype, shape), offset, strides)
        tensor = record.locate(Path(), 0)
        if tensor.span and tensor.position + tensor.span > storage.nbytes:
            raise pickle.UnpicklingError("a tensor that reaches past its storage")
        return record


def open_archive(path: Path) -> Checkpoint:
    """Open a zip archive by its header.

    Raises:
        CheckpointError: it is cut short, damaged, no PyTorch file, or names unsafe classes.
    """
    with _faults(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if not roots:
            raise CheckpointError(f"{path} is a zip archive, but not one that PyTorch wrote")
        root = min(roots, key=len)
        pickled = members[f"{root}data.pkl"]
        if pickled.file_size > _LARGEST_PICKLE:
            raise CheckpointError(f"{path} is refused: {pickled.filename} is above {1 << 30:,} B")
        order = members.get(f"{root}byteorder")
        _refuse_order(path, order is None or archive.read(order).strip() == b"little")
        file.seek(_data_start(path, file, pickled))  # not by zipfile: its checksum may be absent
        value = Unpickler(io.BytesIO(file.read(pickled.file_size))).load()

        def locate(name: str, record: _Record) -> FileTensor:
            member = members.get(f"{root}data/{record.storage.key}")
            nbytes = member.file_size if member and not member.flag_bits & 1 else 0
            if member is None or nbytes < record.storage.nbytes:
                raise ValueError(f"tensor {name} has {nbytes:,} bytes")
            return record.locate(path, _data_start(path, file, member))

        torchscript = f"{root}constants.pkl" in members or isinstance(value, _Module)
        return _collect(path, "jit" if torchscript else "pt", value, locate)


def _data_start(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: its local header has a length of its own."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path} is compressed ({member.filename}); save it without")
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{member.filename} is not where the directory puts it")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + int(name_length) + int(extra_length)


def is_legacy(head: bytes) -> bool:
    """Whether the first bytes of a file are of the format before PyTorch 1.6."""
    return LEGACY_MAGIC.to_bytes(10, "little") in head[:32]


def open_legacy(path: Path) -> Checkpoint:
    """Open a file from before PyTorch 1.6 by its header.

    Raises:
        CheckpointError: it is cut short, damaged, or names unsafe classes.
    """
    with _faults(path), path.open("rb") as file:
        magic, version, machine = (Unpickler(file).load() for _ in range(3))
        objects = Unpickler(file)
        value, keys = objects.load(), Unpickler(file).load()
        if (magic, version) != (LEGACY_MAGIC, _LEGACY_VERSION):
            raise CheckpointError(f"{path} is in no known format (version {version!r:.20})")
        starts: dict[str, int] = {}
        position, size = file.tell(), path.stat().st_size
        for key in keys:
            storage = objects.storages[key]
            file.seek(position)
            numel = int.from_bytes(file.read(8), "little", signed=True)
            starts[key] = position + 8
            position += 8 + storage.nbytes
            if position > size:
                raise ValueError(f"it needs at least {position:,}")
            if numel * storage.dtype.itemsize != storage.nbytes:
                raise ValueError(f"storage {key} has {numel:,} elements")
        _refuse_order(path, machine.get("little_endian", True))
        return _collect(path, "pt", value, lambda _, r: r.locate(path, starts[r.storage.key]))


def _refuse_order(path: Path, little: bool) -> None:
    if little != (sys.byteorder == "little"):
        raise CheckpointError(f"{path} is of a machine with another byte order; save it again here")


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file raises into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(
            f"{path} is refused: its pickle names {error}, and loading that could run code; save "
            "its state_dict() (or safetensors) instead"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {path.stat().st_size:,} bytes, and its "
            f"tensors cannot be found ({error}); download it again"
        ) from error


def _collect(
    path: Path, kind: str, value: object, locate: Callable[[str, _Record], FileTensor]
) -> Checkpoint:
    """The tensors of unpickled objects, those of {"model": {…}} or {"state_dict": {…}} if any."""
    nesting: list[str] = []
    beside: list[str] = []
    while isinstance(value, dict):
        inner = next((k for k in ("model", "state_dict") if isinstance(value.get(k), dict)), None)
        if inner is None:
            break
        nesting.append(inner)
        beside += [str(key) for key in value if key != inner]
        value = value[inner]
    records = {name: item for name, item in _items(value) if isinstance(item, _Record)}
    return Checkpoint(
        path,
        kind,
        {name: locate(name, record) for name, record in records.items()},
        files=(path,),
        nesting=".".join(nesting),
        beside=tuple(beside),
    )


def _items(value: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Names and values of a dict, a list, a lone tensor or a TorchScript module."""
    if isinstance(value, _Module):
        if depth > _DEEPEST:
            raise ValueError(f"modules are nested deeper than {_DEEPEST}")
        for name, item in value.state.items() if isinstance(value.state, Mapping) else ():
            if isinstance(item, _Module):
                yield from _items(item, f"{prefix}{name}.", depth + 1)
            else:
                yield f"{prefix}{name}", item
    elif isinstance(value, dict):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
    else:
        yield "0", value
