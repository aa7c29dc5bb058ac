"""Files of weights: opened by header whatever their format, joined as one, read, saved.

A `FileTensor` is an entry of a header. Nothing of it is read until `read`, or `load_into`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import disguise, replacing

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
_BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError)
# first bytes of a zip archive, and of the first pickle in a file from before PyTorch 1.6
_ZIP, _LEGACY = b"PK\x03\x04", torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")

SHARD = re.compile(r"(?P<stem>.+)_model_mp_(?P<rank>\d+)\.pt")
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
# Ranks that hold a replicated tensor may have drifted apart by rounding; the reference's bounds.
_REPLICA_ATOL, _REPLICA_RTOL = 5e-2, 0.1


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor inside a file, not read yet.

    Attributes:
        path: the file.
        position: first element, in bytes from the start of the file.
        meta: dtype, shape and strides; its storage is as long as the tensor's bytes in the file.
    """

    path: Path
    position: int
    meta: Tensor

    def read(self) -> Tensor:
        """The tensor on the CPU."""
        meta, data = self.meta, bytearray(self.meta.untyped_storage().nbytes())
        if not data:
            return torch.empty_like(meta, device="cpu")
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                count = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error}") from error
        if count != len(data):
            raise CheckpointError(f"{self.path} was changed while in use: it is cut short")
        return torch.frombuffer(data, dtype=meta.dtype).as_strided(meta.shape, meta.stride())


@dataclass(frozen=True, eq=False)
class ShardedTensor:
    """A tensor that several ranks hold.

    Attributes:
        name: file and tensor, for messages.
        parts: one a rank.
        dim: the axis on which parts are joined; None if each part is the whole tensor.
    """

    name: str
    parts: tuple[Source, ...]
    dim: int | None

    @cached_property
    def meta(self) -> Tensor:
        metas = [part.meta for part in self.parts]
        return metas[0] if self.dim is None else torch.cat(metas, self.dim)

    def read(self) -> Tensor:
        """The whole tensor on the CPU; replicas, which may differ by rounding, are averaged."""
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
                f"{self.name} is copied on every rank, yet rank 0 is {worst:.3g} away from the "
                "mean: the shards are not of one model"
            )
        return mean


Source = FileTensor | ShardedTensor


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, or several that make one model, opened by header.

    Attributes:
        path: the file; of several, the first, the index or their folder.
        kind: "safetensors", "pt", "jit" or "tensor-parallel shards".
        entries: name as stored -> tensor.
        files: all files that make it, the index of several too; sorted.
        nesting: dotted path of the dict inside the file that was taken, such as "model".
        beside: other keys of the outer dict, such as "optimizer".
        metadata: the text that a safetensors file carries.
    """

    path: Path
    kind: str
    entries: Mapping[str, Source]
    files: tuple[Path, ...] = ()
    nesting: str = ""
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor on the meta device."""
        return {name: entry.meta for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or the file changed or is inconsistent.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.entries[name].read()


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
    if head.startswith(_ZIP) or _LEGACY in head[:32]:
        from worldline.weights.archive import open_pickled

        kind, tensors, nesting, beside = open_pickled(path)
        entries = {name: FileTensor(path, *tensor) for name, tensor in tensors.items()}
        checkpoint = Checkpoint(path, kind, entries, (path,), nesting, beside)
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
    end, metadata, entries = start, {}, {}
    try:
        if size >= start:
            header = json.loads(text)
            metadata = dict(header.pop("__metadata__", None) or {})
            for name, item in header.items():
                entries[name] = _safetensor(path, start, item)
                end = max(end, start + item["data_offsets"][1])
    except _BAD_JSON as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if size != end:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {size:,} bytes of {end:,}; download it again"
        )
    return Checkpoint(path, "safetensors", entries, files=(path,), metadata=metadata)


def _safetensor(path: Path, data: int, item: Mapping[str, Any]) -> FileTensor:
    start, end = map(int, item["data_offsets"])
    meta = torch.empty(item["shape"], dtype=_DTYPES[item["dtype"]], device="meta")
    if start < 0 or end - start != meta.nbytes:
        raise ValueError(f"{end - start} bytes at {start} for shape {item['shape']}")
    return FileTensor(path, data + start, meta)


def _open_index(path: Path) -> Checkpoint:
    """Open `*.safetensors.index.json`: the files that it names, as one."""
    try:
        index = json.loads(path.read_bytes())
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except _BAD_JSON as error:
        raise CheckpointError(f"{path} is a text, not weights") from error
    files = {name: path.parent / name for name in sorted(set(places.values()))}
    if any(file.name != name for name, file in files.items()):
        raise CheckpointError(f"{path} names files outside its own folder")
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise CheckpointError(f"{path} names files that are missing: {', '.join(missing[:5])}")
    opened = {name: open_checkpoint(file).entries for name, file in files.items()}
    if absent := [tensor for tensor, name in places.items() if tensor not in opened[name]]:
        raise CheckpointError(f"{path} lists tensors that its files lack: {', '.join(absent[:5])}")
    entries = {tensor: opened[name][tensor] for tensor, name in places.items()}
    return Checkpoint(path, "safetensors", entries, files=tuple(sorted([path, *files.values()])))


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


def find_shards(folder: Path, stem: str | None = None) -> list[Path]:
    """Shards `{stem}_model_mp_{rank}.pt` of a folder in the order of ranks; [] if it has none.

    The stem is "model", or "iter_000000002" of a training run; None takes the only one there is.
    """
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*_model_mp_*.pt")):
        shard = SHARD.fullmatch(path.name)
        if shard and stem in (None, shard["stem"]):
            sets.setdefault(shard["stem"], {})[int(shard["rank"])] = path
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder} holds several sets of shards ({', '.join(sets)}); name one"
        )
    for name, ranks in sets.items():
        # Models are cut in 1, 2, 4, 8 ... parts, so three files are four of which one is missing.
        count = 1 << max(ranks).bit_length()
        if missing := [f"{name}_model_mp_{n}.pt" for n in range(count) if n not in ranks]:
            raise CheckpointError(
                f"{folder} has {len(ranks)} of {count} tensor-parallel shards; "
                f"missing: {', '.join(missing)}"
            )
        return [ranks[rank] for rank in range(count)]
    return []


def open_shards(paths: Sequence[Path]) -> Checkpoint:
    """Open the files of all ranks, in their order, as one checkpoint of full-size tensors."""
    first, *others = shards = [open_checkpoint(path) for path in paths]
    for other in others:
        if odd := sorted(first.entries.keys() ^ other.entries.keys()):
            raise CheckpointError(
                f"{other.path}: {odd[0]} is in one of {first.path.name} and it alone; the shards "
                "are not of one model"
            )
    entries: dict[str, Source] = {}
    for name, first_part in first.tensors.items():
        axes = [axis for pattern, axis in SHARDED_AXES.items() if fnmatchcase(name, pattern)]
        if not axes:
            raise CheckpointError(f"{first.path} holds {name}, and how ranks share it is not known")
        for shard in others:
            part = shard.tensors[name]
            if _uncut(part, axes[0]) != _uncut(first_part, axes[0]):
                raise CheckpointError(
                    f"{shard.path}: {name} is {part.dtype} {list(part.shape)}, on rank 0 "
                    f"{first_part.dtype} {list(first_part.shape)}"
                )
        parts = tuple(shard.entries[name] for shard in shards)
        entries[name] = ShardedTensor(f"{first.path}: {name}", parts, axes[0])
    return replace(first, kind="tensor-parallel shards", entries=entries, files=tuple(paths))


def _uncut(meta: Tensor, axis: int | None) -> object:
    """What the parts of a sharded tensor have in common."""
    return meta.dtype, [None if i == axis else size for i, size in enumerate(meta.shape)]


def save(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Save tensors as safetensors, or, under a name that ends in `.pt`, as PyTorch's flat dict.

    Args:
        tensors: on any device, strided, or sharing memory (they are then written twice).
        path: its folder must exist; a file there is replaced once the new one is complete.
        metadata: kept in the header as text; safetensors only.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is then as it was.
    """
    # copied even on the CPU: both formats write storages, which a view or a second name would share
    whole = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            torch.save(whole, temporary)
            return
        text = {key: str(value) for key, value in (metadata or {}).items()}
        try:
            safetensors.torch.save_file(whole, temporary, metadata=text or None)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
