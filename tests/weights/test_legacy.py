"""PyTorch's files from before 1.6, opened by header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import FileTensor, open_checkpoint

BASE = torch.arange(24.0).view(6, 4)
TENSORS = {
    "base": BASE,
    "view": BASE[2:4, 1:],
    "turned": BASE.t(),
    "half": torch.randn(5).half(),
    "brain": torch.randn(3, 2).bfloat16(),
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "none": torch.zeros(0, 3),
}


def saved(path: Path, value: object) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("beside", [{}, {"optimizer": {"state": torch.ones(9)}, "step": 3}])
def test_every_tensor_is_found_without_being_read(tmp_path: Path, beside: dict[str, Any]) -> None:
    path = saved(tmp_path / "model.pt", {"model": TENSORS, **beside})
    opened = open_checkpoint(path)
    assert opened.nesting == "model"
    assert opened.beside == tuple(beside)
    for name, tensor in TENSORS.items():
        assert isinstance(opened.entries[name], FileTensor)
        found = opened.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_a_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    opened = open_checkpoint(saved(tmp_path / "model.bin", module.state_dict()))
    for name, tensor in module.state_dict().items():
        assert torch.equal(opened.read(name), tensor)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path / "model.pt", {"a": torch.ones(99), "b": torch.ones(99)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(path)


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        open_checkpoint(saved(tmp_path / "old.pt", {"a": 1}))
