"""Failures and sound clips where the answer is known, and the failure rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny.clips import make_clips
from tiny.injected import (
    DEGRADATIONS,
    inject_appearance,
    inject_collapse,
    relight,
)
from worldline.evaluate import failures
from worldline.evaluate.failures import DETECTORS, Rate, failure_rate, find_failures
from worldline.video.read import read_video

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/failure_detectors.json"
ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
SEEDS = range(1_500_000, 1_500_002)


@pytest.fixture(scope="module")
def physics() -> np.ndarray:
    return make_clips(SEEDS).frames.numpy()


@pytest.fixture(scope="module")
def scenery() -> np.ndarray:
    """A textured picture, wider than the clips that look at a part of it: (96, 400, 3)."""
    coarse = torch.from_numpy(np.random.RandomState(0).rand(1, 3, 12, 50).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


def kinds(clip: np.ndarray, num_input_frames: int = 9) -> list[str]:
    return [failure.kind for failure in find_failures(clip, num_input_frames)]


@pytest.mark.parametrize("num_input_frames", [1, 9])
def test_true_physics_is_sound(physics: np.ndarray, num_input_frames: int) -> None:
    assert [kinds(clip, num_input_frames) for clip in physics[:2]] == [[]] * 2


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degraded_clip_is_sound(physics: np.ndarray, name: str) -> None:
    assert kinds(DEGRADATIONS[name](physics[0], 3)) == []


def test_a_still_video_is_sound(physics: np.ndarray) -> None:
    assert kinds(physics[0, :1].repeat(33, 0)) == []


def test_a_camera_that_pans_is_sound(scenery: np.ndarray) -> None:
    clip = np.stack([scenery[:, 6 * step : 6 * step + 144] for step in range(33)])
    assert kinds(clip) == []


def test_a_large_object_that_comes_in_over_the_border_is_sound(scenery: np.ndarray) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    for step in range(12, 33):
        clip[step, 30:75, : min(144, 5 * (step - 11))] = (250, 20, 20)
    assert kinds(clip) == []


def test_a_change_of_light_is_sound(scenery: np.ndarray) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    assert kinds(relight(clip, 1)) == []
    darkened = clip.copy()
    darkened[15:] //= 3
    assert kinds(darkened) == []


def test_a_small_artifact_is_sound(scenery: np.ndarray) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    clip[15:, 40:54, 60:78] = (250, 20, 20)  # 1.8 % of the picture
    assert kinds(clip) == []


@pytest.mark.parametrize("num_input_frames", [1, 9])
def test_a_large_object_from_nowhere_is_found(scenery: np.ndarray, num_input_frames: int) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    clip[15:, 30:66, 50:98] = (250, 20, 20)  # an eighth of the picture
    (failure,) = find_failures(clip, num_input_frames)
    assert failure.kind == "appearance"
    assert 15 <= failure.frame < 22
    assert failure.score == pytest.approx(0.125, abs=0.04)
    assert "50% from the left" in failure.detail


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_a_collapse_is_found(scenery: np.ndarray, share: float) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    clip[20:, :, : round(share * 144)] = (90, 80, 120)
    (failure,) = find_failures(clip)
    assert failure.kind == "collapse"
    assert failure.frame >= 20
    assert failure.score == pytest.approx(share, abs=0.05)


def test_injected_failures_are_found(physics: np.ndarray) -> None:
    for seed, clip in zip(SEEDS, physics, strict=True):
        assert "appearance" in kinds(inject_appearance(clip, seed).frames)
        # On a plain wall a collapse may be called an appearance.
        assert kinds(inject_collapse(clip, seed).frames)


def test_input_frames_are_taken_for_sound(scenery: np.ndarray) -> None:
    clip = scenery[None, :, :144].repeat(33, 0)
    clip[4:, 30:66, 50:98] = (250, 20, 20)
    assert kinds(clip, num_input_frames=11) == []


def test_the_size_of_a_video_does_not_matter(scenery: np.ndarray) -> None:
    clip = scenery[None, :, :144].repeat(20, 0)
    clip[15:, 30:66, 50:98] = (250, 20, 20)
    small, large = find_failures(clip), find_failures(clip.repeat(4, 1).repeat(4, 2))
    assert small[0].score == pytest.approx(large[0].score, abs=0.01)


def test_the_input_stays_as_it_was(physics: np.ndarray) -> None:
    clip = physics[0].copy()
    assert find_failures(torch.from_numpy(clip)) == find_failures(clip)
    assert (clip == physics[0]).all()


@pytest.mark.parametrize(
    "clip",
    [np.zeros((9, 32, 32, 3), np.float32), np.zeros((9, 32, 32), np.uint8)],
    ids=["float", "grey"],
)
def test_other_arrays_are_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        find_failures(clip)


@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the real clips of ../shared/assets")
@pytest.mark.parametrize(
    "name", ["output_from_image_input_12b.mp4", "output_from_video_input_13b.mp4"]
)
def test_real_outputs_are_sound(name: str) -> None:
    assert kinds(read_video(ASSETS / "autoregressive" / name).frames) == []


def test_one_thread_and_then_as_many_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small pictures, threads that wait for each other cost far more than they save."""
    seen: list[int] = []

    def spy(clip: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setattr(failures, "reduce", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError):
            find_failures(np.zeros((2, 16, 16, 3), np.uint8), 1)
        assert seen == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_wilson_interval_of_none_in_ten() -> None:
    """At 0 of n the upper end is z^2 / (n + z^2)."""
    z = 1.959964
    low, high = Rate(0, 10).interval
    assert low == 0
    assert high == pytest.approx(z**2 / (10 + z**2))


def test_wilson_ends_solve_their_equation() -> None:
    """The ends are the rates p from which the count lies exactly z standard deviations away."""
    rate = Rate(7, 50)
    for p in rate.interval:
        assert abs(rate.value - p) / (p * (1 - p) / 50) ** 0.5 == pytest.approx(1.959964)


def test_failed_clips_are_counted(scenery: np.ndarray) -> None:
    sound = scenery[None, :, :144].repeat(12, 0)
    flat = sound.copy()
    flat[10:] = 128
    result = failure_rate([find_failures(clip) for clip in (sound, flat, sound)])
    assert result.failed == Rate(1, 3)
    assert result.kinds == {"collapse": 1}
    report = json.loads(json.dumps(result.as_json()))
    assert report["failure_rate"]["rate"] == 0.3333
    assert set(report["detectors"]) == {"false alarms", "detection"}


def test_detectors_are_as_good_as_measured() -> None:
    measured = json.loads(RESULTS.read_text())
    for name, rate in DETECTORS.items():
        entry = measured[name.replace(" ", "_")]
        assert (entry["count"], entry["total"]) == (rate.count, rate.total)
    assert DETECTORS["false alarms"].value <= 0.02
    assert DETECTORS["detection"].value >= 0.95
