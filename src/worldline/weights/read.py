"""Open a file of weights: safetensors, `.pt`, TorchScript. Headers only; told apart by content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import disguise
from worldline.weights.archive import ArchiveContents, read_archive
from worldline.weights.legacy import is_legacy, read_legacy
from worldline.weights.source import (
    FileTensor,
    Source,
    TensorInfo,
    contiguous_strides,
)

__all__ = ["Checkpoint", "Entry", "TensorInfo", "open_checkpoint"]

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format

# Ranks that hold a replicated tensor may have drifted apart by rounding; the reference's bounds.
_REPLICA_ATOL, _REPLICA_RTOL = 5e-2, 0.1


@dataclass(frozen=True)
class Entry:
    """One tensor, in one part or, in tensor-parallel shards, in one part a rank.

    Attributes:
        parts: where the bytes are.
        dim: the axis on which parts are joined; None if each part is the whole tensor.
    """

    parts: tuple[Source, ...]
    dim: int | None = None

    @cached_property
    def info(self) -> TensorInfo:
        first = self.parts[0].info
        if self.dim is None:
            return first
        shape = list(first.shape)
        shape[self.dim] = sum(part.info.shape[self.dim] for part in self.parts)
        return TensorInfo(first.dtype, tuple(shape))

    def read(self, label: str) -> Tensor:
        """Return the whole tensor on the CPU; replicas are averaged.

        Raises:
            CheckpointError: replicas differ by more than rounding; `label` starts the message.
        """
        if len(self.parts) == 1:
            return self.parts[0].read()
        tensors = [part.read() for part in self.parts]
        if self.dim is not None:
            return torch.cat(tensors, self.dim)
        first = tensors[0]
        if all(torch.equal(first, other) for other in tensors[1:]):
            return first
        mean = torch.stack([tensor.float() for tensor in tensors]).mean(0).to(first.dtype)
        if not torch.allclose(first, mean, atol=_REPLICA_ATOL, rtol=_REPLICA_RTOL):
            worst = (first.float() - mean.float()).abs().max().item()
            raise CheckpointError(
                f"{label} is copied on every rank, yet rank 0 is {worst:.3g} away from the mean: "
                "the shards are not of one model"
            )
        return mean


@dataclass(frozen=True)
class Checkpoint:
    """One opened file, or a set of files that make one model. Tensor data is touched by `read`.

    Attributes:
        path: the file; of several, the first or the index.
        kind: "safetensors", "pt", "jit" or "tensor-parallel shards".
        nesting: dotted path of the dict inside the file that was taken, such as "model".
        entries: name as stored -> where it is.
        strays: names beside the tensors whose values are none (`_extra_state`).
        beside: other keys of the outer dict, such as "optimizer".
        metadata: the text that a safetensors file carries.
    """

    path: Path
    kind: str
    entries: Mapping[str, Entry]
    nesting: str = ""
    strays: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The dtype and shape of every tensor, by its name in the file."""
        return {name: entry.info for name, entry in self.entries.items()}

    @property
    def files(self) -> list[Path]:
        """All files that make it, the index of several too."""
        parts = (part.path for entry in self.entries.values() for part in entry.parts)
        found = {path for path in parts if path is not None}
        return sorted(found | ({self.path} if self.path.is_file() else set()))

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, memory-mapped where the format allows.

        Raises:
            CheckpointError: there is no such tensor, or the file changed or is inconsistent.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.entries[name].read(f"{self.path}: {name}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a file of weights by its content, whatever its suffix; reads the header only.

    Raises:
        CheckpointError: missing, a folder, unreadable, empty, cut short, a web page or git-lfs
            pointer in the place of the file, of unknown format, unsafe, or without a tensor.
    """
    path = Path(path)
    head, size = _head(path)
    if not size:
        raise CheckpointError(f"{path} is empty; download it again")
    if head.startswith(b"PK\x03\x04"):
        return _open_archive(path, read_archive)
    if is_legacy(head):
        return _open_archive(path, read_legacy)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _open_safetensors(path, size)
    found = disguise(head)
    if found == "web page":
        raise CheckpointError(
            f"{path} is a web page, not weights: the download was answered with a page "
            "(a licence to accept, or a login?); download it again"
        )
    if found == "git-lfs pointer":
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not weights; run `git lfs pull` in its folder"
        )
    if head.lstrip().startswith(b"{"):
        return _open_index(path)
    if not head.strip(b"\0"):
        raise CheckpointError(
            f"{path} starts with zeros: a download that was not finished; download it again"
        )
    if path.suffix == ".safetensors" and size < 9:
        raise CheckpointError(f"{path} is cut short: it has {size} bytes; download it again")
    raise CheckpointError(
        f"{path} is in no known format (it starts with {head[:8]!r}); "
        "expected a .safetensors, .pt or .jit file"
    )


def _head(path: Path) -> tuple[bytes, int]:
    """First bytes and the size, or the reason why there are none."""
    try:
        with path.open("rb") as file:
            return file.read(512), os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        inside = sorted(
            item.name
            for item in path.iterdir()
            if item.suffix in (".pt", ".pth", ".jit", ".safetensors")
        )
        hint = f"name one of its files: {', '.join(inside[:5])}" if inside else "it has no weights"
        raise CheckpointError(f"{path} is a folder, not a file of weights; {hint}") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read by this user (permission denied)") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_archive(path: Path, read: Callable[[Path], ArchiveContents]) -> Checkpoint:
    try:
        contents = read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    _require_tensors(path, contents.tensors, contents.beside, contents.strays)
    return Checkpoint(
        path,
        "jit" if contents.torchscript else "pt",
        {name: Entry((tensor,)) for name, tensor in contents.tensors.items()},
        contents.nesting,
        contents.strays,
        contents.beside,
    )


def _require_tensors(
    path: Path, tensors: Mapping[str, object], beside: tuple[str, ...], strays: tuple[str, ...]
) -> None:
    if tensors:
        return
    keys = ", ".join((*beside, *strays)[:5])
    hint = f" (only {keys})" if keys else ""
    shards = sorted(path.parent.glob(f"{path.stem}_model_mp_*.pt"))
    if shards:
        hint += f"; its weights are in the tensor-parallel shards {shards[0].name} and following"
    raise CheckpointError(f"{path} holds no tensors{hint}")


def _open_safetensors(path: Path, size: int) -> Checkpoint:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path} is cut short: it has {size:,} bytes and its header alone needs "
            f"{8 + length:,}; download it again"
        )
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {str(name): _safetensor(path, 8 + length, item) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header cannot be read ({error}); download it again"
        ) from error
    end = max((tensor.position + tensor.span for tensor in tensors.values()), default=8 + length)
    if end != size:
        state = "cut short" if size < end else "damaged"
        raise CheckpointError(
            f"{path} is {state}: it has {size:,} bytes of {end:,}; download it again"
        )
    _require_tensors(path, tensors, (), ())
    entries = {name: Entry((tensor,)) for name, tensor in tensors.items()}
    return Checkpoint(path, "safetensors", entries, metadata=dict(metadata))


def _safetensor(path: Path, data: int, item: Mapping[str, Any]) -> FileTensor:
    start, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (start, end, *shape)):
        raise ValueError("a malformed tensor")
    if item["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {item['dtype']} is not supported")
    info = TensorInfo(_SAFETENSORS_DTYPES[item["dtype"]], shape)
    if end - start != info.nbytes:
        raise ValueError(f"{end - start} bytes for shape {list(shape)}")
    return FileTensor(path, info, data + start, contiguous_strides(shape))


def _open_index(path: Path) -> Checkpoint:
    """Open `*.safetensors.index.json`: the files that it names, as one."""
    try:
        index = json.loads(path.read_bytes())
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is a text, not weights, and no index of safetensors files either"
        ) from error
    names = sorted(set(files.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{path} names files outside its own folder")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} is incomplete: {path.name} names {len(names)} files and "
            f"{', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing"
        )
    opened = {name: open_checkpoint(path.parent / name) for name in names}
    entries: dict[str, Entry] = {}
    for tensor, name in files.items():
        if tensor not in opened[name].entries:
            raise CheckpointError(
                f"{path.parent / name} lacks tensor {tensor}, which {path.name} says it holds"
            )
        entries[tensor] = opened[name].entries[tensor]
    return Checkpoint(path, "safetensors", entries)
