"""Distributed checkpoints: any tiling of tensors gives them back; nothing is executed."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import open_checkpoint, open_set

Box = tuple[slice, ...]


def write(
    folder: Path, tensors: dict[str, Tensor], boxes: dict[str, Sequence[Box]], **changes: Any
) -> Path:
    """Save tensors as ranks do that hold one box each; `changes` are of a place's record."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"step": BytesStorageMetadata()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    files: dict[str, bytes] = {}
    for name, tensor in tensors.items():
        chunks = []
        for rank, box in enumerate(boxes.get(name, [(slice(None),) * tensor.dim()])):
            piece = tensor[box].clone()
            offsets = torch.Size([(part.start or 0) for part in box])
            chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            buffer = io.BytesIO()
            torch.save(piece, buffer)
            file = f"__{rank}_0.distcp"
            before = files.get(file, b"")
            place = {"relative_path": file, "offset": len(before), "length": buffer.tell()}
            places[MetadataIndex(name, offsets)] = _StorageInfo(**{**place, **changes})
            files[file] = before + buffer.getvalue()
        properties = TensorProperties(tensor.dtype)
        described[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    metadata = Metadata(described, planner_data={}, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def rows(*stops: int) -> list[Box]:
    """Boxes of rows that end at `stops`."""
    return [(slice(a, b), slice(None)) for a, b in zip((0, *stops), stops, strict=False)]


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(11)).bfloat16()
TILINGS = {
    "whole": [(slice(None), slice(None))],
    "rows": rows(2, 4, 6, 7),
    "uneven, with an empty rank": rows(3, 6, 7, 7),
    "columns": [(slice(None), slice(0, 3)), (slice(None), slice(3, 5))],
    "grid": [(slice(a, a + 4), slice(b, b + 3)) for a in (0, 4) for b in (3, 0)],
    "bricks": [
        (slice(0, 4), slice(0, 2)),
        (slice(0, 4), slice(2, 5)),
        (slice(4, 7), slice(0, 4)),
        (slice(4, 7), slice(4, 5)),
    ],
}


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_tilings(tiling: list[Box], tmp_path: Path) -> None:
    tensors = {"net.x": X, "net.scalar": torch.tensor(3), "net.none": torch.empty(0, 2)}
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"net.x": tiling}))
    assert checkpoint.kind == "distributed checkpoint"
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert {file.name for file in checkpoint.files} == {file.name for file in tmp_path.iterdir()}


BROKEN = {
    "gap": rows(2, 4),
    "overlap": [*rows(4), (slice(3, 7), slice(None))],
    "overhang": [*rows(4), (slice(4, 7), slice(0, 4))],
}


@pytest.mark.parametrize("tiling", BROKEN.values(), ids=BROKEN)
def test_chunks_that_do_not_make_the_tensor(tiling: list[Box], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"net\.x do not make"):
        open_checkpoint(write(tmp_path, {"net.x": X}, {"net.x": tiling}))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 40},
        {"offset": -1},
        {"length": 1 << 30},
        {"length": 100},
        {"relative_path": "../__0_0.distcp"},
        {"relative_path": "__9_0.distcp"},
        {"transform_descriptors": ["zstd"]},
    ],
    ids=str,
)
def test_places_that_are_wrong(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path / "model", {"a": X}, {}, **changes))
    assert str(tmp_path / "model") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_two_tensors_at_one_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two tensors"):
        open_checkpoint(write(tmp_path, {"a": X, "b": X}, {}, offset=0))


def test_dtype_that_disagrees(tmp_path: Path) -> None:
    write(tmp_path, {"a": X}, {})
    text = (tmp_path / ".metadata").read_bytes()
    assert text.count(b"\x8c\x08bfloat16") == 1
    (tmp_path / ".metadata").write_bytes(text.replace(b"\x8c\x08bfloat16", b"\x8c\x07float16"))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/nonexistent/payload",)


def test_nothing_in_the_metadata_is_executed(tmp_path: Path) -> None:
    write(tmp_path, {"a": X}, {})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.planner_data = Payload()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(open_checkpoint(tmp_path).read("a"), X)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_library_saves(tmp_path: Path) -> None:
    state = {"net": {"a.b": X, "c": X.t()}, "optim": {"step": 3}, "lr": 0.1}
    dcp.save(state, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path / "model", *(tmp_path / "model").iterdir()):
        checkpoint = open_set(path)
        assert checkpoint.tensors.keys() == {"net.a.b", "net.c"}
        assert torch.equal(checkpoint.read("net.c"), X.t())
        assert checkpoint.path.parent == tmp_path  # where its settings are
    (tmp_path / "model" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        open_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "common.pt").touch()
    with pytest.raises(CheckpointError, match="NeMo"):
        open_checkpoint(tmp_path / "model")
