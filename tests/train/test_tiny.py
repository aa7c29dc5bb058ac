"""The scripts that train the bundled world, at the smallest size: they run, resume and export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from worldline.models.predict1_dit.model import DiT
from worldline.models.predict1_dit.weights import open_dit
from worldline.shapes import LatentShape, VideoShape
from worldline.text.t5 import find_t5, load_t5, new_t5
from worldline.tokenizers.cosmos.load import load_tokenizer, open_tokenizer
from worldline.tokenizers.cosmos.statistics import read_statistics
from worldline.train.data import as_video, physics_batches
from worldline.train.tiny import diffusion as tiny_diffusion
from worldline.train.tiny import sizes
from worldline.train.tiny.__main__ import main
from worldline.weights.write import save


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LatentShape(5, 2, 3)
    monkeypatch.setattr(sizes, "SHAPE", VideoShape(33, 32, 48))
    monkeypatch.setattr(sizes, "GRID", grid)
    small = replace(sizes.TOKENIZER, channels=4, level_channels=(8, 8, 8))
    monkeypatch.setattr(sizes, "TOKENIZER", small)
    monkeypatch.setattr(
        sizes,
        "AUTOREGRESSIVE",
        replace(sizes.AUTOREGRESSIVE, depth=1, width=32, hidden=32, grid=grid),
    )
    small = replace(sizes.CONTINUOUS, channels=4, level_channels=(8, 8, 8))
    monkeypatch.setattr(sizes, "CONTINUOUS", small)
    small_dit = replace(
        sizes.DIFFUSION,
        depth=1,
        width=32,
        num_heads=1,
        hidden=32,
        lora_rank=2,
        context_width=16,
        max_grid=grid,
    )
    monkeypatch.setattr(sizes, "DIFFUSION", small_dit)
    text = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
    monkeypatch.setattr(sizes, "TEXT", text)


def run(*words: object) -> None:
    result = CliRunner().invoke(main, [*map(str, words), "--device", "cpu"])
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
    assert open_tokenizer(export)[1].levels == sizes.TOKENIZER.levels
    words = ["--tokenizer", export, "--steps", 2, *common]
    run("autoregressive", "--folder", tmp_path / "ar", *words)
    settings = json.loads((tmp_path / "ar" / "export" / "config.json").read_text())
    assert settings["video_latent_shape"] == [5, 2, 3]
    # another run may begin with these weights
    run(
        "autoregressive",
        "--folder",
        tmp_path / "b",
        "--weights",
        tmp_path / "ar" / "export",
        *words,
    )


def test_the_perceptual_term_changes_the_weights(tmp_path: Path) -> None:
    features = feature_network(tmp_path / "features.safetensors")
    common = ["--steps", 1, "--batch", 1, "--clips", 1]
    run("tokenizer", "--folder", tmp_path / "colour", *common)
    run("tokenizer", "--folder", tmp_path / "both", "--features", features, *common)
    sources = [open_tokenizer(tmp_path / name / "export")[0] for name in ("colour", "both")]
    name = "decoder.conv_out.0.conv3d.weight"
    assert not torch.equal(sources[0].read(name), sources[1].read(name))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a continuous tokenizer, trained for three steps in two runs."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "SHAPE", VideoShape(33, 32, 48))
        small = replace(sizes.CONTINUOUS, channels=4, level_channels=(8, 8, 8))
        patch.setattr(sizes, "CONTINUOUS", small)
        for steps in (2, 3):
            words = ["--kind", "continuous", "--steps", steps, "--batch", 2, "--clips", 3]
            run("tokenizer", "--folder", folder, *words)
    return folder / "export"


def test_the_statistics_are_those_of_the_exported_tokenizer(latents: Path) -> None:
    statistics = read_statistics(latents)
    assert statistics is not None
    assert statistics.frames == 16  # as many as in released files
    model = load_tokenizer(latents, device="cpu", dtype=torch.float32)
    clips = next(physics_batches(range(3), sizes.SHAPE, "cpu"))
    normal = statistics.normalise(model.encode(as_video(clips)))
    torch.testing.assert_close(normal.mean((0, 3, 4)), torch.zeros(16, 5), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        normal.std((0, 3, 4), correction=0), torch.ones(16, 5), atol=1e-3, rtol=0
    )


def diffusion(folder: Path, latents: Path, steps: int, *more: object) -> dict[str, Tensor]:
    words = ["--steps", steps, "--batch", 4, "--clips", 2, "--undescribed", "nothing to see"]
    run("diffusion", "--folder", folder, "--tokenizer", latents, *words, *more)
    return load_file(next(folder.glob("average-*.safetensors")))


def test_a_cut_diffusion_run_goes_on_bit_for_bit(tmp_path: Path, latents: Path) -> None:
    whole = diffusion(tmp_path / "whole", latents, 3)
    diffusion(tmp_path / "cut", latents, 3, "--seconds", 0)
    assert json.loads((tmp_path / "cut" / "state.json").read_text())["step"] == 1
    cut = diffusion(tmp_path / "cut", latents, 3)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_world_and_its_text_encoder_can_be_opened(tmp_path: Path, latents: Path) -> None:
    diffusion(tmp_path, latents, 2)
    world = tmp_path / "export" / tiny_diffusion.WORLD
    settings = json.loads((world / "config.json").read_text())
    assert open_dit(world, settings).config == sizes.DIFFUSION
    assert settings["text2world"] is True
    text = load_t5(find_t5(tmp_path / "export" / tiny_diffusion.TEXT_FOLDER), "cpu", torch.float32)
    rows = text.encode(["A red ball falls."])
    assert rows.shape == (1, sizes.TEXT_LENGTH, sizes.TEXT["d_model"])
    # another run may begin with these weights
    words = ["--tokenizer", latents, "--steps", 1, "--batch", 1, "--clips", 1]
    run("diffusion", "--folder", tmp_path / "b", "--weights", tmp_path / "export", *words)


def test_the_text_encoder_learns_with_the_transformer() -> None:
    torch.manual_seed(0)
    model = tiny_diffusion.Denoising(DiT(sizes.DIFFUSION), new_t5(sizes.TEXT))
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = (torch.randn(1, 16, 5, 4, 6), torch.randn(2, 1, 16, 5, 4, 6))
    words = model.text.tokenize(["a red ball"], 16)
    noise, known = torch.tensor([1.0]), torch.tensor([1])
    tiny_diffusion.denoising_in(
        torch.bfloat16, model, *given, *words, noise, known
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
