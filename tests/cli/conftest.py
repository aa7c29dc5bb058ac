"""Runs command lines in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import worldline.loading
import worldline.locate
from worldline.cli import main

from ..tiny_diffusion import TEXT2WORLD, VIDEO2WORLD, make_tiny_diffusion

Run = Callable[..., Result]
Base = Callable[..., Result]
Make = Callable[..., Result]
WITHOUT_PARTS = ("--disable_guardrail", "--disable_diffusion_decoder")
WITHOUT_UPSAMPLER = ("--disable_guardrail", "--disable_prompt_upsampler")


def run_words(words: Sequence[object]) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run() -> Run:
    """`run("models", "--json")`."""
    return lambda *words: run_words(words)


@pytest.fixture
def base(small_world: Path, tmp_path: Path) -> Base:
    """Run `worldline autoregressive base` on the small world; outputs go to tmp_path / "out"."""

    def call(*words: object, checkpoint_dir: Path = small_world) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "--video_save_folder", tmp_path / "out")
        return run_words(("autoregressive", "base", *fixed, *WITHOUT_PARTS, *words))

    return call


@pytest.fixture
def ar_video2world(whole_world: Path, tmp_path: Path) -> Make:
    """Run `worldline autoregressive video2world` likewise; the diffusion decoder is on."""

    def call(*words: object, checkpoint_dir: Path = whole_world) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "--video_save_folder", tmp_path / "out")
        words = ("autoregressive", "video2world", *fixed, "--disable_guardrail", *words)
        return run_words(words)

    return call


@pytest.fixture
def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if tensor data are read."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for module in ("loading.parts", "text.encoder"):
        monkeypatch.setattr(f"worldline.{module}.load_into", read)


@pytest.fixture(scope="session")
def diffusion_worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights; copy it before changing it."""
    return make_tiny_diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture
def own_worlds(diffusion_worlds: Path, tmp_path: Path) -> Path:
    """A copy of `diffusion_worlds` that a test may break."""
    return Path(shutil.copytree(diffusion_worlds, tmp_path / "worlds"))


@pytest.fixture
def bundled_diffusion(own_worlds: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ship the small world, and it alone, in place of the bundled ones; return its settings."""
    monkeypatch.setattr(worldline.locate, "BUNDLED", own_worlds)
    shutil.rmtree(own_worlds / TEXT2WORLD)
    path = own_worlds / VIDEO2WORLD / "config.json"
    settings: dict[str, Any] = {**json.loads(path.read_text()), "text2world": True}
    path.write_text(json.dumps(settings))
    return settings


def _diffusion(name: str, root: Path, tmp_path: Path) -> Make:
    def call(*words: object, checkpoint_dir: Path = root) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "--video_save_folder", tmp_path / "out")
        return run_words(("diffusion", name, *fixed, *WITHOUT_UPSAMPLER, *words))

    return call


@pytest.fixture
def text2world(diffusion_worlds: Path, tmp_path: Path) -> Make:
    """Run `worldline diffusion text2world` on the small world; outputs go to tmp_path / "out"."""
    return _diffusion("text2world", diffusion_worlds, tmp_path)


@pytest.fixture
def video2world(diffusion_worlds: Path, tmp_path: Path) -> Make:
    """Run `worldline diffusion video2world` likewise."""
    return _diffusion("video2world", diffusion_worlds, tmp_path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep embeddings of random weights out of the user's cache."""
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
