"""Open files of weights by their headers, whatever their format; join several as one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.files import disguise
from worldline.weights.archive import is_legacy, open_archive, open_legacy
from worldline.weights.source import (
    Checkpoint,
    FileTensor,
    ShardedTensor,
    Source,
    TensorInfo,
    contiguous_strides,
)

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_DTYPES = {
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
# what a damaged or made-up JSON header raises
_BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

_SHARD = re.compile(r"(?P<stem>.+)_model_mp_(?P<rank>\d+)\.pt")
# released name pattern -> axis on which tensor-parallel ranks cut it; None for a tensor that every
# rank holds whole
SHARDED_AXES: Mapping[str, int | None] = {
    "*tok_embeddings.weight": 0,
    "*output.weight": 0,
    "*attention.w[qkv].weight": 0,
    "*attention.wo.weight": 1,
    "*feed_forward.w[13].weight": 0,
    "*feed_forward.w2.weight": 1,
    "*norm.weight": None,
}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a file of weights by its content, whatever its suffix; reads the header only.

    Raises:
        CheckpointError: missing, a folder, unreadable, empty, cut short, a web page or git-lfs
            pointer in the place of the file, of unknown format, unsafe, or without a tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if head.startswith(b"PK\x03\x04"):
        checkpoint = open_archive(path)
    elif is_legacy(head):
        checkpoint = open_legacy(path)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        checkpoint = _open_safetensors(path, size)
    elif found := disguise(head):
        advice = "run `git lfs pull`" if "lfs" in found else "accept its licence, download it again"
        raise CheckpointError(f"{path} is a {found}, not weights; {advice}")
    elif head.lstrip().startswith(b"{"):
        checkpoint = _open_index(path)
    elif not head.strip(b"\0"):
        raise CheckpointError(f"{path} is empty or starts with zeros; download it again")
    else:
        raise CheckpointError(
            f"{path} is in no known format (it starts with {head[:8]!r}); "
            "give .pt, .jit or .safetensors"
        )
    if not checkpoint.entries:
        raise CheckpointError(f"{path} holds no tensors")
    return checkpoint


def _open_safetensors(path: Path, size: int) -> Checkpoint:
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8)
    end = start
    try:
        if size >= start:
            header = json.loads(text)
            metadata = header.pop("__metadata__", None) or {}
            tensors = {name: _safetensor(path, start, item) for name, item in header.items()}
            end = max((t.position + t.span for t in tensors.values()), default=start)
    except _BAD_JSON as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if size != end:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {size:,} bytes of {end:,}; download it again"
        )
    return Checkpoint(path, "safetensors", tensors, files=(path,), metadata=dict(metadata))


def _safetensor(path: Path, data: int, item: Mapping[str, Any]) -> FileTensor:
    start, end = item["data_offsets"]
    shape = tuple(item["shape"])
    info = TensorInfo(_DTYPES[item["dtype"]], shape)
    if not all(isinstance(n, int) and n >= 0 for n in (start, end, *shape)):
        raise ValueError("a malformed tensor")
    if end - start != info.nbytes:
        raise ValueError(f"{end - start} bytes for shape {list(shape)}")
    return FileTensor(path, info, data + start, contiguous_strides(shape))


def _open_index(path: Path) -> Checkpoint:
    """Open `*.safetensors.index.json`: the files that it names, as one."""
    try:
        index = json.loads(path.read_bytes())
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except _BAD_JSON as error:
        raise CheckpointError(f"{path} is a text, not weights") from error
    names = sorted(set(places.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{path} names files outside its own folder")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(f"{path} names files that are missing: {', '.join(missing[:5])}")
    opened = {name: open_checkpoint(path.parent / name) for name in names}
    absent = [tensor for tensor, name in places.items() if tensor not in opened[name].entries]
    if absent:
        raise CheckpointError(f"{path} lists tensors that its files lack: {', '.join(absent[:5])}")
    entries = {tensor: opened[name].entries[tensor] for tensor, name in places.items()}
    files = tuple(sorted([path, *(path.parent / name for name in names)]))
    return Checkpoint(path, "safetensors", entries, files=files)


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """`checkpoint` with every name passed through `rename`; None leaves a tensor out."""
    entries = {
        new: entry for old, entry in checkpoint.entries.items() if (new := rename(old)) is not None
    }
    return replace(checkpoint, entries=entries)


def joined(checkpoints: Sequence[Checkpoint], path: Path) -> Checkpoint:
    """The tensors of all `checkpoints` as one; `path` stands for the whole in messages.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    entries: dict[str, Source] = {}
    for checkpoint in checkpoints:
        if twice := entries.keys() & checkpoint.entries.keys():
            raise CheckpointError(f"{path}: {min(twice)} is in more than one of its files")
        entries.update(checkpoint.entries)
    files = tuple(sorted(file for checkpoint in checkpoints for file in checkpoint.files))
    return replace(checkpoints[0], path=path, entries=entries, files=files)


def shard_stem(path: Path) -> str | None:
    """Stem of the set that a tensor-parallel shard belongs to; None for another file."""
    shard = _SHARD.fullmatch(path.name)
    return shard["stem"] if shard else None


def find_shards(folder: Path, stem: str | None = None) -> list[Path]:
    """Shards `{stem}_model_mp_{rank}.pt` of a folder in the order of ranks; [] if it has none.

    Args:
        folder: where to look.
        stem: "model", or "iter_000000002" of a training run; None takes the only one there is.

    Raises:
        CheckpointError: ranks are missing, or `stem` is None and there are several sets.
    """
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*_model_mp_*.pt")):
        shard = _SHARD.fullmatch(path.name)
        if shard and stem in (None, shard["stem"]):
            sets.setdefault(shard["stem"], {})[int(shard["rank"])] = path
    if not sets:
        return []
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder} holds several sets of shards ({', '.join(sets)}); name one"
        )
    [(name, ranks)] = sets.items()
    # Models are cut in 1, 2, 4, 8 ... parts, so three files are four of which one is missing.
    count = 1 << max(ranks).bit_length()
    missing = [f"{name}_model_mp_{rank}.pt" for rank in range(count) if rank not in ranks]
    if missing:
        raise CheckpointError(
            f"{folder} has {len(ranks)} of {count} tensor-parallel shards; "
            f"missing: {', '.join(missing)}"
        )
    return [ranks[rank] for rank in range(count)]


def open_shards(paths: Sequence[Path]) -> Checkpoint:
    """Open the files of all ranks as one checkpoint of full-size tensors; headers only.

    Replicated tensors that differ are averaged when they are read, and refused if they differ by
    more than rounding.

    Args:
        paths: in the order of ranks, at least one.

    Raises:
        CheckpointError: the files do not fit together, or a name is not in `SHARDED_AXES`.
    """
    first, *others = shards = [open_checkpoint(path) for path in paths]
    for other in others:
        if odd := sorted(first.entries.keys() ^ other.entries.keys()):
            raise CheckpointError(
                f"{other.path}: {odd[0]} is in one of {first.path.name} and it alone; the shards "
                "are not of one model"
            )
    entries: dict[str, Source] = {}
    for name in first.entries:
        axes = [axis for pattern, axis in SHARDED_AXES.items() if fnmatchcase(name, pattern)]
        if not axes:
            raise CheckpointError(f"{first.path} holds {name}, and how ranks share it is not known")
        parts = tuple(shard.entries[name] for shard in shards)
        for part, shard in zip(parts, shards, strict=True):
            if _uncut(part.info, axes[0]) != _uncut(parts[0].info, axes[0]):
                raise CheckpointError(
                    f"{shard.path}: {name} is {part.info.dtype} {list(part.info.shape)}, on rank 0 "
                    f"{parts[0].info.dtype} {list(parts[0].info.shape)}"
                )
        entries[name] = ShardedTensor(f"{first.path}: {name}", parts, axes[0])
    return replace(first, kind="tensor-parallel shards", entries=entries, files=tuple(paths))


def _uncut(info: TensorInfo, axis: int | None) -> object:
    """What the parts of a sharded tensor have in common."""
    return info.dtype, [None if i == axis else size for i, size in enumerate(info.shape)]
