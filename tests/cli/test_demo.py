"""The demo leaves a folder worth looking at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import worldline.places
from worldline.video.read import probe

from ..conftest import MODEL
from .conftest import Run


@pytest.fixture
def bundled(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worldline.places, "BUNDLED", small_world)


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
        made.append((tmp_path / "output.mp4").read_bytes())
    assert made[0] == made[1] != made[2]


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
    shutil.rmtree(out)
    assert run("demo", "--output", out).exit_code == 0
    assert {path.name for path in out.iterdir()} == DIFFUSION_FILES
    result = run("demo", "--output", out, "--kind", "all")
    assert result.exit_code == 2
    assert "no bundled model tiny-Cosmos-Predict1-4B" in result.stderr


def test_demo_without_a_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("demo", "--output", tmp_path / "file" / "demo")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert run("demo", "--seed", "-1").exit_code == 2
