"""`checkpoints inspect` recognises what it is shown, and says what does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from worldline.models.predict1_dit import weights as predict1_dit
from worldline.models.predict1_dit.model import DiT
from worldline.models.predict2_5_dit import weights as predict2_5_dit
from worldline.models.predict2_5_dit.model import FlowDiT
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save

from ..conftest import MODEL, TOKENIZER
from ..tiny_decoder import DECODER
from ..tiny_diffusion import TEXT2WORLD, VIDEO2WORLD
from ..tiny_diffusion import config as diffusion_config
from ..tiny_predict2_5 import CONFIG as FLOW_CONFIG
from ..tiny_predict2_5 import POST, PRE
from .conftest import Run


def read_all(path: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path)
    return {name: source.read(name).clone() for name in source.tensors}


def test_a_folder_of_models(run: Run, small_world: Path) -> None:
    result = run("checkpoints", "inspect", small_world)
    assert result.exit_code == 0, result.stderr
    for part in (
        str(small_world / MODEL),
        "Cosmos autoregressive base model, no released size: 2 layers, width 64",
        "vocabulary 64, latent 5 x 2 x 3",
        str(small_world / TOKENIZER),
        "Cosmos discrete video tokenizer, no released size: compression 8x16x16, vocabulary 64",
    ):
        assert part in result.stdout
    assert result.stdout.count("complete: every tensor fits") == 2


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (f"{MODEL}/model.pt", "format      pt"),
        (f"{MODEL}", "prefix      model."),
        (f"{TOKENIZER}/encoder.safetensors", "video tokenizer, encoder alone"),
        (f"{TOKENIZER}/decoder.safetensors", "video tokenizer, decoder alone"),
        (f"{TOKENIZER}", "values: bfloat16"),
    ],
)
def test_one(path: str, part: str, run: Run, small_world: Path) -> None:
    result = run("checkpoints", "inspect", small_world / path)
    assert result.exit_code == 0, result.stderr
    assert part in result.stdout
    assert "complete: every tensor fits" in result.stdout


def test_diffusion_models(run: Run, whole_world: Path, tiny_diffusion: Path) -> None:
    for folder, part in (
        (tiny_diffusion / TEXT2WORLD, "Cosmos diffusion Text2World model, no released size: 2 l"),
        (tiny_diffusion / VIDEO2WORLD / "model.pt", "Cosmos diffusion Video2World model, no rel"),
        (whole_world / DECODER, "Cosmos diffusion decoder of the autoregressive models, vocabul"),
    ):
        result = run("checkpoints", "inspect", folder)
        assert result.exit_code == 0, result.stderr
        assert part in result.stdout
        assert "complete: every tensor fits" in result.stdout


def test_a_repository_of_predict2_5(run: Run, tiny_predict2_5: Path) -> None:
    """Its transformers lie below its tokenizer; so they do where several repositories are shown."""
    folder = tiny_predict2_5 / Path(POST.repository).name
    for shown in (folder, tiny_predict2_5):
        result = run("checkpoints", "inspect", shown)
        assert result.exit_code == 0, result.stderr
        for model in (POST, PRE):
            assert f"{(folder / model.file).parent}\n" in result.stdout
        assert result.stdout.count("Cosmos-Predict2.5 model, no released size: 2 layers") == 2
        assert result.stdout.count("Wan video tokenizer, no released size: compression 4x8x8") == 1
        assert result.stdout.count("complete: every tensor fits") == 3


@pytest.mark.parametrize("flow", [False, True])
def test_diffusers_folders(flow: bool, run: Run, tmp_path: Path) -> None:
    config = FLOW_CONFIG if flow else diffusion_config(condition_mask=True)
    model, weights = (FlowDiT(config), predict2_5_dit) if flow else (DiT(config), predict1_dit)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    save(weights.diffusers_tensors(model), file)
    settings = file.parent / "config.json"
    settings.write_text(json.dumps(weights.diffusers_config(config)))
    for shown in (tmp_path, file.parent, file):
        result = run("checkpoints", "inspect", shown)
        assert result.exit_code == 0, result.stderr
        assert ("Cosmos-Predict2.5 model" if flow else "Video2World model") in result.stdout
        assert "complete: every tensor fits" in result.stdout
    settings.unlink()
    assert "has no rope_scale" in run("checkpoints", "inspect", file).stdout


def test_a_flow_model_that_lacks_a_tensor(run: Run, own_predict2_5: Path) -> None:
    path = own_predict2_5 / Path(POST.repository).name / POST.file
    tensors = read_all(path)
    del tensors["net.crossattn_proj.0.bias"]
    save(tensors, path)
    result = run("checkpoints", "inspect", path)
    assert result.exit_code == 0
    assert "1 missing: net.crossattn_proj.0.bias" in result.stdout


def test_inside_a_training_checkpoint(run: Run, small_world: Path, tmp_path: Path) -> None:
    tensors = read_all(small_world / MODEL / "model.pt")
    torch.save({"model": tensors, "optimizer": {}, "iteration": 3}, tmp_path / "iter_000000003.pt")
    result = run("checkpoints", "inspect", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert 'inside ["model"]' in result.stdout
    assert "optimizer" in result.stdout
    assert "no config.json" in result.stdout


def test_missing_and_too_much(run: Run, own_world: Path) -> None:
    path = own_world / MODEL / "model.pt"
    tensors = read_all(path)
    del tensors["model.layers.0.attention.wq.weight"]
    tensors["model.layers.0.attention.wq.bias"] = torch.zeros(2)
    tensors["model.layers.0.attention.wq.weight"] = torch.zeros(64, 64)
    del tensors["model.norm.weight"]
    save(tensors, path)
    result = run("checkpoints", "inspect", path)
    assert result.exit_code == 0
    assert "1 missing: model.norm.weight" in result.stdout
    assert "1 unknown: model.layers.0.attention.wq.bias" in result.stdout


def test_unknown(run: Run, tmp_path: Path) -> None:
    save({"unet.conv.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        assert "family      unknown (tensors such as unet.conv.weight)" in result.stdout
        assert "not recognised" in result.stdout


def test_no_checkpoint(run: Run, own_world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.pt"
    text.write_text("hello")
    cut = own_world / MODEL / "model.pt"
    os.truncate(cut, 1000)
    for path in (tmp_path / "nowhere", tmp_path / "empty", text, cut):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 2, path
        assert str(path) in result.stderr
    # the good ones beside a damaged one are still told
    result = run("checkpoints", "inspect", own_world)
    assert result.exit_code == 2
    assert "damaged" in result.stdout
    assert "complete: every tensor fits" in result.stdout
    assert "1 of 2 checkpoints cannot be read" in result.stderr
