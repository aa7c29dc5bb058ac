"""Which files a name leads to, and how much memory they will need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import worldline
from worldline import loading
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.models.predict1_ar.model import PRESETS, ARTransformer, ARTransformerConfig
from worldline.report import Recorder
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS

from .conftest import MODEL, SMALL_TOKENIZER, SMALL_TRANSFORMER, TOKENIZER

OLD_MODEL = "Cosmos-1.0-Autoregressive-4B"
OLD_TOKENIZER = "Cosmos-1.0-Tokenizer-DV8x16x16"


def test_by_name_by_path_and_by_file(small_world: Path) -> None:
    for name in (MODEL, small_world / MODEL, small_world / MODEL / "model.pt"):
        files = loading.find_autoregressive(name, small_world)
        assert files.folder == small_world / MODEL
        assert files.config == SMALL_TRANSFORMER
        assert files.tokenizer_config.vocabulary == SMALL_TOKENIZER.vocabulary
        assert not files.bundled
    # the tokenizer is found beside the model, wherever --checkpoint_dir points
    assert loading.find_autoregressive(small_world / MODEL, "nowhere").folder.name == MODEL


def test_both_generations(own_world: Path) -> None:
    (own_world / MODEL).rename(own_world / OLD_MODEL)
    files = loading.find_autoregressive(OLD_MODEL, own_world)
    assert files.tokenizer.path.name == TOKENIZER
    shutil.copytree(own_world / TOKENIZER, own_world / OLD_TOKENIZER)
    files = loading.find_autoregressive(OLD_MODEL, own_world)
    assert files.tokenizer.path.name == OLD_TOKENIZER


def test_a_folder_s_name_is_only_a_hint(own_world: Path) -> None:
    renamed = own_world / "my_post-trained_12B"
    (own_world / MODEL).rename(renamed)
    (renamed / "model.pt").rename(renamed / "iter_000000100.pt")
    files = loading.find_autoregressive(renamed.name, own_world)
    assert files.config == SMALL_TRANSFORMER


def test_the_stored_latent_shape_is_used(own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [5, 4, 2]}))
    files = loading.find_autoregressive(MODEL, own_world)
    grid = files.config.grid
    assert (grid.frames, grid.height, grid.width) == (5, 4, 2)


def test_bundled(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED", small_world)
    assert loading.bundled_names() == [f"tiny-{MODEL}"]
    assert loading.find_autoregressive(f"tiny-{MODEL}", "nowhere").bundled
    with pytest.raises(CheckpointError, match=rf"no bundled model tiny-x; there are: tiny-{MODEL}"):
        loading.find_autoregressive("tiny-x", "nowhere")
    monkeypatch.setattr(loading, "BUNDLED", small_world / "nowhere")
    assert loading.bundled_names() == []


def test_what_is_there_is_listed(small_world: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds: {MODEL}, {TOKENIZER}"):
        loading.find_autoregressive("Cosmos-Predict1-12B", small_world)


def test_video2world_is_refused(own_world: Path) -> None:
    from worldline.models.predict1_ar.weights import KEYS, write_settings
    from worldline.weights.write import save

    config = ARTransformerConfig(
        **{**vars(SMALL_TRANSFORMER), "context_width": 32, "leading_tokens": 1}
    )
    model = ARTransformer(config)
    tensors = {KEYS.released(n): p.detach() for n, p in model.named_parameters()}
    save(tensors, own_world / MODEL / "model.pt")
    (own_world / MODEL / "config.json").write_text(json.dumps(write_settings(config)))
    with pytest.raises(CheckpointError, match="is a Video2World model"):
        loading.find_autoregressive(MODEL, own_world)


def test_plans() -> None:
    """Offloading lowers the need, and a larger model needs more."""
    plan = loading.plan_autoregressive
    tokenizer = TOKENIZERS["DV8x16x16"]
    need = {
        size: plan(PRESETS[size], tokenizer, dtype=torch.bfloat16).peak for size in ("4B", "12B")
    }
    assert 8e9 < need["4B"] <= 13e9
    assert 23e9 < need["12B"] <= 29e9
    for size in need:
        whole = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16)
        for flag in ("offload_tokenizer", "offload_ar_model"):
            less = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16, **{flag: True})
            assert less.peak <= whole.peak
        less = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16, offload_ar_model=True)
        assert less.decode < whole.decode


def test_too_little_memory(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 8_000_000_000))
    files = loading.find_autoregressive(MODEL, small_world)
    device = torch.device("cuda")
    with pytest.raises(InsufficientMemoryError, match=r"needs about .* 0\.0 of 8\.0 GB are free"):
        loading.load_autoregressive(files, device, torch.bfloat16, Recorder(torch.device("cpu")))


def test_devices() -> None:
    assert loading.choose_device("cpu") == torch.device("cpu")
    for wrong in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"no device {wrong} here"):
            loading.choose_device(wrong)
    assert loading.compute_dtype(torch.device("cpu")) == torch.float32
    assert loading.compute_dtype(torch.device("cuda")) == torch.bfloat16


def test_offloading_changes_no_video(small_world: Path, clip: Path) -> None:
    videos = []
    for offload in (False, True):
        world = worldline.load(
            MODEL,
            small_world,
            disable_guardrail=True,
            disable_diffusion_decoder=True,
            offload_ar_model=offload,
            offload_tokenizer=offload,
        )
        videos.append(world.generate(clip).frames)
    assert np.array_equal(videos[0], videos[1])
