"""A summary tells what a file holds."""

from pathlib import Path

import torch

from worldline.weights.inspect import describe


def test_training_checkpoint(tmp_path: Path) -> None:
    model = {
        "model.layers.0.w": torch.ones(2, 3, dtype=torch.bfloat16),
        "model.layers.1.w": torch.ones(2, 3, dtype=torch.bfloat16),
        "model.norm.w": torch.ones(3),
        "model.norm._extra_state": None,
    }
    torch.save({"model": model, "iteration": 3}, tmp_path / "iter_000000003.pt")
    summary = describe(tmp_path / "iter_000000003.pt")
    assert (summary.kind, summary.nesting, summary.prefix) == ("pt", "model", "model.")
    assert summary.elements == {"bfloat16": 12, "float32": 3}
    assert (summary.num_tensors, summary.nbytes) == (3, 36)
    assert summary.groups == {"layers": 2, "norm": 1}
    assert summary.strays == ("model.norm._extra_state",)
    assert summary.beside == ("iteration",)
    assert summary.tensors["model.norm.w"].shape == (3,)


def test_no_common_prefix(tmp_path: Path) -> None:
    torch.save({"network.a": torch.ones(1), "ema.network-a": torch.ones(1)}, tmp_path / "m.pt")
    summary = describe(tmp_path / "m.pt")
    assert summary.prefix == ""
    assert summary.groups == {"network": 1, "ema": 1}
    torch.save(torch.ones(2), tmp_path / "lone.pt")
    assert describe(tmp_path / "lone.pt").prefix == ""
