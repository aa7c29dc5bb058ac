"""The layouts in which the continuous tokenizer and its statistics are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny.export import draw_weights, stored_tensors
from worldline.errors import CheckpointError
from worldline.tokenizers.cosmos.model import (
    PRESETS,
    CosmosTokenizer,
    CosmosTokenizerConfig,
    LatentStatistics,
)
from worldline.tokenizers.cosmos.weights import (
    key_map,
    open_tokenizer,
    read_statistics,
    tokenizer_files,
)
from worldline.tokenizers.layouts import cosmos_settings
from worldline.weights.checkpoint import save
from worldline.weights.keymap import match

KEYS = Path(__file__).parents[1] / "keys" / "vae"
TINY = CosmosTokenizerConfig(channels=4, level_channels=(8, 8, 8))


def manifest(name: str) -> dict[str, Any]:
    path = KEYS / f"Cosmos-Tokenize1-CV8x8x8-720p.{name}.json"
    stated: dict[str, Any] = json.loads(path.read_text())
    return stated


def build(config: CosmosTokenizerConfig = TINY) -> CosmosTokenizer:
    torch.manual_seed(0)
    model = CosmosTokenizer(config)
    draw_weights(model)
    return model.requires_grad_(False).eval()


def statistics(channels: int = 16, frames: int = 16) -> LatentStatistics:
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(channels, frames, generator=generator)
    return LatentStatistics(mean, mean.abs() + 0.5, mean[:, 3].clone(), mean[:, 4].abs() + 0.1)


def save_vae(folder: Path, model: CosmosTokenizer, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(model, key_map(model.config, True))
    save(tensors, folder / "diffusion_pytorch_model.safetensors")
    settings = {**cosmos_settings(model.config, statistics()), **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors


def test_every_tensor_of_the_diffusers_file_has_its_place() -> None:
    stated = manifest("diffusers")
    with torch.device("meta"):
        model = CosmosTokenizer(PRESETS["CV8x8x8"])
    keys, released = key_map(model.config, True), key_map(model.config)
    assert stated["tensors"].keys() == stated["key_map"].keys()
    for theirs, name in stated["key_map"].items():
        assert keys.ours(theirs) == released.ours(name)
    infos = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, (_, shape) in stated["tensors"].items()
    }
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(match(infos, expected, keys, "vae")) == stated["count"]
    assert sorted(stored_tensors(model, keys)) == sorted(stated["tensors"])
    settings = cosmos_settings(model.config)
    for name, value in settings.items():
        assert stated["config"].get(name, value) == value


@pytest.mark.parametrize("name", ["CV8x8x8", "CV4x8x8"])
def test_a_vae_folder_is_opened_as_such_or_from_its_model(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    config = CosmosTokenizerConfig(
        channels=4, level_channels=(8, 8, 12), patch=preset.patch, temporal=preset.temporal
    )
    model = build(config)
    save_vae(tmp_path / "model" / "vae", model)
    (tmp_path / "model" / "model.pt").write_bytes(b"of another part")
    video = torch.rand(1, 3, 9, 16, 16)
    for folder in (tmp_path / "model", tmp_path / "model" / "vae"):
        opened = open_tokenizer(folder)
        again = opened.read("cpu", torch.float32)
        assert again.config == config
        assert opened.num_parameters == sum(p.numel() for p in model.parameters())
        assert torch.equal(again.encode(video), model.encode(video))
        read = opened.statistics
        assert read is not None
        assert torch.equal(read.mean, statistics().mean)


def test_a_wrong_vae_folder_is_refused_by_name(tmp_path: Path) -> None:
    model = build()
    tensors = save_vae(tmp_path / "vae", model)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save(tensors | {"encoder.conv_in.conv_x.weight": torch.ones(2)}, weights)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.conv_x"):
        open_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"looked for diffusion_pytorch_model\.safetensors"):
        open_tokenizer(tmp_path)
    save_vae(tmp_path / "vae", model, patch_size=2)
    with pytest.raises(CheckpointError, match="patch_size is 2"):
        open_tokenizer(tmp_path)
    save_vae(tmp_path / "vae", model, _class_name="AutoencoderKLWan")
    with pytest.raises(CheckpointError, match="AutoencoderKLWan"):
        open_tokenizer(tmp_path / "vae")
    save_vae(tmp_path / "vae", model, latents_std=[1.0] * 7)
    with pytest.raises(CheckpointError, match=r"config\.json: no statistics"):
        open_tokenizer(tmp_path).statistics  # noqa: B018
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_tokenizer(tmp_path)


def test_released_statistics_are_read(tmp_path: Path) -> None:
    stated = statistics()
    for name, shape in (("mean_std", (256,)), ("mean_std", (16, 16)), ("mean_std", (1, 256))):
        assert manifest(name)["tensors"]["0"] == ["float32", [256]]
        pair = (stated.mean.reshape(shape), stated.std.reshape(shape))
        torch.save(pair, tmp_path / "mean_std.pt")
        read = read_statistics(tmp_path, 16)
        assert read is not None
        assert torch.equal(read.mean, stated.mean)
        assert torch.equal(read.std, stated.std)
        assert read.frames == 16
        assert read.image_mean is None
    assert manifest("image_mean_std")["tensors"]["1"] == ["float32", [16]]
    torch.save([stated.image_mean, stated.image_std], tmp_path / "image_mean_std.pt")
    read = read_statistics(tmp_path, 16)
    assert read is not None
    assert torch.equal(read.image_mean, stated.image_mean)


def test_statistics_of_few_frames_and_of_other_channels(tmp_path: Path) -> None:
    """With the channels known, a flat file holds as many latent frames as there are numbers."""
    stated = statistics(channels=4, frames=9)
    path = tmp_path / "mean_std.pt"
    torch.save((stated.mean.flatten(), stated.std.flatten()), path)
    read = read_statistics(tmp_path, 4)
    assert read is not None
    assert torch.equal(read.mean, stated.mean)
    with pytest.raises(CheckpointError, match=r"mean_std\.pt: no statistics .*\[5, -1\]"):
        read_statistics(tmp_path, 5)
    torch.save((stated.image_mean, stated.image_std), tmp_path / "image_mean_std.pt")
    torch.save((torch.zeros(6, 9), torch.ones(6, 9)), path)
    with pytest.raises(CheckpointError, match=r"mean_std\.pt"):
        read_statistics(tmp_path, 6)  # the file of images has 4
    path.unlink()
    save_vae(tmp_path, build())
    assert read_statistics(tmp_path, 16) is not None
    with pytest.raises(CheckpointError, match=r"config\.json: no statistics"):
        read_statistics(tmp_path, 7)


def test_a_vae_without_weights_does_not_hide_a_released_tokenizer(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", build())
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "autoencoder.jit").touch()
    assert tokenizer_files(tmp_path) == [weights]
    weights.unlink()
    assert tokenizer_files(tmp_path) == [tmp_path / "autoencoder.jit"]


def test_our_statistics_are_read_back(tmp_path: Path) -> None:
    stated = statistics(frames=5)
    save(stated.tensors(), tmp_path / "mean_std.safetensors")
    read = read_statistics(tmp_path, 16)
    assert read is not None
    assert read.tensors().keys() == stated.tensors().keys()
    for name, tensor in stated.tensors().items():
        assert torch.equal(read.tensors()[name], tensor)


def test_a_folder_without_statistics(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no JSON, and read by nobody")
    assert read_statistics(tmp_path, 16) is None


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mean_std.pt"
    for content in (
        [torch.zeros(256), torch.zeros(256)],
        [torch.zeros(256), torch.full((256,), torch.nan)],
        [torch.zeros(256), torch.ones(240)],
        [torch.zeros(256)],
        {"mean": torch.zeros(256)},
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"mean_std\.pt"):
            read_statistics(tmp_path, 16)


def test_normalising_and_back() -> None:
    stated = statistics()
    latents = torch.randn(2, 16, 5, 2, 3)
    normalised = stated.normalise(latents)
    expected = (latents[1, 4, 2] - stated.mean[4, 2]) / stated.std[4, 2]
    assert torch.allclose(normalised[1, 4, 2], expected)
    assert torch.allclose(stated.denormalise(normalised), latents, atol=1e-5)
    assert stated.normalise(latents.bfloat16()).dtype == torch.bfloat16


def test_an_image_is_not_the_first_frame_of_a_clip() -> None:
    stated = statistics()
    latents = torch.randn(1, 16, 1, 2, 2)
    first = (latents - stated.mean[:, :1, None, None]) / stated.std[:, :1, None, None]
    assert not torch.allclose(stated.normalise(latents), first)
    assert torch.allclose(stated.normalise(latents, image=False), first)
    without = LatentStatistics(stated.mean, stated.std)
    assert torch.allclose(without.normalise(latents), first)
