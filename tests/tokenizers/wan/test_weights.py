"""The layouts of the Wan2.1 tokenizer's files, and messages about files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny.export import draw_weights, stored_tensors
from worldline.errors import CheckpointError
from worldline.tokenizers.layouts import wan_settings
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import key_map, open_wan
from worldline.weights.checkpoint import save

TINY = WanTokenizerConfig(channels=4)
ODD = WanTokenizerConfig(
    channels=6,
    multipliers=(1, 1, 3),
    num_blocks=1,
    temporal_steps=(True, False),
    latent_channels=2,
    mean=(0.25, -1.0),
    std=(2.0, 0.5),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(config: WanTokenizerConfig) -> WanTokenizer:
    torch.manual_seed(0)
    model = WanTokenizer(config)
    draw_weights(model)
    return model.requires_grad_(False).eval()


def released(model: WanTokenizer) -> dict[str, Tensor]:
    return stored_tensors(model, key_map(model.config))


def save_vae(folder: Path, model: WanTokenizer, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(model, key_map(model.config, True))
    save(tensors, folder / WEIGHTS)
    settings = {**wan_settings(model.config), **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors


def same(path: Path, model: WanTokenizer) -> None:
    again = open_wan(path).read("cpu", torch.float32)
    assert again.config == model.config
    for (ours, a), (theirs, b) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert ours == theirs
        assert torch.equal(a, b)
        assert not b.requires_grad


@pytest.mark.parametrize("config", [TINY, ODD], ids=["as released", "odd"])
def test_a_vae_folder_is_opened_as_such_or_from_its_model(
    config: WanTokenizerConfig, tmp_path: Path
) -> None:
    model = build(config)
    save_vae(tmp_path / "vae", model)
    for path in (tmp_path, tmp_path / "vae", tmp_path / "vae" / WEIGHTS):
        same(path, model)


@pytest.mark.parametrize("name", ["tokenizer.pth", "Wan2.1_VAE.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_released_file_is_opened_as_such_or_in_its_folder(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    model = build(TINY)
    path = tmp_path / name
    torch.save(released(model), path, _use_new_zipfile_serialization=not legacy)
    for where in (path, tmp_path):
        same(where, model)


def test_a_released_file_in_bfloat16(tmp_path: Path) -> None:
    model = build(TINY).bfloat16()
    torch.save(released(model), tmp_path / "tokenizer.pth")
    same(tmp_path, model.float())


def test_the_released_file_wins_over_diffusers(tmp_path: Path) -> None:
    torch.save(released(build(TINY)), tmp_path / "tokenizer.pth")
    save_vae(tmp_path / "vae", build(ODD))
    assert open_wan(tmp_path).config == TINY


def test_statistics_of_other_latents_must_be_given(tmp_path: Path) -> None:
    """The released file says nothing of them."""
    torch.save(released(build(ODD)), tmp_path / "tokenizer.pth")
    with pytest.raises(CheckpointError, match=r"16 means .* 2 latent channels"):
        open_wan(tmp_path)


@pytest.mark.parametrize("absent", ["decoder.layers.0.conv1.weight", "encoder.conv_out.gamma"])
def test_tensors_that_do_not_fit_are_named(absent: str, tmp_path: Path) -> None:
    model = build(TINY)
    path = tmp_path / "tokenizer.pth"
    tensors = released(model)
    torch.save(tensors | {"encoder.conv3.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"encoder\.conv3\.weight"):
        open_wan(path)
    name = key_map(TINY).released(absent)
    torch.save({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        open_wan(path)
    torch.save(tensors | {name: torch.ones(3, 3)}, path)
    with pytest.raises(CheckpointError, match=f"wrong shape: {name}"):
        open_wan(path)


def test_what_is_no_such_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere holds no tokenizer"):
        open_wan(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.pth"):
        open_wan(tmp_path)
    (tmp_path / "tokenizer.pth.part").touch()
    with pytest.raises(CheckpointError, match="not finished"):
        open_wan(tmp_path)
    save({"encoder.conv1.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no tokenizer of Wan2\.1"):
        open_wan(tmp_path / "x.safetensors")
    # levels of different depth, as no such network has them
    tensors = released(build(TINY))
    tensors["encoder.downsamples.11.residual.2.weight"] = torch.ones(16, 16, 3, 3, 3)
    torch.save(tensors, tmp_path / "tokenizer.pth")
    with pytest.raises(CheckpointError, match=r"unknown: encoder\.downsamples\.11"):
        open_wan(tmp_path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"_class_name": "AutoencoderKLCosmos"}, "AutoencoderKLCosmos"),
        ({"is_residual": True}, "is_residual is True"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"latents_std": [1.0]}, "1 deviations do not fit 16"),
        ({"latents_mean": 3}, "not iterable"),
        ({"latents_mean": ["x"] * 16}, "must be real number"),
    ],
)
def test_a_config_that_is_not_of_the_tensors(
    change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    save_vae(tmp_path, build(TINY), **change)
    with pytest.raises(CheckpointError, match=word):
        open_wan(tmp_path)


def test_a_base_width_of_the_decoder_that_is_the_encoder_s(tmp_path: Path) -> None:
    save_vae(tmp_path, build(TINY), decoder_base_dim=TINY.channels, dropout=0.1)
    assert open_wan(tmp_path).config == TINY


def test_diffusers_without_a_config(tmp_path: Path) -> None:
    save(stored_tensors(build(TINY), key_map(build(TINY).config, True)), tmp_path / WEIGHTS)
    same(tmp_path, build(TINY))
