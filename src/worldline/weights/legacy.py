"""PyTorch's files from before 1.6, opened by header: the 45 GB of T5-11B may well be one.

Such a file is four small pickles (a magic number, a version, the machine's byte order, the
objects), a fifth with the keys of the storages, and then, in the order of those keys, the number
of elements of each storage and its bytes. So the whole header is at the start, and a walk over the
storages tells where each tensor lies. The pickles go through the unpickler of `archive`.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from worldline.errors import CheckpointError
from worldline.weights.archive import (
    ArchiveContents,
    Record,
    Refused,
    Storage,
    Unpickler,
    refusal,
    unnest,
)
from worldline.weights.source import FileTensor

MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MAGIC_BYTES = MAGIC.to_bytes(10, "little")


class _LegacyUnpickler(Unpickler):
    """Storages are named with one more field, for a view that very old versions wrote.

    Attributes:
        storages: all that the pickle names; the file itself does not say their dtypes.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, identifier: Any) -> Storage:
        match identifier:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, None):
                return self.storages.setdefault(key, Storage(dtype, key, numel * dtype.itemsize))
        raise pickle.UnpicklingError(f"an unknown persistent object {identifier!r:.80}")


def is_legacy(head: bytes) -> bool:
    """Tell from the first bytes whether a file is of this format."""
    return _MAGIC_BYTES in head[:32]


def read_legacy(path: Path) -> ArchiveContents:
    """Read the header of a file; no tensor is read.

    Raises:
        CheckpointError: it is cut short, damaged, or names unsafe classes.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except Refused as error:
        raise CheckpointError(refusal(path, str(error))) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{path} is cut short or damaged: its list of tensors cannot be read ({error}); "
            "download it again"
        ) from error


def _read(path: Path, file: io.BufferedReader) -> ArchiveContents:
    magic, version, machine = (_LegacyUnpickler(file).load() for _ in range(3))
    objects = _LegacyUnpickler(file)
    value = objects.load()
    keys = _LegacyUnpickler(file).load()
    if magic != MAGIC or version != _VERSION or not isinstance(keys, list):
        raise CheckpointError(f"{path} is in no known format (version {version!r:.20})")
    order = "little" if machine.get("little_endian", True) else "big"
    nesting, value, beside = unnest(value)
    items: dict[str, Any]
    if isinstance(value, dict):
        items = {str(name): item for name, item in value.items()}
    elif isinstance(value, list | tuple):
        items = {str(index): item for index, item in enumerate(value)}
    else:
        items = {"0": value}
    records = {name: item for name, item in items.items() if isinstance(item, Record)}
    strays = tuple(name for name in items if name not in records)
    places = _places(path, file, keys, objects.storages)
    tensors = {}
    for name, record in records.items():
        storage = record.storage
        if storage.key not in places:
            _cut(path, f"nothing gives {name}")
        position = places[storage.key] + record.offset * record.info.dtype.itemsize
        swapped = order != sys.byteorder
        tensors[name] = FileTensor(path, record.info, position, record.strides, swapped)
    return ArchiveContents(False, nesting, tensors, strays, beside)


def _places(
    path: Path, file: io.BufferedReader, keys: list[Any], storages: Mapping[str, Storage]
) -> dict[str, int]:
    """Return where the bytes of each storage begin."""
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    places: dict[str, int] = {}
    for number, key in enumerate(keys):
        storage = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little", signed=True)
        places[key] = position + 8
        position += 8 + storage.nbytes
        if position > size:
            _cut(path, f"it has {size:,} bytes of at least {position:,}")
        if count * storage.dtype.itemsize != storage.nbytes:
            _cut(path, f"storage {number} has {count:,} elements")
    return places


def _cut(path: Path, detail: str) -> NoReturn:
    raise CheckpointError(f"{path} is cut short or damaged: {detail}; download it again")
