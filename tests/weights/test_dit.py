"""Which file of a folder is the transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worldline.errors import CheckpointError
from worldline.weights.dit import (
    DIFFUSERS_FILES,
    diffusers_settings,
    find_dit,
    open_file,
    read_ratio,
)
from worldline.weights.write import save

PATTERN = "*_ema_bf16.pt"


def test_the_order_of_preference(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    names = [
        f"transformer/{DIFFUSERS_FILES[0]}",
        "iter_000000002.pt",
        "iter_000000010.pt",
        "model.pt",
        "model.safetensors",
        "x_ema_bf16.pt",
    ]
    for name in names:  # each is preferred to those before it
        (tmp_path / name).touch()
        layout = "diffusers" if name == names[0] else "nvidia"
        assert find_dit(tmp_path, PATTERN) == (tmp_path / name, layout)
    assert find_dit(tmp_path) == (tmp_path / "model.safetensors", "nvidia")
    assert find_dit(tmp_path / names[1], PATTERN) == (tmp_path / names[1], "nvidia")
    assert find_dit(tmp_path / names[0], PATTERN) == (tmp_path / names[0], "diffusers")


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.pt \(nor model\.safetensors, nor trans"):
        find_dit(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="incomplete"):
        find_dit(tmp_path)


def test_settings_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_scale": [1, 2, 3], "extra_pos_embed_type": null}')
    assert diffusers_settings(tmp_path, positions=None) == {"rope_ratio": [1, 2, 3]}
    with pytest.raises(CheckpointError, match="extra_pos_embed_type is None"):
        diffusers_settings(tmp_path, positions="learnable")
    for text in ("{}", "[]", "no"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="rope_scale"):
            diffusers_settings(tmp_path, positions=None)


def test_stretching_is_three_numbers_above_zero(tmp_path: Path) -> None:
    save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    source = open_file(tmp_path / "model.pt")
    assert read_ratio(source, [1, 2.5, 3]) == (1.0, 2.5, 3.0)
    for bad in ([1, 2], [1, 2, 0], "123", None, 3):
        with pytest.raises(CheckpointError, match="rope_ratio"):
            read_ratio(source, bad)
