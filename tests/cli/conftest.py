"""Runs command lines in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import worldline.locate
from worldline.cli.main import main

from ..tiny_diffusion import TEXT2WORLD, VIDEO2WORLD

Run = Callable[..., Result]
Make = Callable[..., Result]
WITHOUT_PARTS = ("--disable_guardrail", "--disable_diffusion_decoder")
WITHOUT_UPSAMPLER = ("--disable_guardrail", "--disable_prompt_upsampler")


def run_words(words: Sequence[object]) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run() -> Run:
    """`run("models", "--json")`."""
    return lambda *words: run_words(words)


def _command(words: str, root: Path, tmp_path: Path, *flags: str) -> Make:
    def call(*more: object, checkpoint_dir: Path = root) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "--video_save_folder", tmp_path / "out")
        return run_words((*words.split(), *fixed, *flags, *more))

    return call


@pytest.fixture
def base(small_world: Path, tmp_path: Path) -> Make:
    """Run `worldline autoregressive base` on the small world; outputs go to tmp_path / "out"."""
    return _command("autoregressive base", small_world, tmp_path, *WITHOUT_PARTS)


@pytest.fixture
def base_with_decoder(whole_world: Path, tmp_path: Path) -> Make:
    """The same; the diffusion decoder is on."""
    return _command("autoregressive base", whole_world, tmp_path, "--disable_guardrail")


@pytest.fixture
def ar_video2world(whole_world: Path, tmp_path: Path) -> Make:
    """Run `worldline autoregressive video2world`; the diffusion decoder is on."""
    return _command("autoregressive video2world", whole_world, tmp_path, "--disable_guardrail")


@pytest.fixture
def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if tensor data of a model are read."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    # not of guardrails, which load before
    monkeypatch.setattr("worldline.text.encoder.load_into", read)
    monkeypatch.setattr("worldline.weights.networks.Network.read", read)


@pytest.fixture(scope="session")
def diffusion_worlds(tiny_diffusion: Path) -> Path:
    """A checkpoint folder with random weights; copy it before changing it."""
    return tiny_diffusion


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


@pytest.fixture
def text2world(diffusion_worlds: Path, tmp_path: Path) -> Make:
    """Run `worldline diffusion text2world` on the small world; outputs go to tmp_path / "out"."""
    return _command("diffusion text2world", diffusion_worlds, tmp_path, *WITHOUT_UPSAMPLER)


@pytest.fixture
def video2world(diffusion_worlds: Path, tmp_path: Path) -> Make:
    """Run `worldline diffusion video2world` on the small world."""
    return _command("diffusion video2world", diffusion_worlds, tmp_path, *WITHOUT_UPSAMPLER)
