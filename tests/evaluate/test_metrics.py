"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worldline.evaluate.metrics import SSIM_CONSTANTS, flicker, motion, psnr, ssim


def noise(seed: int = 0, frames: int = 3) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (frames, 24, 32, 3)).astype(np.uint8)


def flat(level: int, frames: int = 2) -> np.ndarray:
    return np.full((frames, 16, 20, 3), level, np.uint8)


def test_psnr_of_a_constant_error_is_known() -> None:
    assert psnr(flat(100), flat(110)) == pytest.approx(20 * math.log10(255 / 10))


def test_psnr_of_equal_clips_is_infinite() -> None:
    assert psnr(noise(), noise()) == math.inf


def test_psnr_of_a_clip_pools_squared_errors_not_decibels() -> None:
    clip = np.concatenate([flat(100, 1), flat(104, 1)])
    assert psnr(clip, flat(100)) == pytest.approx(10 * math.log10(255**2 / 8))


def test_psnr_does_not_wrap_around() -> None:
    assert psnr(flat(0), flat(255)) == pytest.approx(0)


def test_arrays_and_tensors_give_the_same() -> None:
    first, second = noise(0), noise(1)
    assert psnr(torch.from_numpy(first), torch.from_numpy(second)) == psnr(first, second)


def test_ssim_of_equal_clips_is_one() -> None:
    assert ssim(noise(), noise()) == pytest.approx(1)


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    small, _ = SSIM_CONSTANTS
    expected = (2 * 50 * 200 + small) / (50**2 + 200**2 + small)
    assert ssim(flat(50), flat(200)) == pytest.approx(expected)


def test_ssim_is_symmetric_and_falls_with_noise() -> None:
    clip = (np.random.RandomState(0).rand(1, 6, 8, 3) * 255).repeat(8, 1).repeat(8, 2)
    grain = np.random.RandomState(1).standard_normal(clip.shape)
    true = clip.astype(np.uint8)
    noisy = [(clip + level * grain).clip(0, 255).astype(np.uint8) for level in (5, 20)]
    assert 1 > ssim(noisy[0], true) > ssim(noisy[1], true) > 0
    assert ssim(noisy[1], true) == pytest.approx(ssim(true, noisy[1]))


def test_ssim_of_a_negative_is_negative() -> None:
    assert ssim(255 - noise(), noise()) < 0


def test_ssim_window_by_hand() -> None:
    """On an 11 x 11 picture one window fits: its weighted moments are worked out directly."""
    draw = np.random.RandomState(0)
    first, second = draw.randint(0, 256, (2, 1, 11, 11, 3)).astype(np.uint8)
    offsets = np.arange(-5, 6)
    weight = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    small, large = SSIM_CONSTANTS
    values = []
    for channel in range(3):
        x, y = first[0, ..., channel].astype(float), second[0, ..., channel].astype(float)
        mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
        variance_x, variance_y = (
            (weight * (x - mean_x) ** 2).sum(),
            (weight * (y - mean_y) ** 2).sum(),
        )
        covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
        values.append(
            (2 * mean_x * mean_y + small)
            * (2 * covariance + large)
            / ((mean_x**2 + mean_y**2 + small) * (variance_x + variance_y + large))
        )
    assert ssim(first, second) == pytest.approx(np.mean(values))


def test_a_still_video_neither_moves_nor_flickers() -> None:
    assert motion(flat(9, 5)) == flicker(flat(9, 5)) == 0
    assert motion(flat(9, 1)) == flicker(flat(9, 2)) == 0


def test_steady_brightening_moves_but_does_not_flicker() -> None:
    clip = np.concatenate([flat(level, 1) for level in (10, 13, 16, 19)])
    assert motion(clip) == pytest.approx(3)
    assert flicker(clip) == 0


def test_alternation_flickers_by_its_amplitude() -> None:
    clip = np.concatenate([flat(level, 1) for level in (10, 15, 10, 15)])
    assert flicker(clip) == pytest.approx(5)


@pytest.mark.parametrize(
    ("frames", "reference", "words"),
    [
        (flat(1), flat(1, 3), "one shape"),
        (flat(1).astype(np.float32), flat(1), "uint8"),
        (flat(1)[..., :1], flat(1)[..., :1], "uint8"),
    ],
)
def test_unlike_clips_are_refused(frames: np.ndarray, reference: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        psnr(frames, reference)


def test_a_picture_below_the_window_has_no_ssim() -> None:
    with pytest.raises(ValueError, match="11 x 11 pixels, not 8 x 16"):
        ssim(np.zeros((1, 8, 16, 3), np.uint8), np.zeros((1, 8, 16, 3), np.uint8))
