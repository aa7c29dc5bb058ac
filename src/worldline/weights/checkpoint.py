"""Files of weights: opened by header whatever their format, joined as one, read, saved.

A `FileTensor` is an entry of a header. Nothing of it is read until `read`, or `load_into`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from worldline.documents import parse_json, read_text
from worldline.errors import CheckpointError, one_line, strerror
from worldline.files import UNFINISHED, disguise, replacing
from worldline.weights.known import foreign
from worldline.weights.names import (
    ENGINE,
    ScaledTensor,
    is_adapter,
    is_averaged,
    is_state,
    normalise,
    with_dots,
)

if TYPE_CHECKING:
    from worldline.parallel.mesh import Axis

METADATA, DISTRIBUTED = ".metadata", ".distcp"  # file and suffix of a distributed checkpoint
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
# first bytes of a zip archive, and of the first pickle in a file from before PyTorch 1.6
_ZIP, _LEGACY = b"PK\x03\x04", torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_DISTRIBUTED = b"torch.distributed.checkpoint"  # in the first bytes of its .metadata
_DTYPES = {**safetensors.torch._TYPES, "F8_E8M0": torch.float8_e8m0fnu}

SHARD = re.compile(r"(?P<stem>.+)_model_mp_(?P<rank>\d+)\.pt")
# one of the files of an index
PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_FOREIGN = (".h5", ".msgpack", ".ot")  # beside ours in folders of transformers
# pattern of released names -> axis on which tensor-parallel ranks cut it; None for a tensor that
# every rank holds whole
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

    @cached_property
    def streamed(self) -> bool:
        """Whether `fill` reads it: its rows lie in order, with gaps at most between them."""
        meta = self.meta
        rows = meta.dim() > 0 and meta.numel() > 0 and meta[0].is_contiguous()
        return meta.is_contiguous() or (rows and meta.stride(0) >= meta[0].numel())

    def cut(self, dim: int, start: int, length: int) -> FileTensor:
        """Its part along an axis: rows are read alone, and columns row by row."""
        part = self.meta.narrow(dim, start, length)
        position = self.position + int(part.storage_offset()) * part.itemsize
        meta = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
        return FileTensor(self.path, position, meta)

    def fill(self, buffer: memoryview, start: int = 0) -> None:
        """Fill a buffer with its bytes from `start` on, without the gaps between rows.

        Raises:
            CheckpointError: the file is not as it was when it was opened.
        """
        row, pitch = self.meta.nbytes, 0
        if not self.meta.is_contiguous():
            row, pitch = self.meta[0].nbytes, self.meta.stride(0) * self.meta.itemsize
        try:
            with self.path.open("rb", buffering=0) as file:
                while buffer:
                    number, first = divmod(start, row)
                    part, buffer = buffer[: row - first], buffer[row - first :]
                    start += len(part)
                    position = self.position + number * pitch + first
                    while part:
                        if not (count := os.preadv(file.fileno(), [part], position)):
                            raise CheckpointError(f"{self.path} was cut short while in use")
                        part, position = part[count:], position + count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error}") from error

    def read(self) -> Tensor:
        """The tensor on the CPU, with the strides that it has in the file."""
        size = self.meta.untyped_storage().nbytes() // self.meta.itemsize
        data = torch.empty(size, dtype=self.meta.dtype, device="cpu")
        whole = replace(self, meta=data.to("meta"))
        whole.fill(data.view(torch.uint8).numpy().data)
        return data.as_strided(self.meta.shape, self.meta.stride())


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

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @cached_property
    def meta(self) -> Tensor:
        metas = [part.meta for part in self.parts]
        return metas[0] if self.dim is None else torch.cat(metas, self.dim)

    def cut(self, dim: int, start: int, length: int) -> ShardedTensor:
        """Its part along an axis, of the parts that hold some of it."""
        if dim != self.dim:
            parts = [part.cut(dim, start, length) for part in self.parts]
        else:
            parts, end = [], 0
            for part in self.parts:
                begin, end = end, end + part.meta.shape[dim]
                first, last = max(start, begin), min(start + length, end)
                if first < last:
                    parts.append(part.cut(dim, first - begin, last - first))
        return replace(self, parts=tuple(parts))

    def read(self) -> Tensor:
        """The whole tensor on the CPU; replicas, which may differ by rounding, are averaged."""
        if self.dim is not None:
            whole, end = torch.empty(self.meta.shape, dtype=self.meta.dtype), 0
            for part in self.parts:  # one in memory beside the whole
                start, end = end, end + part.meta.shape[self.dim]
                whole.narrow(self.dim, start, end - start).copy_(part.read())
            return whole
        tensors = [part.read() for part in self.parts]
        mean = torch.stack(tensors).mean(0)
        if not torch.allclose(tensors[0], mean, atol=_REPLICA_ATOL, rtol=_REPLICA_RTOL):
            raise CheckpointError(
                f"{self.name} is copied on every rank, yet rank 0 is far from the mean: the "
                "shards are not of one model"
            )
        return mean


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product scale * up @ down that is added to a matrix (LoRA, arXiv 2106.09685).

    Attributes:
        down: (rank, columns of the matrix).
        up: (rows of the matrix, rank).
        names: of both in the file.
    """

    down: Source
    up: Source
    scale: float
    names: tuple[str, str]

    @property
    def halves(self) -> tuple[Source, Source]:
        return self.down, self.up

    def cut(self, dim: int, start: int, length: int) -> LowRank:
        """What is added to a part of the matrix."""
        if dim == 0:
            return replace(self, up=self.up.cut(0, start, length))
        return replace(self, down=self.down.cut(1, start, length))


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """A matrix and what low-rank adapters add to it, summed when it is read."""

    base: Source
    updates: tuple[LowRank, ...]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def meta(self) -> Tensor:
        return self.base.meta

    @property
    def parts(self) -> tuple[Source, ...]:
        """What is read, in order."""
        return self.base, *(half for update in self.updates for half in update.halves)

    def cut(self, dim: int, start: int, length: int) -> MergedTensor:
        """Its part along an axis; the same of the adapters' halves."""
        updates = tuple(update.cut(dim, start, length) for update in self.updates)
        return MergedTensor(self.base.cut(dim, start, length), updates)

    def read(self) -> Tensor:
        """The sum on the CPU, float32 or wider."""
        return self.merge([part.read() for part in self.parts])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of read `parts`, float32 or wider: rounded once, to the dtype that computes.

        Raises:
            CheckpointError: an adapter holds NaN or Inf.
        """
        wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        total = parts[0].to(wide).contiguous()
        for update, down, up in zip(self.updates, parts[1::2], parts[2::2], strict=True):
            for source, name, half in zip(update.halves, update.names, (down, up), strict=True):
                refuse_nonfinite(source.path, name, half)
            total.addmm_(up.to(wide), down.to(wide), alpha=update.scale)
        return total


Source = FileTensor | ShardedTensor | ScaledTensor | MergedTensor


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
        notes: what was done to its names and values: wrappers stripped, the set that was taken.
        adapters: LoRA adapters of these weights that lie beside them, as `entries`.
    """

    path: Path
    kind: str
    entries: Mapping[str, Source]
    files: tuple[Path, ...] = ()
    nesting: str = ""
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Source] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor on the meta device."""
        return {name: entry.meta for name, entry in self.entries.items()}

    def __str__(self) -> str:
        return f"{self.path} ({'; '.join(self.notes)})" if self.notes else str(self.path)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU.

        Raises:
            CheckpointError: there is no such tensor, it holds NaN or Inf, or the file changed or is
            inconsistent.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        value = self.entries[name].read()
        refuse_nonfinite(self.entries[name].path, name, value)
        return value


def open_checkpoint(path: Path) -> Checkpoint:
    """Open weights by content, whatever the suffix; reads headers only.

    Args:
        path: a file, an index of files, or the folder or `.metadata` of a distributed checkpoint.

    Raises:
        CheckpointError: missing, another folder, unreadable, empty, cut short, a web page or
            git-lfs pointer in the place of the file, of unknown format, unsafe, or without a
            tensor.
    """
    return _normalised(_open(Path(path)))


def _normalised(checkpoint: Checkpoint) -> Checkpoint:
    """The same by names without wrappers."""
    entries, notes = normalise(checkpoint.path, checkpoint.entries)
    if checkpoint.nesting:
        notes.insert(0, f"taken from inside: {checkpoint.nesting}")
    if any(ENGINE in name for name in entries):
        from worldline.weights.engine import from_engine

        entries = from_engine(entries)
        notes.append("names of Transformer Engine")
    return replace(checkpoint, entries=entries, notes=tuple(notes))


def _open(path: Path) -> Checkpoint:
    """The tensors of weights by the names that are stored."""
    path = metadata if (metadata := path / METADATA).is_file() else path
    head = read_head(path)
    kind = container(head)
    if kind == "distributed":
        checkpoint = _open_distributed(path)
    elif kind == "index":
        checkpoint = _open_index(path)
    else:
        checkpoint = _open_file(path, head)
    if not checkpoint.entries:
        raise CheckpointError(f"{path} holds no tensors")
    return checkpoint


def open_set(path: Path) -> Checkpoint:
    """Open weights as `open_checkpoint` does, and with a file all others of its set.

    A set is that of tensor-parallel ranks, of an index that lists the file, of parts numbered "of"
    so many, or of a distributed checkpoint.

    Raises:
        CheckpointError: as `open_checkpoint`, or a file of the set is missing.
    """
    if shard := SHARD.fullmatch(path.name):
        return open_shards(find_shards(path.parent, shard["stem"]))
    if path.suffix == DISTRIBUTED:
        return open_checkpoint(path.with_name(METADATA))
    for index in sorted(path.parent.glob("*.index*.json")):
        if path in indexed_files(index):
            return open_checkpoint(index)
    if PART.fullmatch(path.name):
        if missing := missing_parts(path):
            names = ", ".join(missing[:3])
            raise CheckpointError(f"{path} is a part of a model; missing beside it: {names}")
        return _normalised(joined([_open(part) for part in _parts(path)], path))
    return open_checkpoint(path)


def indexed_files(path: Path) -> set[Path]:
    """Files that an index names; none where it is no index."""
    with contextlib.suppress(CheckpointError):
        return {*_read_index(path).values()}
    return set()


def _parts(path: Path) -> list[Path]:
    """All files of the set of a part."""
    part = PART.fullmatch(path.name)
    assert part is not None
    count = int(part["count"])
    names = (f"{part['stem']}-{n:05}-of-{count:05}{part['suffix']}" for n in range(1, count + 1))
    return [path.with_name(name) for name in names]


def missing_parts(path: Path) -> list[str]:
    """Names of the files that are missing in the set of a part."""
    return [part.name for part in _parts(path) if not part.is_file()]


def is_container(path: Path) -> bool:
    """Whether a file is one of weights by its content, and neither half nor a piece of one."""
    if path.suffix in (DISTRIBUTED, *UNFINISHED, *_FOREIGN):
        return False
    try:
        return path.is_file() and container(read_head(path)) in ("pickled", "safetensors")
    except CheckpointError:
        return False


def _open_distributed(path: Path) -> Checkpoint:
    from worldline.weights.distributed import Joined, open_distributed

    def source(name: str, part: Any) -> Source:
        if isinstance(part, Joined):
            parts = tuple(source(name, inner) for inner in part.parts)
            return ShardedTensor(name, parts, part.axis)
        return FileTensor(*part)

    place, tensors, files = open_distributed(path)
    entries = {name: source(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(place, "distributed checkpoint", entries, tuple(files))


def read_head(path: Path) -> bytes:
    """First 512 bytes of a regular file."""
    try:
        if not path.is_file() and not path.is_dir() and path.exists():
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        target = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise CheckpointError(f"{path}{target} cannot be read: {strerror(error)}") from error


def container(head: bytes) -> str:
    """Container that the first 512 bytes of a file begin.

    It is "pickled", "safetensors", "distributed", "index" (or other JSON), or "" for no known one.
    """
    if head.startswith(_ZIP) or _LEGACY in head[:32]:
        return "pickled"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if _DISTRIBUTED in head[:64]:
        return "distributed"
    return "index" if head.lstrip().startswith(b"{") else ""


def _open_file(path: Path, head: bytes) -> Checkpoint:
    """Open a file of tensors; `head` is its first bytes."""
    kind = container(head)
    if kind == "pickled":
        from worldline.weights.archive import open_pickled

        kind, tensors, nesting, beside = open_pickled(path)
        entries = {name: FileTensor(path, *tensor) for name, tensor in tensors.items()}
        return Checkpoint(path, kind, entries, (path,), nesting, beside)
    if kind == "safetensors":
        return _open_safetensors(path, 8 + int.from_bytes(head[:8], "little"))
    if kind := disguise(head):
        advice = "run `git lfs pull`" if "lfs" in kind else "accept its licence, download it again"
        raise CheckpointError(f"{path} is a {kind}, not weights; {advice}")
    if not head.strip(b"\0"):
        raise CheckpointError(f"{path} is empty or starts with zeros; download it again")
    if kind := foreign(head):
        reason = f"is {kind}, which Worldline does not read"
    else:
        reason = f"is in no known format (it starts with {head[:8]!r})"
    raise CheckpointError(f"{path} {reason}; give .pt, .jit or .safetensors")


def holds_tensors(path: Path) -> bool:
    """Whether a file holds tensors, and not the state of a training alone."""
    head = read_head(path)
    return container(head) != "pickled" or bool(_open_file(path, head).entries)


def _open_safetensors(path: Path, position: int) -> Checkpoint:
    entries: dict[str, Source] = {}
    start = position
    try:
        with safetensors.safe_open(path, "np") as file:  # "pt" would reserve memory for the data
            for name in file.offset_keys():
                item = file.get_slice(name)
                dtype = _DTYPES[item.get_dtype()]
                meta = torch.empty(item.get_shape(), dtype=dtype, device="meta")
                entries[name] = FileTensor(path, position, meta)
                position += meta.nbytes
            metadata = file.metadata()
        with path.open("rb") as raw:  # the library takes the last of two tensors of one name
            num_names = json.loads(raw.read(start)[8:], object_pairs_hook=len)
        if num_names != len(entries) + (metadata is not None):
            raise ValueError(f"{num_names:,} names for {len(entries):,} tensors")
    except KeyError as error:
        reason = f"{path} holds numbers of {error}, which Worldline does not read"
        raise CheckpointError(reason) from error
    except (safetensors.SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {path.stat().st_size:,} bytes "
            f"({one_line(error):.200}); download it again"
        ) from error
    return Checkpoint(path, "safetensors", entries, (path,), metadata=metadata or {})


def _read_index(path: Path) -> dict[str, Path]:
    """Name of a tensor -> its file, of a `*.safetensors.index.json`.

    Raises:
        CheckpointError: it is no index, or names other folders.
    """
    try:
        places = parse_json(read_text(path))["weight_map"]
        return {tensor: path.with_name(name) for tensor, name in places.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{path} is a text, not weights, nor an index: {one_line(error):.200}"
        raise CheckpointError(reason) from error


def _open_index(path: Path) -> Checkpoint:
    """Open the files that an index names, as one."""
    places = _read_index(path)
    files = sorted({*places.values()})
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        names = ", ".join(missing[:5])
        raise CheckpointError(f"{path} names files that are missing: {names:.200}")
    opened = {file: _open_file(file, read_head(file)).entries for file in files}
    if absent := [tensor for tensor, file in places.items() if tensor not in opened[file]]:
        names = ", ".join(absent[:5])
        raise CheckpointError(f"{path} lists tensors that its files lack: {names:.200}")
    entries = {tensor: opened[file][tensor] for tensor, file in places.items()}
    return Checkpoint(path, "safetensors", entries, tuple(sorted([path, *files])))


def nonfinite(tensor: Tensor) -> str:
    """Kind of a number that is not finite in a tensor, "NaN" or "Inf"; "" without any."""
    if not tensor.is_floating_point():
        return ""
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats have no isfinite
    if wide.isfinite().all():
        return ""
    return "NaN" if wide.isnan().any() else "Inf"


def refuse_nonfinite(path: Path, name: str, value: Tensor) -> None:
    """Raise `CheckpointError` where a tensor of a file holds NaN or Inf."""
    if kind := nonfinite(value):
        raise CheckpointError(
            f"{path}: tensor {name} holds {kind}; download it again, or take a checkpoint from "
            "before its training diverged"
        )


def take_network(
    source: Checkpoint, anchors: Sequence[str], prefixes: Sequence[str] = ("",)
) -> Checkpoint:
    """Tensors of one network, of the averaged set where a file holds several.

    Other sets and training state are left out; any other tensor stays, and is reported as unknown:
    one that lies outside of what was stripped by a name that no network has.

    Args:
        source: where they lie.
        anchors: released names without a prefix; what stands before one of them names a set.
        prefixes: what may stay before names, preferred first.

    Raises:
        CheckpointError: it is not known which set is meant.
    """
    sets = {
        name.removesuffix(anchor)
        for name in source.entries
        for anchor in anchors
        if f".{name}".endswith(f".{anchor}") and not is_state(name)
    }
    averaged = {prefix for prefix in sets if is_averaged(prefix)}
    preferred = [prefix for prefix in prefixes if prefix in (averaged or sets)][:1]
    candidates = preferred or sorted(averaged or sets)
    if not candidates:
        return source
    if len(candidates) > 1:
        names = ", ".join(candidates)
        raise CheckpointError(f"{source.path} holds several sets of weights ({names}); keep one")
    [chosen] = candidates
    kept = max((p for p in prefixes if f".{chosen}".endswith(f".{p}")), key=len, default="")
    stripped = chosen.removesuffix(kept)

    unread: dict[str, None] = {}

    def rename(name: str) -> str | None:
        owner = max((prefix for prefix in sets if name.startswith(prefix)), key=len, default=None)
        if owner is not None:
            return name.removeprefix(stripped) if owner == chosen else None
        first = name.partition(".")[0]
        if is_averaged(first) and not is_state(name):
            unread[first] = None
            return None
        if is_state(name) or first in source.beside:
            return None
        # else it would take the place of a tensor of the set, or fill its gaps
        outside = "" if name.startswith(stripped) else f" (beside {chosen})"
        return f"{name.removeprefix(stripped)}{outside}"

    entries = {new: entry for n, entry in source.entries.items() if (new := rename(n)) is not None}
    notes = [f"averaged weights ({first}) in a form that is not read" for first in unread]
    if len(sets) > 1:
        others = ", ".join(repr(prefix) for prefix in sorted(sets - {chosen}))
        kind = "averaged weights" if averaged else "weights"
        notes.insert(0, f"{kind} {chosen!r} taken, not {others}")
    elif stripped:
        notes.insert(0, f"stripped from names: {stripped}")
    return replace(source, entries=entries, notes=(*source.notes, *notes))


def set_adapters_apart(source: Checkpoint) -> Checkpoint:
    """Weights with the LoRA adapters beside them as `adapters`; a file of these alone as it is."""
    adapters = {name: n for name in source.entries if is_adapter(n := with_dots(name))}
    weights = {name: entry for name, entry in source.entries.items() if name not in adapters}
    if not adapters or not weights:
        return source
    inside = {plain: source.entries[name] for name, plain in adapters.items()}
    return replace(source, entries=weights, adapters=inside)


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


def find_shards(folder: Path, stem: str = "*") -> list[Path]:
    """Shards `{stem}_model_mp_{rank}.pt` of a folder in the order of ranks; [] if it has none.

    The stem is "model", or "iter_000000002" of a training run; by default the only one there is.
    """
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"{stem}_model_mp_*.pt")):
        if shard := SHARD.fullmatch(path.name):
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
                f"missing: {', '.join(missing)}; `worldline checkpoints merge` joins another number"
            )
        return [ranks[rank] for rank in range(count)]
    return []


def sharded_axes(name: str) -> list[int | None]:
    """Axis on which ranks cut a released tensor, as `SHARDED_AXES` has it; [] of unknown ones."""
    return [axis for pattern, axis in SHARDED_AXES.items() if fnmatchcase(name, pattern)][:1]


def cut(checkpoint: Checkpoint, axis: Axis) -> Checkpoint:
    """What one of several tensor-parallel processes holds of a checkpoint; no more is ever read."""
    if axis.count == 1:
        return checkpoint

    def part(name: str, entry: Source) -> Source:
        for dim in sharded_axes(name):
            if dim is not None and dim < entry.meta.dim():
                return entry.cut(dim, *axis.span(entry.meta.shape[dim]))
        return entry

    entries = {name: part(name, entry) for name, entry in checkpoint.entries.items()}
    return replace(checkpoint, entries=entries)


def open_shards(paths: Sequence[Path]) -> Checkpoint:
    """Open the files of all ranks, in their order, as one checkpoint of full-size tensors."""
    first, *others = shards = [open_checkpoint(path) for path in paths]
    for other in others:
        kinds = [{(n, t.dtype, t.shape) for n, t in s.tensors.items()} for s in (first, other)]
        if odd := sorted(kinds[0] ^ kinds[1], key=str):
            name, dtype, shape = odd[0]
            raise CheckpointError(
                f"{other.path}: {name} ({dtype}, {list(shape)}) is not as in {first.path.name}; "
                "the shards are not of one model"
            )
    entries: dict[str, Source] = {}
    for name in first.entries:
        if "_extra_state" in name:  # FP8 bookkeeping of Transformer Engine
            continue
        if not (axes := sharded_axes(name)):
            raise CheckpointError(f"{first.path} holds {name}, and how ranks share it is not known")
        parts = tuple(shard.entries[name] for shard in shards)
        entries[name] = ShardedTensor(f"{first.path}: {name}", parts, axes[0])
    return replace(first, kind="tensor-parallel shards", entries=entries, files=tuple(paths))


def content_digest(tensors: Mapping[str, Tensor], text: Mapping[str, object] = {}) -> str:
    """SHA-256 of tensors on the CPU and of the text beside them, but for a "digest" in it."""
    lines = [f"{key} {value}\n" for key, value in sorted(text.items()) if key != "digest"]
    sha = hashlib.sha256("".join(lines).encode())
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, object] = {}) -> None:
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
        text = {key: str(value) for key, value in metadata.items()}
        temporary.touch()  # by the umask, which safetensors ignores
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(whole, temporary, metadata=text or None)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(mode)
