"""A folder's scores are those of the whole clips, though each was read frame by frame."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny.clips import make_clips
from tiny.injected import inject_appearance, inject_collapse
from worldline.evaluate.failures import find_failures
from worldline.evaluate.folder import (
    Comparison,
    Score,
    Sheet,
    Strip,
    as_json,
    medians,
    rate,
    score_video,
)
from worldline.evaluate.metrics import flicker, motion, psnr, ssim
from worldline.evaluate.tasks import Task
from worldline.video.read import read_video

from .test_tasks import write

GIVEN = 9


@pytest.fixture(scope="module")
def physics() -> np.ndarray:
    return make_clips(range(1_700_000, 1_700_003), 20, 64, 96).frames.numpy()


@pytest.mark.parametrize("inject", [None, inject_collapse, inject_appearance])
def test_failures_are_those_of_the_whole_clip(
    physics: np.ndarray, inject: object, tmp_path: Path
) -> None:
    frames = inject(physics[0], 3, GIVEN).frames if callable(inject) else physics[0]
    path = write(tmp_path / "a.mp4", frames)
    strip = score_video(Task("a.mp4", path, GIVEN))
    expected = find_failures(read_video(path).frames, GIVEN)
    assert list(strip.score.failures) == expected
    assert bool(expected) == callable(inject)
    assert {failure.frame for failure in expected} <= strip.pictures.keys()


@pytest.mark.parametrize("given", [0, 1, GIVEN])
def test_measures_are_those_of_the_frames_that_were_not_given(
    physics: np.ndarray, given: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", physics[0])
    other = write(tmp_path / "b.mp4", physics[1, :15])
    score = score_video(Task("a.mp4", path, given, other, "b.mp4")).score
    made, true = read_video(path).frames, read_video(other).frames
    begin = max(0, given - 1)
    assert (score.frames, score.height, score.width) == (20, 64, 96)
    assert score.motion == pytest.approx(motion(made[begin:]))
    assert score.flicker == pytest.approx(flicker(made[begin:]))
    compared = score.comparison
    assert compared is not None
    assert compared.frames == 15 - given
    assert compared.psnr == pytest.approx(psnr(made[given:15], true[given:]))
    assert compared.ssim == pytest.approx(ssim(made[given:15], true[given:]))
    assert compared.motion == pytest.approx(motion(true[begin:]))
    assert compared.flicker == pytest.approx(flicker(true[begin:]))


def test_given_frames_are_not_judged(physics: np.ndarray, tmp_path: Path) -> None:
    frames = physics[0].copy()
    frames[5:] = physics[1, 5:]
    frames[3:, 16:48, 32:64] = (250, 20, 20)
    path = write(tmp_path / "a.mp4", frames)
    assert score_video(Task("a.mp4", path, 1)).score.failures
    assert not score_video(Task("a.mp4", path, 17)).score.failures


def test_a_blank_video_has_collapsed_unless_it_was_given(tmp_path: Path) -> None:
    blank = np.full((12, 64, 96, 3), 90, np.uint8)
    path = write(tmp_path / "a.mp4", blank)
    (failure,) = score_video(Task("a.mp4", path, 0)).score.failures
    assert failure.kind == "collapse"
    assert not score_video(Task("a.mp4", path, 1)).score.failures


def test_a_still_video_is_sound(physics: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", physics[0, :1].repeat(20, 0))
    score = score_video(Task("a.mp4", path, 0)).score
    assert score.verdict == "sound"
    assert score.motion < 0.1  # of the codec


def make_score(name: str, psnr_value: float | None, *, failed: bool = False) -> Score:
    failures = tuple(find_failures(_collapsed(), 2)) if failed else ()
    comparison = None
    if psnr_value is not None:
        comparison = Comparison(
            reference=name, frames=3, psnr=psnr_value, ssim=0.5, motion=2.0, flicker=1.0
        )
    return Score(
        name=name,
        frames=12,
        height=48,
        width=64,
        num_input_frames=2,
        failures=failures,
        motion=4.0,
        flicker=3.0,
        comparison=comparison,
    )


def _collapsed() -> np.ndarray:
    frames = np.random.RandomState(0).randint(0, 256, (1, 6, 8, 3)).repeat(8, 1).repeat(8, 2)
    frames = frames.repeat(12, 0).astype(np.uint8)
    frames[6:] = 120
    return frames


def test_a_summary_counts_failures_and_takes_the_middle() -> None:
    scores = [make_score("a", 20.0), make_score("b", 30.0, failed=True), make_score("c", None)]
    assert (rate(scores).failed.count, rate(scores).failed.total) == (1, 3)
    middle = medians(scores)
    assert (middle["motion"], middle["psnr"], middle["reference_motion"]) == (4.0, 25.0, 2.0)
    assert "psnr" not in medians(scores[2:])


def test_a_report_is_json_even_of_equal_videos() -> None:
    report = as_json([make_score("a", math.inf), make_score("b", None)], {"c": "damaged"})
    told = json.loads(json.dumps(report, allow_nan=False))
    assert told["videos"][0]["comparison"]["psnr"] is None
    assert told["medians"]["psnr"] is None
    assert told["videos"][1]["comparison"] is None
    assert told["unreadable"] == {"c": "damaged"}
    assert told["failure_rate"]["total"] == 2


def test_a_sheet_stays_small_and_shows_what_failed(tmp_path: Path) -> None:
    picture = np.full((48, 64, 3), 90, np.uint8)
    sheet = Sheet()
    for number in range(100):
        score = make_score(f"naïve {number}", None, failed=number == 99)
        sheet.add(Strip(score, dict.fromkeys((0, 6, 11), picture)))
    sheet.save(tmp_path / "sheet.png")
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert image.shape[0] < 60 * (48 + 40) + 40
    red = (image == (255, 0, 0)).all(-1)
    assert red[:80].any()  # of the failed one, which is on top
    assert not red[100:].any()
