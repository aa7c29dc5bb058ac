"""A folder of videos is judged: what is broken fails, what is sound does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny.clips import make_clips
from tiny.injected import DEGRADATIONS, inject_appearance, inject_collapse
from worldline.video.write import write_video

from ..conftest import moving
from .conftest import Run

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
GIVEN, FRAMES = 9, 18


@pytest.fixture
def evaluate(run: Run) -> Run:
    """`evaluate(folder, "--reference", other)`."""
    return lambda *words: run("evaluate", *words)


@pytest.fixture(scope="module")
def physics() -> np.ndarray:
    return make_clips(range(1_600_000, 1_600_010), FRAMES, 96, 144).frames.numpy()


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def verdicts(report: dict[str, Any]) -> dict[str, list[str]]:
    videos = report["videos"]
    return {video["name"]: [failure["kind"] for failure in video["failures"]] for video in videos}


def test_forty_broken_videos_fail(evaluate: Run, physics: np.ndarray, tmp_path: Path) -> None:
    for seed in range(20):
        for inject in (inject_collapse, inject_appearance):
            broken = inject(physics[seed % 10], seed, GIVEN)
            write_video(broken.frames, tmp_path / f"{broken.kind}_{seed:02d}.mp4", 25)
    result = evaluate(tmp_path, "--num_input_frames", GIVEN)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "evaluation.json")
    assert report["failure_rate"]["count"] == report["failure_rate"]["total"] == 40
    assert [name for name, found in verdicts(report).items() if not found] == []
    assert "failed: 100.0% (40 of 40; 95 % interval 91." in result.stdout
    with Image.open(tmp_path / "evaluation.png") as sheet:
        assert sheet.height > 40 * 96


def test_sound_still_and_slightly_damaged_videos_do_not_fail(
    evaluate: Run, physics: np.ndarray, tmp_path: Path
) -> None:
    for number, clip in enumerate(physics):
        write_video(clip, tmp_path / f"true_{number}.mp4", 25)
    write_video(physics[0, :1].repeat(FRAMES, 0), tmp_path / "still.mp4", 25)
    for name, degrade in DEGRADATIONS.items():
        write_video(degrade(physics[1], 3), tmp_path / f"{name}.mp4", 25)
    result = evaluate(tmp_path, "--num-input-frames", GIVEN)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "evaluation.json")
    assert [name for name, found in verdicts(report).items() if found] == []
    (still,) = (video for video in report["videos"] if video["name"] == "still.mp4")
    assert still["motion"] < 0.1  # of the codec


@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the real clips of ../shared/assets")
@pytest.mark.parametrize(
    ("folder", "pattern"), [("autoregressive", "output_*.mp4"), ("diffusion", "*_example.mp4")]
)
def test_real_outputs_are_sound(evaluate: Run, folder: str, pattern: str, tmp_path: Path) -> None:
    found = sorted((ASSETS / folder).glob(pattern))
    assert len(found) >= 2
    for path in found:
        shutil.copyfile(path, tmp_path / path.name)
    result = evaluate(tmp_path)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "evaluation.json")
    assert verdicts(report) == {path.name: [] for path in found}
    assert all(video["motion"] > 1 for video in report["videos"])


def test_against_a_reference(evaluate: Run, physics: np.ndarray, tmp_path: Path) -> None:
    made, true = tmp_path / "made", tmp_path / "true"
    write_video(physics[0], true / "a.mp4", 25)
    write_video(physics[1], true / "b.mp4", 25)
    write_video(DEGRADATIONS["block_noise"](physics[0], 1), made / "a.mp4", 25)
    shutil.copyfile(true / "b.mp4", made / "b.mp4")
    stored = {"request": {"num_input_frames": GIVEN}}
    (made / "a.json").write_text(json.dumps(stored))
    output = tmp_path / "results" / "noise.json"
    result = evaluate(made, "--reference", true, "--output", output)
    assert result.exit_code == 0, result.stderr
    a, b = report_of(output)["videos"]
    # independent shifts of 6 grey levels, and what the codec loses
    assert a["psnr"] == pytest.approx(20 * np.log10(255 / 6), abs=1.5)
    assert 0.5 < a["ssim"] < 1
    assert (a["num_input_frames"], a["compared_frames"]) == (GIVEN, FRAMES - GIVEN)
    assert a["flicker"] > a["reference_flicker"]
    assert (b["num_input_frames"], b["psnr"], b["ssim"]) == (0, None, 1)
    assert "a.mp4: sound; 18 frames, motion" in result.stdout
    assert output.with_suffix(".png").exists()
    assert report_of(made / "a.json") == stored
    assert sorted(path.name for path in made.iterdir()) == ["a.json", "a.mp4", "b.mp4"]


def test_what_cannot_be_read_does_not_count(
    evaluate: Run, physics: np.ndarray, tmp_path: Path
) -> None:
    write_video(physics[0], tmp_path / "good.mp4", 25)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").touch()
    result = evaluate(tmp_path)
    assert result.exit_code == 1
    assert "2 of 3 videos" in result.stderr
    assert f"{tmp_path / 'empty.mp4'} is empty" in result.stderr
    report = report_of(tmp_path / "evaluation.json")
    assert verdicts(report) == {"good.mp4": []}
    assert report["unreadable"].keys() == {"cut.mp4", "empty.mp4"}
    assert "0 of 1" in result.stdout

    (tmp_path / "good.mp4").unlink()
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "evaluation.png").unlink()
    result = evaluate(tmp_path)
    assert result.exit_code == 2
    assert "none of 2 videos" in result.stderr
    assert "cut.mp4" in result.stderr
    assert "empty.mp4" in result.stderr
    assert not (tmp_path / "evaluation.json").exists()


def test_wrong_input_is_refused_before_any_work(evaluate: Run, tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_video(moving(), made / "a.mp4", 25)
    (made / "a.json").write_text("{}")
    (made / "picture.png").write_bytes(b"mine")
    (tmp_path / "file").touch()
    cases: tuple[tuple[tuple[object, ...], str], ...] = (
        ((tmp_path / "absent",), "holds no videos"),
        ((tmp_path, "--reference", tmp_path / "absent"), "holds no videos"),
        ((made, "--num_input_frames", 12), "has 12 frames, 12 of them input"),
        ((made, "--num_input_frames", -1), "num_input_frames"),
        ((made, "--output", tmp_path / "a.txt"), "must end in .json"),
        ((made, "--output", made / "a.json"), "a.json: it is an input"),
        ((made, "--output", made / "picture.json"), "would replace"),
        ((made, "--output", tmp_path / "file" / "a.json"), "cannot be written"),
    )
    for words, message in cases:
        result = evaluate(*words)
        assert result.exit_code == 2, words
        assert message in result.stderr, words
        assert result.stdout == ""
    assert sorted(path.name for path in made.iterdir()) == ["a.json", "a.mp4", "picture.png"]
    assert (made / "a.json").read_text() == "{}"


def test_a_second_run_replaces_the_first(evaluate: Run, tmp_path: Path) -> None:
    write_video(moving(), tmp_path / "a.mp4", 25)
    assert evaluate(tmp_path).exit_code == 0
    (tmp_path / "evaluation.json").write_text("old")
    assert evaluate(tmp_path).exit_code == 0
    assert report_of(tmp_path / "evaluation.json")["failure_rate"]["total"] == 1


def test_videos_are_known_by_their_contents(evaluate: Run, tmp_path: Path) -> None:
    write_video(moving(), tmp_path / "a.mkv", 10)
    (tmp_path / "a.mkv").rename(tmp_path / "a")
    write_video(moving(1), tmp_path / "one.mp4", 10)
    Image.fromarray(moving(1)[0]).save(tmp_path / "b.mp4", format="PNG")  # so it is no video
    os.mkfifo(tmp_path / "c.mp4")
    broken = tmp_path / "d.mp4"
    write_video(moving(), broken, 10)
    broken.write_bytes(broken.read_bytes().replace(b"avc1", b"xxxx"))
    result = evaluate(tmp_path)
    assert result.exit_code == 1
    report = report_of(tmp_path / "evaluation.json")
    assert sorted(verdicts(report)) == ["a", "one.mp4"]
    assert sorted(report["unreadable"]) == ["c.mp4", "d.mp4"]
    assert "2 of 4" in result.stderr
    assert report["videos"][1]["motion"] is None


def test_a_folder_that_is_not_there(evaluate: Run, tmp_path: Path) -> None:
    result = evaluate(tmp_path / "absent")
    assert result.exit_code == 2
    assert f"{tmp_path / 'absent'} holds no videos: no such" in result.stderr
