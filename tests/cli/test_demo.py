"""The demo leaves a folder worth looking at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import worldline.locate
from worldline.pipelines.autoregressive import Progress, _Drawing
from worldline.video.read import probe

from ..conftest import MODEL, frames_of
from .conftest import Run


@pytest.fixture
def bundled(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worldline.locate, "BUNDLED", small_world)


@pytest.mark.usefixtures("bundled")
def test_demo(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--output", out)
    assert result.exit_code == 0, result.stderr
    names = {"input.mp4", "output.mp4", "output.json", "side_by_side.mp4", "contact_sheet.png"}
    assert {path.name for path in out.iterdir()} == names
    assert probe(out / "input.mp4", kind="video").frames == 9
    size = probe(out / "output.mp4", kind="video")
    both = probe(out / "side_by_side.mp4", kind="video")
    assert size.frames == both.frames == 33
    assert both.width > 4 * size.width
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * size.width
    assert json.loads((out / "output.json").read_text())["model"] == f"tiny-{MODEL}"
    assert "frames 10-33 against the true continuation: " in result.stdout
    assert str(out / "side_by_side.mp4") in result.stdout


@pytest.mark.usefixtures("bundled")
def test_demo_has_a_seed(run: Run, tmp_path: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        assert run("demo", "--output", tmp_path, "--seed", seed).exit_code == 0
        made.append(frames_of(tmp_path / "output.mp4"))
    assert made[0] == made[1] != made[2]


BOTH_FILES = {
    "output.mp4",
    "output.json",
    "output_discrete.mp4",
    "output_discrete.json",
    "side_by_side.mp4",
    "contact_sheet.png",
}
PROMPTED_FILES = {
    "input.mp4",
    *(f"prompted_{name}" for name in (*BOTH_FILES, "output.txt", "output_discrete.txt")),
}


def test_demo_of_both_decodings(
    run: Run, whole_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decoder and Video2World model are bundled, they are shown, on the same tokens."""
    monkeypatch.setattr(worldline.locate, "BUNDLED", whole_world)
    drawn: list[Tensor] = []
    draw = _Drawing.run

    def spy(self: _Drawing, *given: Any) -> Generator[Progress, None, Tensor]:
        drawn.append((yield from draw(self, *given)))
        return drawn[-1]

    monkeypatch.setattr(_Drawing, "run", spy)
    out = tmp_path / "demo"
    result = run("demo", "--output", out, "--seed", 2)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir()} == BOTH_FILES | PROMPTED_FILES
    base, base_again, prompted, prompted_again = drawn
    assert torch.equal(base, base_again)
    assert torch.equal(prompted, prompted_again)
    for prefix in ("", "prompted_"):
        decodings = [f"{prefix}output{end}" for end in ("", "_discrete")]
        reports = [json.loads((out / f"{name}.json").read_text()) for name in decodings]
        assert [report["diffusion_decoder"] is None for report in reports] == [False, True]
        assert {report["request"]["seed"] for report in reports} == {2}
        assert ("prompt" in reports[0]["request"]) == bool(prefix)
        assert reports[0]["frames_sha256"] != reports[1]["frames_sha256"]
        size = probe(out / f"{prefix}output.mp4", kind="video")
        assert probe(out / f"{prefix}side_by_side.mp4", kind="video").width > 6 * size.width
        with Image.open(out / f"{prefix}contact_sheet.png") as sheet:
            assert sheet.height > 3 * size.height
    assert result.stdout.count("dB PSNR decoded by the tokenizer, ") == 2

    shutil.rmtree(out)
    assert run("demo", "--output", out, "--kind", "autoregressive-video2world").exit_code == 0
    assert {path.name for path in out.iterdir()} == PROMPTED_FILES


DIFFUSION_FILES = {
    *(f"{n}2world.{end}" for n in ("text", "image", "video") for end in ("mp4", "txt", "json")),
    "diffusion_sheet.png",
}


@pytest.mark.usefixtures("bundled_diffusion")
def test_demo_of_diffusion(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--output", out, "--kind", "diffusion", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir()} == DIFFUSION_FILES
    size = probe(out / "text2world.mp4", kind="video")
    with Image.open(out / "diffusion_sheet.png") as sheet:
        assert sheet.height > 4 * size.height
    reports = [json.loads((out / f"{n}2world.json").read_text()) for n in ("text", "image")]
    assert [report["request"]["num_input_frames"] for report in reports] == [0, 1]
    assert {report["request"]["seed"] for report in reports} == {3}
    assert str(out / "diffusion_sheet.png") in result.stdout
    # what is bundled is shown
    for words in ((), ("--kind", "all")):
        shutil.rmtree(out)
        assert run("demo", "--output", out, *words).exit_code == 0
        assert {path.name for path in out.iterdir()} == DIFFUSION_FILES
    result = run("demo", "--output", out, "--kind", "autoregressive")
    assert result.exit_code == 2
    assert "no bundled model tiny-Cosmos-Predict1-4B" in result.stderr


def test_demo_without_a_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("demo", "--output", tmp_path / "file" / "demo")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert run("demo", "--seed", "-1").exit_code == 2
