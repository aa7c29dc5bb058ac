"""PyTorch's pickled files, opened by header without running anything in them.

A zip archive `<root>/` (`.pt`, TorchScript) holds `data.pkl` (the objects), `data/<key>` (the bytes
of each storage) and sometimes `byteorder`; TorchScript adds `constants.pkl` and `code/`. A file
from before PyTorch 1.6, which the 45 GB of T5-11B may well be, is four pickles (a magic number, a
version, the byte order, the objects), a fifth with the keys of the storages, and then the number of
elements and the bytes of each storage.

The pickles go through an unpickler that knows a dozen names: a tensor becomes a record of where it
lies, a TorchScript module an inert holder of its attributes. A class that is not known, beside the
tensors, becomes an empty stand-in; a function, a class of torch or of a standard module that acts,
and whatever would be built of a tensor, are refused. No code member is opened. (`torch.load` with
`weights_only` takes neither TorchScript nor the training state of the released files.)
"""

from __future__ import annotations

import builtins
import io
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION, StorageType

from worldline.errors import CheckpointError, one_line, strerror
from worldline.weights.names import is_averaged, is_state

# Bytes of a pickle in a small file, and in any; a real one has about 130 a tensor. In memory it may
# take 70 times as many.
_SMALL_PICKLE, _LARGEST_PICKLE = 3 << 20, 64 << 20
_OPCODES = pickle._Unpickler.dispatch
_MOST_NAMES = 1000  # of unknown classes
# Modules whose objects are found in settings, in the state of optimizers and schedulers and in
# `_extra_state`. None is built: each becomes an empty stand-in.
_DATA_MODULES = re.compile(
    "_codecs|_?io|argparse|collections|copyreg|datetime|decimal|enum|fractions|functools|numpy|"
    "pathlib|random|types|typing|uuid"
)


class Inert:
    """An object of the pickle that is not built; a TorchScript module keeps its attributes.

    Attributes:
        refuse: raises, where an unknown class would be built of a tensor.
    """

    state: Mapping[str, object] = {}
    refuse: Callable[[], None] | None = None

    def __new__(cls, *values: object, **named: object) -> Inert:
        if cls.refuse is not None and any(isinstance(value, _Record) for value in values):
            cls.refuse()
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def add(self, value: object) -> None: ...


class _Module(Inert):
    """A TorchScript object."""


class _Plain(Inert):
    """The type of a tensor that is of no class of its own, but has attributes."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    nbytes: int


class _Record(NamedTuple):
    """A tensor as the pickle describes it; `offset` in bytes from the start of its storage."""

    storage: _Storage
    offset: int
    meta: Tensor


class Unpickler(pickle._Unpickler):
    """Knows tensors, dicts, lists and stand-ins.

    What `find_class` returns is immutable or takes its state by `__setstate__`, so that a hostile
    pickle cannot change it for the next file: builtin types, bound methods, `Inert`. It is the
    one in Python (35 ms for 1,000 tensors, 15 in C), whose memory grows with what was read alone:
    in C, an opcode of five bytes reserves 32 GB.

    Attributes:
        path: file of the pickle.
        storages: key -> storage, of all that the pickle names.
        stand_ins: module and name -> what takes the place of an unknown class.
    """

    stack: list[Any]
    append: Any
    pop_mark: Any

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, _Storage] = {}
        self.stand_ins: dict[tuple[str, str], type[Inert]] = {}

    def _set_items(self) -> None:
        self._put(self.pop_mark())

    def _set_item(self) -> None:
        self._put([self.stack.pop(-2), self.stack.pop()])

    def _put(self, items: Sequence[Any]) -> None:
        """Give the dict on the stack its keys and values, in turn."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, tuple) and any(isinstance(each, tuple) for each in key):
                # which may share parts: hashing 60 levels of two would never end
                raise pickle.UnpicklingError("a key of nested tuples")
            if isinstance(target, dict) and key in target:
                raise pickle.UnpicklingError(f"{key!r:.80} twice in a dict")
            target[key] = value

    dispatch: ClassVar[dict[int, Any]] = {
        **_OPCODES,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        # these reserve more memory than they have bytes, or hash; sets are never needed
        pickle.BYTEARRAY8[0]: _OPCODES[pickle.BINBYTES8[0]],
        pickle.EMPTY_SET[0]: _OPCODES[pickle.NONE[0]],
        pickle.ADDITEMS[0]: _OPCODES[pickle.POP_MARK[0]],
        pickle.FROZENSET[0]: _OPCODES[pickle.LIST[0]],
    }

    def find_class(self, module: str, name: str, /) -> Any:
        # names of Python 2, which torch writes
        module = IMPORT_MAPPING.get(module, module)
        match module, name:
            case "collections", "OrderedDict":
                return self._ordered
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3":
                return self._tensor
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return self._first
            case "torch.jit._pickle", _:
                return self._first
            case _, "_rebuild_from_type_v2" | "_rebuild_wrapper_subclass":
                return self._subclass
            case "torch", "Tensor":
                return _Plain
            case "torch", "Size":
                return tuple
            case "torch.storage", "UntypedStorage":
                return torch.uint8
            case "torch", _ if name.endswith("Storage"):
                return StorageType(name).dtype
            case "torch", _ if isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
            case "torch", "device":
                return Inert
            case "torch.serialization", "_get_layout":
                return Inert
            case "builtins", _ if name == "long" or isinstance(getattr(builtins, name, 0), type):
                return Inert
        root = module.partition(".")[0]
        if root == "__torch__":
            return _Module
        acts = root in ("torch", *sys.stdlib_module_names) and not (
            module == "__main__" or module.startswith("torch.distributed.")  # see `_subclass`
        )
        # of other modules, classes, which begin with a capital letter
        if _DATA_MODULES.fullmatch(root) or (not acts and name.lstrip("_")[:1].isupper()):
            return self._stand_in(module, name)
        return self.refuse(module, name)

    def _stand_in(self, module: str, name: str) -> type[Inert]:
        """A class for a name, of which a file may have so many, as each takes memory."""
        if (known := self.stand_ins.get((module, name))) is not None:
            return known
        if len(self.stand_ins) == _MOST_NAMES:
            self.refuse(module, name)
        refuse = staticmethod(partial(self.refuse, module, name))
        self.stand_ins[module, name] = new = type(name, (Inert,), {"refuse": refuse})
        return new

    def refuse(self, module: str, name: str) -> NoReturn:
        """Raise `CheckpointError` for a name in the pickle."""
        raise CheckpointError(
            f"{self.path} is refused: its pickle names {module}.{name}, and loading that could run "
            "code; save its state_dict() (or safetensors) instead"
        )

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            # a legacy file has a sixth field, for a view that very old versions wrote
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view):
                storage = _Storage(dtype, key, numel * dtype.itemsize)
                if view in ([], [None]) and self.storages.setdefault(key, storage) == storage:
                    return storage
        raise pickle.UnpicklingError("an unknown persistent object")

    def _ordered(self, pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
        self.append(OrderedDict())
        self._put([each for pair in pairs for each in pair])
        return self.stack.pop()

    def _first(self, value: object = None, *rest: object) -> object:
        return value

    def _subclass(self, build: object, kind: object = None, *rest: Any) -> _Record:
        if build == self._tensor and kind is _Plain:  # as those that FSDP gathers
            return self._tensor(*rest[0])
        raise CheckpointError(
            f"{self.path}: it holds tensors of class {getattr(kind, '__name__', kind)}, which are "
            "not read; save whole ones (of DTensor, full_tensor())"
        )

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Record:
        # Version 3 adds the dtype, since its storage is untyped bytes.
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
        meta = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        start, nbytes = int(offset) * dtype.itemsize, meta.untyped_storage().nbytes()
        if start < 0 or (nbytes and start + nbytes > storage.nbytes):
            raise pickle.UnpicklingError("a tensor that reaches past its storage")
        return _Record(storage, start, meta)


# kind, name -> (bytes from the start of the file, meta tensor), nesting, beside: of a `Checkpoint`
Pickled = tuple[str, dict[str, tuple[int, Tensor]], str, tuple[str, ...]]
# file, kind, byte order, unpickled objects, starts of their storages -> what is taken of them
Collect = Callable[[Path, str, str, object, dict[str, int]], Pickled]


def open_pickled(path: Path, collect: Collect | None = None) -> Pickled:
    """Open a zip archive, or a file from before PyTorch 1.6; by default, the weights in it."""
    try:
        with path.open("rb") as file:
            zipped = file.peek(2).startswith(b"PK")
            read = read_zip if zipped else _read_legacy
            return read(path, file, collect or _collect)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {strerror(error)}") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {path.stat().st_size:,} bytes, and its "
            f"tensors cannot be found ({one_line(error):.200}); download it again"
        ) from error


def read_zip(path: Path, file: BinaryIO, collect: Collect | None = None) -> Pickled:
    """Open a zip archive; nothing in it is inflated, and sizes are checked before bytes are read.

    The file is `path`, or a view of an archive inside it, in which positions are counted.
    """
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if not roots:
            kind = "NumPy's arrays" if any(name.endswith(".npy") for name in members) else ""
            raise CheckpointError(
                f"{path} is a zip archive{kind and ' of '}{kind}, but not one that PyTorch wrote"
            )
        if len(members) < len(archive.filelist):
            raise ValueError("two members have one name")
        root = min(roots, key=len)

        def start(name: str) -> int:
            """Position of a stored member."""
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} is compressed ({name}); save it without")
            with archive.open(name):  # which reads the member's local header, and nothing behind it
                return file.tell()

        def read(name: str) -> bytes:
            """Content of a member, without a look at its checksum, which may be absent."""
            position, nbytes = start(name), members[name].file_size
            if nbytes > (limit := largest_pickle(size)):
                raise CheckpointError(
                    f"{path} is refused: its pickle has {nbytes:,} bytes, more than {limit:,}"
                )
            file.seek(position)
            return file.read(nbytes)

        order = f"{root}byteorder"
        byteorder = read(order).decode() if order in members else "little"
        unpickler = Unpickler(path, io.BytesIO(read(f"{root}data.pkl")))
        value = unpickler.load()
        starts = {key: start(f"{root}data/{key}") for key in unpickler.storages}
        for key, storage in unpickler.storages.items():
            if (nbytes := members[f"{root}data/{key}"].file_size) < storage.nbytes:
                raise ValueError(f"data/{key} has {nbytes:,} bytes, expected {storage.nbytes:,}")
        refuse_overlaps(
            ((start, unpickler.storages[key].nbytes) for key, start in starts.items()), size
        )
        torchscript = f"{root}constants.pkl" in members or isinstance(value, _Module)
        kind = "jit" if torchscript else "pt"
        return (collect or _collect)(path, kind, byteorder, value, starts)


def largest_pickle(nbytes: int) -> int:
    """Bytes that a pickle may have in a file of so many."""
    return min(max(_SMALL_PICKLE, nbytes // 64), _LARGEST_PICKLE)


def refuse_overlaps(extents: Iterable[tuple[int, int]], nbytes: int) -> None:
    """Raise ValueError unless (start, size) of all pieces lie apart in a file of so many bytes."""
    ends = sorted((start, start + size) for start, size in extents if size)
    for (_, end), (start, _) in pairwise([*ends, (nbytes, nbytes)]):
        if end > start:
            raise ValueError(f"byte {start:,} is in two tensors, or behind the end")


def _read_legacy(path: Path, file: BinaryIO, collect: Collect) -> Pickled:
    size = path.stat().st_size
    head = io.BytesIO(file.read(limit := largest_pickle(size)))
    try:
        magic, version, machine = (Unpickler(path, head).load() for _ in range(3))
        if (magic, version) != (MAGIC_NUMBER, PROTOCOL_VERSION):
            raise CheckpointError(f"{path} is in no known format (of torch before 1.6)")
        objects = Unpickler(path, head)
        value, keys = objects.load(), Unpickler(path, head).load()
    except EOFError as error:
        raise EOFError(f"its pickles do not end in {limit:,} bytes") from error
    if not all(isinstance(key, str) for key in keys) or len({*keys}) < len(keys):
        raise ValueError("two storages have one name")
    starts: dict[str, int] = {}
    position = head.tell()
    for key in keys:
        dtype, _, nbytes = objects.storages[key]
        file.seek(position)
        numel = int.from_bytes(file.read(8), "little", signed=True)
        starts[key] = position + 8
        position += 8 + nbytes
        if position > size:
            raise ValueError(f"it needs at least {position:,}")
        if numel * dtype.itemsize != nbytes:
            raise ValueError(f"storage {key} has {numel:,} elements")
    byteorder = "little" if machine.get("little_endian", True) else "big"
    return collect(path, "pt", byteorder, value, starts)


def _collect(
    path: Path, kind: str, byteorder: str, value: object, starts: dict[str, int]
) -> Pickled:
    """Tensors of unpickled objects; inside dicts, those of the only one that is no training state.

    Where several are left, such as weights and averaged ones, names begin with their keys.
    """
    _refuse_order(path, byteorder)
    nesting: list[str] = []
    beside: list[str] = []
    while isinstance(value, dict):
        sets = [key for key, item in value.items() if not is_state(str(key)) and _is_set(item)]
        usual = [key for key in ("model", "state_dict") if key in sets]
        if usual and not any(is_averaged(str(key)) for key in sets):
            sets = usual[:1]
        if any(_is_tensor(item) for item in value.values()):
            sets = usual[:1]
        if not sets:
            break
        beside += [str(key) for key in value if key not in sets]
        if len(sets) > 1:
            value = {f"{key}.{n}": item for key in sets for n, item in _nested(value[key])}
            break
        nesting.append(str(sets[0]))
        value = value[sets[0]]
    tensors = {
        name: (starts[item.storage.key] + item.offset, item.meta)
        for name, item in _items(value)
        if isinstance(item, _Record)
    }
    if not tensors:  # a whole network may be one object
        for item in (value, *(value.values() if isinstance(value, dict) else ())):
            if isinstance(item, Inert) and item.refuse is not None:
                item.refuse()
    return kind, tensors, ".".join(nesting), tuple(beside)


def everything(
    path: Path, kind: str, byteorder: str, value: object, starts: dict[str, int]
) -> Pickled:
    """All tensors of unpickled objects by their dotted places, those of training state too."""
    _refuse_order(path, byteorder)
    found: Iterator[tuple[str, Any]] = _nested(value)
    tensors = {n: (starts[item.storage.key] + item.offset, item.meta) for n, item in found}
    return kind, tensors, "", ()


def _refuse_order(path: Path, byteorder: str) -> None:
    if byteorder != sys.byteorder:
        raise CheckpointError(f"{path} is of a machine with another byte order; save it again here")


def _is_tensor(item: object) -> bool:
    """Whether an object is a tensor, or holds some as a module; a counter is none."""
    return isinstance(item, _Module) or (isinstance(item, _Record) and item.meta.numel() > 1)


def _is_set(item: object) -> bool:
    """Whether an object is a dict or a list with tensors in it."""
    return isinstance(item, dict | list) and any(True for _ in _nested(item))


def _nested(value: object, seen: set[int] | None = None) -> Iterator[tuple[str, object]]:
    """Dotted names of the tensors in dicts and lists inside each other, each container once."""
    seen = set() if seen is None else seen
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, _Record):
            yield str(key), item
        else:
            yield from ((f"{key}.{name}", inner) for name, inner in _nested(item, seen))


def _items(value: object) -> Iterator[tuple[str, object]]:
    """Names and values of a dict, a list, a lone tensor or a TorchScript module."""
    if isinstance(value, _Record) or not isinstance(value, dict | list | tuple | _Module):
        value = [value]
    held: Any = value.state if isinstance(value, _Module) else value
    for name, item in held.items() if isinstance(held, Mapping) else enumerate(held):
        if isinstance(item, _Module):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _items(item))
        else:
            yield str(name), item
