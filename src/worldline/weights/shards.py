"""Tensor-parallel shards: one file a rank, opened as the one model that they were cut from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from worldline.errors import CheckpointError
from worldline.weights.read import Checkpoint, Entry, open_checkpoint
from worldline.weights.source import Source

_SHARD = re.compile(r"(?P<stem>.+)_model_mp_(?P<rank>\d+)\.pt")


def shard_stem(path: Path) -> str | None:
    """Return the stem of a set by one of its files, for `find_shards`; None for another file."""
    found = _SHARD.fullmatch(path.name)
    return found["stem"] if found else None


def find_shards(folder: Path, stem: str | None = None) -> list[Path]:
    """Return the shards `{stem}_model_mp_{rank}.pt` of a folder, in the order of ranks.

    Args:
        folder: where to look.
        stem: "model", or "iter_000000002" of a training run; None takes the only one there is.

    Returns:
        Their paths; none if the folder has no such file.

    Raises:
        CheckpointError: ranks are missing, or `stem` is None and there are several sets.
    """
    sets: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*_model_mp_*.pt")):
        found = _SHARD.fullmatch(path.name)
        if found and stem in (None, found["stem"]):
            sets.setdefault(found["stem"], {})[int(found["rank"])] = path
    if not sets:
        return []
    if len(sets) > 1:
        raise CheckpointError(
            f"{folder} holds several sets of tensor-parallel shards ({', '.join(sets)}); give the "
            f"path of one file in place of the folder, such as {folder / min(sets)}_model_mp_0.pt"
        )
    [(name, ranks)] = sets.items()
    # Models are cut in 1, 2, 4, 8 ... parts, so three files are four of which one is missing.
    number = 1 << max(ranks).bit_length()
    missing = [rank for rank in range(number) if rank not in ranks]
    if missing:
        files = ", ".join(f"{name}_model_mp_{rank}.pt" for rank in missing)
        raise CheckpointError(
            f"{folder} has {len(ranks)} of {number} tensor-parallel shards; missing: {files}"
        )
    return [ranks[rank] for rank in range(number)]


def open_shards(paths: Sequence[Path], layout: Mapping[str, int | None]) -> Checkpoint:
    """Open the files of all ranks as one checkpoint; headers only.

    Args:
        paths: in the order of ranks.
        layout: pattern of names -> the axis that was cut (0 rows, 1 columns), None for a tensor
            that every rank holds whole. "{i}" and "*" stand for anything; a pattern may leave out
            leading parts of a name; the first that fits counts.

    Returns:
        Tensors of full size. Replicated ones that differ are averaged when they are read, and
        refused if they differ by more than rounding.

    Raises:
        CheckpointError: the files do not fit together, or a name is not in `layout`.
    """
    if not paths:
        raise CheckpointError("no tensor-parallel shards were given")
    shards = [open_checkpoint(path) for path in paths]
    first = shards[0]
    for other in shards[1:]:
        if odd := sorted(first.entries.keys() ^ other.entries.keys()):
            holder, lacker = (first, other) if odd[0] in first.entries else (other, first)
            raise CheckpointError(
                f"{lacker.path} lacks tensor {odd[0]}, which {holder.path.name} holds: "
                "the shards are not of one model"
            )
    patterns = {pattern: (re.sub(r"\{\w+\}", "*", pattern), dim) for pattern, dim in layout.items()}
    entries: dict[str, Entry] = {}
    for name in first.entries:
        dims = [
            dim
            for pattern, dim in patterns.values()
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        ]
        if not dims:
            raise CheckpointError(f"{first.path} holds {name}, and how ranks share it is not known")
        parts = [part for shard in shards for part in shard.entries[name].parts]
        entries[name] = _joined(name, parts, dims[0], shards)
    return Checkpoint(
        first.path,
        "tensor-parallel shards",
        entries,
        first.nesting,
        first.strays,
        first.beside,
    )


def _joined(
    name: str, parts: Sequence[Source], dim: int | None, shards: Sequence[Checkpoint]
) -> Entry:
    first = parts[0].info
    for part, shard in zip(parts, shards, strict=True):
        info = part.info
        fits = info.dtype == first.dtype and len(info.shape) == len(first.shape)
        fits = fits and (dim is None or dim < len(info.shape))
        fits = fits and all(
            axis == dim or size == wanted
            for axis, (size, wanted) in enumerate(zip(info.shape, first.shape, strict=True))
        )
        if not fits:
            raise CheckpointError(
                f"{shard.path}: {name} is {info.dtype} {list(info.shape)}, but {first.dtype} "
                f"{list(first.shape)} on rank 0: the shards are not of one model"
            )
    return Entry(tuple(parts), dim)
