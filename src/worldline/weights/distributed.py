"""Distributed checkpoints of PyTorch, as trainings with FSDP write them, opened by header.

A folder holds `.metadata` and files `__{rank}_{i}.distcp`. The first is a pickle: dtype, shape and
chunks of each tensor, and where each chunk lies; there it is an archive as `torch.save` writes it.
Source: torch.distributed.checkpoint, `metadata.py` and `filesystem.py`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from worldline.errors import CheckpointError, one_line
from worldline.weights.archive import Inert, Unpickler, largest_pickle, read_zip, refuse_overlaps

Index = tuple[int, ...]


class Piece(NamedTuple):
    """A chunk: file, bytes from its start, and a meta tensor."""

    path: Path
    position: int
    meta: Tensor


class Joined(NamedTuple):
    """Parts of a tensor along an axis."""

    axis: int
    parts: tuple[Piece | Joined, ...]


Chunk = tuple[Index, Piece]  # first element's index, and values


class _Object(Inert):
    """An object of the metadata, of whatever class: its attributes alone."""

    state: Any = ()

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(Unpickler):
    """Knows dtypes and shapes; the metadata build no tensor."""

    def find_class(self, module: str, name: str, /) -> Any:
        known = name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        return super().find_class(module, name) if module == "torch" and known else _Object


class View(io.RawIOBase):
    """Bytes of a file from a position on, as a file."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self.file, self.start, self.nbytes, self.position = file, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, (0, self.position, self.nbytes)[whence] + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        room = max(0, self.nbytes - self.position)
        data = self.file.read(min(room, len(buffer)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_distributed(path: Path) -> tuple[Path, dict[str, Piece | Joined], list[Path]]:
    """Open a distributed checkpoint by its `.metadata`; headers of all chunks are read.

    Returns:
        Path that stands for it: its folder, or one around it, beside which config.json lies;
        tensors by name; all files.

    Raises:
        CheckpointError: it is damaged, or lacks a file, or is of NeMo.
    """
    folder = path.parent
    if any((folder / name).is_file() for name in ("common.pt", "metadata.json")):
        raise CheckpointError(
            f"{folder} is a checkpoint of NeMo (Megatron), which Worldline does not read; export "
            "its state_dict() to .safetensors"
        )
    try:
        tensors, files = _read(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{path} is cut short or damaged, or does not fit the files beside it "
            f"({one_line(error):.200}); copy the whole folder again"
        ) from error
    around = [path, folder, *folder.absolute().parents[:3]]
    place = next((p for p in around if (p.parent / "config.json").is_file()), folder)
    return place, tensors, [path, *files]


def _read(path: Path) -> tuple[dict[str, Piece | Joined], list[Path]]:
    with path.open("rb") as file:
        whole = sum(each.stat().st_size for each in path.parent.glob("*.distcp"))
        data = file.read(limit := largest_pickle(whole))
        if file.read(1):
            raise ValueError(f"more than {limit:,} bytes")
    metadata = _Unpickler(path, io.BytesIO(data)).load().state
    stored: dict[Path, dict[tuple[str, Index], tuple[int, int]]] = {}
    for index, item in metadata["storage_data"].items():
        if (offset := index.state.get("offset")) is None:
            continue  # no tensor
        name, start, nbytes = (item.state[key] for key in ("relative_path", "offset", "length"))
        if Path(name).name != name:
            raise ValueError(f"a file of another folder, {name!r:.80}")
        if item.state.get("transform_descriptors"):
            raise CheckpointError(f"{path.with_name(name)} is compressed; save it without")
        place = stored.setdefault(path.with_name(name), {})
        place[index.state["fqn"], offset] = start, nbytes
    chunks: dict[tuple[str, Index], Piece] = {}
    for file_path, places in stored.items():
        with file_path.open("rb") as file:
            refuse_overlaps(places.values(), file.seek(0, io.SEEK_END))
            for key, (start, nbytes) in places.items():
                view: Any = View(file, start, nbytes)
                [(position, meta)] = read_zip(file_path, view)[1].values()
                chunks[key] = Piece(file_path, start + position, meta)
    tensors: dict[str, Piece | Joined] = {}
    for name, described in metadata["state_dict_metadata"].items():
        if "chunks" not in described.state:
            continue
        stated = described.state
        shape, dtype = stated["size"], stated["properties"].state[0]
        indices = [chunk.state["offsets"] for chunk in stated["chunks"]]
        parts = [(index, chunks[name, index]) for index in indices]
        if any(part.meta.dtype != dtype for _, part in parts):
            raise ValueError(f"{name} is {parts[0][1].meta.dtype}, expected {dtype}")
        parts = [part for part in parts if part[1].meta.numel()] or parts[:1]
        tensors[name] = _assemble(name, parts, (0,) * len(shape), shape)
    return tensors, sorted(stored)


def _assemble(name: str, chunks: Sequence[Chunk], start: Index, shape: Index) -> Piece | Joined:
    """Tensor of the chunks that tile a box: joined along the first axis that parts them.

    Raises:
        ValueError: they leave a gap, overlap, or reach out of it.
    """
    if len(chunks) == 1 and chunks[0][0] == start and chunks[0][1].meta.shape == shape:
        return chunks[0][1]
    for axis, size in enumerate(shape):
        groups: list[list[Chunk]] = []
        end = start[axis]
        for index, tensor in sorted(chunks, key=lambda chunk: chunk[0][axis]):
            if index[axis] >= end:
                groups.append([])
            groups[-1].append((index, tensor))
            end = max(end, index[axis] + tensor.meta.shape[axis])
        if len(groups) > 1:
            inner = [group[0][0][axis] for group in groups[1:]]
            bounds = pairwise([start[axis], *inner, start[axis] + size])
            parts = tuple(
                _assemble(
                    name,
                    group,
                    (*start[:axis], first, *start[axis + 1 :]),
                    (*shape[:axis], last - first, *shape[axis + 1 :]),
                )
                for group, (first, last) in zip(groups, bounds, strict=True)
            )
            return Joined(axis, parts)
    raise ValueError(f"the chunks of {name} do not make {list(shape)}")
