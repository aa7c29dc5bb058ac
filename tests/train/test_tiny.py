"""The scripts that train the bundled world, at the smallest size: they run, resume and export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.train import tiny
from worldline.weights.write import save


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LatentShape(5, 2, 3)
    monkeypatch.setattr(tiny, "SHAPE", VideoShape(33, 32, 48))
    monkeypatch.setattr(tiny, "GRID", grid)
    small = replace(tiny.TOKENIZER, channels=4, level_channels=(8, 8, 8))
    monkeypatch.setattr(tiny, "TOKENIZER", small)
    monkeypatch.setattr(
        tiny,
        "AUTOREGRESSIVE",
        replace(tiny.AUTOREGRESSIVE, depth=1, width=32, hidden=32, grid=grid),
    )


def run(*words: object) -> None:
    result = CliRunner().invoke(tiny.main, [*map(str, words), "--device", "cpu"])
    if result.exception is not None:
        raise result.exception


def feature_network(path: Path) -> Path:
    """Weights in the shape of VGG16's convolutions, by torchvision's names."""
    torch.manual_seed(0)
    tensors, width = {}, 3
    for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        tensors[f"features.{index}.weight"] = torch.randn(4, width, 3, 3) / 6
        tensors[f"features.{index}.bias"] = torch.zeros(4)
        width = 4
    save(tensors, path)
    return path


def test_tokenizer_then_transformer(tmp_path: Path) -> None:
    common = ["--batch", 2, "--clips", 3]
    run("tokenizer", "--folder", tmp_path / "tok", "--steps", 2, *common)
    run("tokenizer", "--folder", tmp_path / "tok", "--steps", 3, *common)  # goes on
    assert json.loads((tmp_path / "tok" / "result.json").read_text())["steps"] == 3
    export = tmp_path / "tok" / "export"
    assert open_tokenizer(export)[1].levels == tiny.TOKENIZER.levels
    words = ["--tokenizer", export, "--steps", 2, *common]
    run("autoregressive", "--folder", tmp_path / "ar", *words)
    settings = json.loads((tmp_path / "ar" / "export" / "config.json").read_text())
    assert settings["video_latent_shape"] == [5, 2, 3]
    # another run may begin with these weights
    run("autoregressive", "--folder", tmp_path / "b", "--start", tmp_path / "ar" / "export", *words)


def test_the_perceptual_term_changes_the_weights(tmp_path: Path) -> None:
    features = feature_network(tmp_path / "features.safetensors")
    common = ["--steps", 1, "--batch", 1, "--clips", 1]
    run("tokenizer", "--folder", tmp_path / "colour", *common)
    run("tokenizer", "--folder", tmp_path / "both", "--features", features, *common)
    sources = [open_tokenizer(tmp_path / name / "export")[0] for name in ("colour", "both")]
    name = "decoder.conv_out.0.conv3d.weight"
    assert not torch.equal(sources[0].read(name), sources[1].read(name))
