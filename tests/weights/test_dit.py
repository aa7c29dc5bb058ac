"""Which file of a folder is the transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.dit import DiTSettings
from worldline.weights.networks import DIFFUSERS_FILES, weights_file


def test_the_order_of_preference(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for name in (  # each is preferred to those before it
        f"transformer/{DIFFUSERS_FILES[0]}",
        "iter_000000002.pt",
        "iter_000000010.pt",
        "iter_000000010_model_mp_0.pt",
        "model.pt",
        "model.safetensors",
        "x_ema_bf16.pt",
    ):
        (tmp_path / name).touch()
        assert weights_file(tmp_path) == tmp_path / name
    assert weights_file(tmp_path / "model.pt") == tmp_path / "model.pt"


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.pt \(looked for model\.safetensors"):
        weights_file(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=DIFFUSERS_FILES[1]):
        weights_file(tmp_path)


def test_settings(tmp_path: Path) -> None:
    save({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "model.pt")
    source, file = open_checkpoint(tmp_path / "model.pt"), tmp_path / "config.json"
    file.write_text('{"rope_scale": [1, 2.5, 3], "extra_pos_embed_type": null}')
    assert DiTSettings.read(source, None).rope_ratio == (1.0, 2.5, 3.0)
    assert DiTSettings.read(source, {"rope_ratio": [3, 2, 1]}).rope_ratio == (3, 2, 1)
    for text in ("{}", "[]", "no"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            DiTSettings.read(source, None)
    for bad in ([1, 2], [1, 2, 0], "123", 3):
        with pytest.raises(CheckpointError, match=r"config\.json: rope_ratio is"):
            DiTSettings.read(source, {"rope_ratio": bad})
