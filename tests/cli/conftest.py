"""Runs command lines in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from worldline.cli import main

Run = Callable[..., Result]
Base = Callable[..., Result]
WITHOUT_PARTS = ("--disable_guardrail", "--disable_diffusion_decoder")


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
