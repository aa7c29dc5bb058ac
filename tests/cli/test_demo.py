"""The demo leaves a folder worth looking at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldline.locate
from tiny.clips import make_clips
from worldline.cli.demo import CLIP, OTHER_WAYS, WAYS, Way
from worldline.evaluate.metrics import psnr
from worldline.video.read import probe, read_video

from .conftest import Run


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def autoregressive(whole_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle(monkeypatch, whole_world, "output", "prompted")


def bundle(monkeypatch: pytest.MonkeyPatch, root: Path, *names: str) -> None:
    """Make the demo show the ways whose names begin so, with the worlds of another folder."""

    def chosen(ways: tuple[Way, ...]) -> tuple[Way, ...]:
        return tuple(way for way in ways if way.name.startswith(names))

    monkeypatch.setattr(worldline.locate, "BUNDLED", root)
    monkeypatch.setattr("worldline.cli.demo.WAYS", chosen(WAYS))
    monkeypatch.setattr("worldline.cli.demo.OTHER_WAYS", chosen(OTHER_WAYS))


def reports(folder: Path) -> dict[str, dict[str, object]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_the_clip_is_the_one_that_tiny_draws() -> None:
    truth = make_clips([1_000_000])
    clip = read_video(CLIP)
    assert (clip.fps, clip.frames.shape) == (25, (33, 128, 192, 3))
    assert psnr(clip.frames, truth.frames[0].numpy()) > 35
    assert json.loads(CLIP.with_name("captions.json").read_text()) == {CLIP.name: truth.captions[0]}
    assert sum(path.stat().st_size for path in CLIP.parent.iterdir()) < 40_000


def test_a_bundled_world_beats_repeating(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network as it ships: what follows the input frames is nearer to the truth than they are."""
    bundle(monkeypatch, worldline.locate.BUNDLED, "diffusion")
    monkeypatch.setattr("worldline.cli.demo.OTHER_WAYS", ())
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    truth, made = read_video(CLIP).frames, read_video(tmp_path / "diffusion.mp4").frames
    assert psnr(made[9:], truth[9:]) > psnr(truth[8:9].repeat(24, axis=0), truth[9:]) + 1
    assert " dB PSNR, frame 8 repeated 20." in result.stdout
    assert len(result.output.splitlines()) <= 20


@pytest.mark.usefixtures("autoregressive")
def test_one_video_a_world_and_one_picture(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--output", tmp_path / "demo")
    assert result.exit_code == 0, result.stderr
    names = {"input.mp4", "output.mp4", "output.json", "contact_sheet.png"}
    assert {path.name for path in (tmp_path / "demo").iterdir()} == names
    assert probe(tmp_path / "demo" / "input.mp4").frames == 9
    assert probe(tmp_path / "demo" / "output.mp4").frames == 33
    with Image.open(tmp_path / "demo" / "contact_sheet.png") as sheet:
        assert sheet.width > 9 * 192
    assert result.stdout.splitlines()[-1] == f"open {tmp_path / 'demo' / 'contact_sheet.png'}"


@pytest.mark.usefixtures("autoregressive")
def test_all_ways_of_decoding(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--all", "--output", tmp_path, "--seed", 2)
    assert result.exit_code == 0, result.stderr
    made = reports(tmp_path)
    assert made.keys() == {"output", "output_discrete", "prompted", "prompted_discrete"}
    for name, report in made.items():
        assert report["request"]["seed"] == 2
        assert (report["diffusion_decoder"] is None) == name.endswith("_discrete")
        assert bool(report["request"]["prompt"]) == name.startswith("prompted")
        fine = read_video(tmp_path / f"{name.removesuffix('_discrete')}.mp4").frames
        frames = read_video(tmp_path / f"{name}.mp4").frames
        assert np.array_equal(frames, fine) != name.endswith("_discrete")


@pytest.mark.usefixtures("bundled_diffusion")
def test_worlds_of_prompts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle(monkeypatch, worldline.locate.BUNDLED, "diffusion")
    result = run("demo", "--all", "--output", tmp_path, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    requests = {stem: report["request"] for stem, report in reports(tmp_path).items()}
    assert {stem: request["num_input_frames"] for stem, request in requests.items()} == {
        "diffusion": 9,
        "diffusion_image2world": 1,
        "diffusion_text2world": 0,
    }
    captions = json.loads(CLIP.with_name("captions.json").read_text())
    assert {request["prompt"] for request in requests.values()} == {captions[CLIP.name]}


def test_wrong_options_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("demo", "--output", tmp_path / "file" / "demo")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert run("demo", "--seed", "-1").exit_code == 2
