"""Files of weights: opened by header whatever their format, joined as one, read, saved.

A `FileTensor` is an entry of a header. Nothing of it is read until `read`, or `load_into`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import disguise, replacing

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
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
        nbytes = self.meta.untyped_storage().nbytes()
        data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        read_bytes(self.path, self.position, data.numpy().data)
        return data.view(self.meta.dtype).as_strided(self.meta.shape, self.meta.stride())


def read_bytes(path: Path, position: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of a file from a position on."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(position)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{path} was cut short while in use")
                buffer = buffer[count:]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read any more: {error}") from error


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
        mean = torch.stack(tensors).float().mean(0).to(tensors[0].dtype)
        if not torch.allclose(tensors[0], mean, atol=_REPLICA_ATOL, rtol=_REPLICA_RTOL):
            raise CheckpointError(
                f"{self.name} is copied on every rank, yet rank 0 is far from the mean: the "
                "shards are not of one model"
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
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if head.startswith(_ZIP) or _LEGACY in head[:32]:
        from worldline.weights.archive import open_pickled

        kind, tensors, nesting, beside = open_pickled(path)
        entries = {name: FileTensor(path, *tensor) for name, tensor in tensors.items()}
        checkpoint = Checkpoint(path, kind, entries, (path,), nesting, beside)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        checkpoint = _open_safetensors(path, 8 + int.from_bytes(head[:8], "little"))
    elif kind := disguise(head):
        advice = "run `git lfs pull`" if "lfs" in kind else "accept its licence, download it again"
        raise CheckpointError(f"{path} is a {kind}, not weights; {advice}")
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


def _open_safetensors(path: Path, position: int) -> Checkpoint:
    entries: dict[str, Source] = {}
    try:
        with safetensors.safe_open(path, "np") as file:  # "pt" would reserve memory for the data
            for name in file.offset_keys():
                item = file.get_slice(name)
                dtype = safetensors.torch._TYPES[item.get_dtype()]
                meta = torch.empty(item.get_shape(), dtype=dtype, device="meta")
                entries[name] = FileTensor(path, position, meta)
                position += meta.nbytes
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {path.stat().st_size:,} bytes ({error}); "
            "download it again"
        ) from error
    return Checkpoint(path, "safetensors", entries, (path,), metadata=metadata)


def _open_index(path: Path) -> Checkpoint:
    """Open `*.safetensors.index.json`: the files that it names, as one."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = {name: path.with_name(name) for name in sorted(set(places.values()))}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is a text, not weights, nor an index: {error}") from error
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise CheckpointError(f"{path} names files that are missing: {', '.join(missing[:5])}")
    opened = {name: open_checkpoint(file).entries for name, file in files.items()}
    if absent := [tensor for tensor, name in places.items() if tensor not in opened[name]]:
        raise CheckpointError(f"{path} lists tensors that its files lack: {', '.join(absent[:5])}")
    entries = {tensor: opened[name][tensor] for tensor, name in places.items()}
    return Checkpoint(path, "safetensors", entries, tuple(sorted([path, *files.values()])))


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
                f"missing: {', '.join(missing)}"
            )
        return [ranks[rank] for rank in range(count)]
    return []


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
        axes = [axis for pattern, axis in SHARDED_AXES.items() if fnmatchcase(name, pattern)]
        if not axes:
            raise CheckpointError(f"{first.path} holds {name}, and how ranks share it is not known")
        parts = tuple(shard.entries[name] for shard in shards)
        entries[name] = ShardedTensor(f"{first.path}: {name}", parts, axes[0])
    return replace(first, kind="tensor-parallel shards", entries=entries, files=tuple(paths))


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
