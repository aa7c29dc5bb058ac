"""Ranges, the padding rule, and a resize that treats every frame alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from worldline.shapes import Fit
from worldline.video.convert import (
    condition_frames,
    covering_frames,
    fit_frames,
    resize_and_crop,
    scaled,
    signed_to_uint8,
    stretched_frames,
    to_uint8,
)
from worldline.video.read import Clip


def noise(frames: int, height: int, width: int) -> Clip:
    shape = (frames, height, width, 3)
    return Clip(np.random.RandomState(0).randint(0, 256, shape, np.uint8), 25.0)


def test_conditioning_is_the_end_of_the_clip_and_its_last_frame() -> None:
    clip = noise(12, 20, 30)
    video = condition_frames(clip, 9, 33, 20, 30)
    assert video.shape == (1, 3, 33, 20, 30)
    assert video.dtype == torch.float32
    assert np.array_equal(to_uint8(video[0, :, :9] / 2 + 0.5 + 1e-4), clip.frames[-9:])
    assert torch.equal(video[:, :, 9:], video[:, :, 8:9].expand(-1, -1, 24, -1, -1))
    assert video.min() == -1
    assert video.max() == 1


def test_only_the_wanted_frames_matter() -> None:
    clip = noise(12, 20, 30)
    end = Clip(clip.frames[-1:], clip.fps)
    assert torch.equal(condition_frames(clip, 1, 9, 16, 16), condition_frames(end, 1, 9, 16, 16))


def test_a_fitting_frame_is_untouched_and_a_larger_one_is_centred() -> None:
    frames = torch.rand(2, 3, 16, 24)
    assert torch.equal(resize_and_crop(frames, 16, 24), frames)
    # Same scale in both directions, so only columns are cut: 4 of the 8 spare ones on each side.
    assert torch.equal(resize_and_crop(frames, 16, 16), frames[..., 4:20])


@pytest.mark.parametrize("rows", [147, 281, 294, 525, 533, 562, 585, 588, 1050, 1124, 1170])
def test_heights_that_round_up_to_one_row_too_many(rows: int) -> None:
    # 640 / rows * rows > 640 in doubles: the reference resizes to 641 rows, then crops.
    assert 640 / rows * rows > 640
    assert resize_and_crop(torch.rand(1, 1, rows, 8), 640, 12).shape == (1, 1, 640, 12)


def test_colours_are_cut_off_not_rounded() -> None:
    levels = torch.tensor([-0.5, 0.0, 0.999 / 255, 1 / 255 + 1e-6, 254.999 / 255, 1.0, 1.5])
    video = levels.reshape(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]
    assert to_uint8(video.to(torch.bfloat16)).dtype == np.uint8


def test_diffusion_s_range_and_stretching() -> None:
    clip = noise(12, 20, 30)
    video = stretched_frames(clip, 9, 20, 30)
    assert video.shape == (1, 3, 9, 20, 30)
    assert video.min() == -1
    assert video.max() == 255 / 128 - 1
    assert np.array_equal((video[0] + 1) * 128, clip.frames[-9:].transpose(3, 0, 1, 2))
    # a picture half black, half white stays so at any aspect: nothing is cut off
    halves = np.zeros((1, 16, 16, 3), np.uint8)
    halves[:, :, 8:] = 255
    wide = stretched_frames(Clip(halves, 0.0), 1, 8, 64)
    assert (wide[..., :28] < -0.9).all()
    assert (wide[..., 36:] > 0.9).all()


def test_scaling_by_the_short_side() -> None:
    frames = noise(2, 40, 64).frames
    assert scaled(frames.transpose(0, 2, 1, 3), 20).shape == (2, 32, 20, 3)
    assert scaled(frames, 25).shape == (2, 25, 40, 3)
    picture = Image.fromarray(frames[1]).resize((32, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(scaled(frames, 20)[1], np.asarray(picture))


def test_signed_colours() -> None:
    levels = torch.tensor([-2, -1, -0.999, 0, 0.999, 1, 3])
    video = levels.reshape(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert signed_to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]
    # not in the input's dtype: 1 + 127/128 needs 8 bits behind the point
    assert signed_to_uint8(torch.full((3, 1, 1, 1), 127 / 128).bfloat16())[0, 0, 0, 0] == 254


def test_covering_frames_are_the_end_of_the_clip_in_whole_levels() -> None:
    clip = noise(7, 20, 30)
    same = covering_frames(clip, 5, 20, 30)
    assert same.dtype == torch.uint8
    assert np.array_equal(same[0].permute(1, 2, 3, 0), clip.frames[-5:])
    # a wide picture loses its sides, a tall one its top and bottom, and nothing is stretched
    assert torch.equal(covering_frames(clip, 5, 20, 20), same[..., 5:25])
    assert torch.equal(covering_frames(clip, 5, 10, 30), same[..., 5:15, :])
    flat = Clip(np.full((1, 8, 8, 3), 77, np.uint8), 0.0)
    assert (covering_frames(flat, 1, 24, 40) == 77).all()


@pytest.mark.parametrize("make", [condition_frames, stretched_frames, covering_frames])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (96, 50)])
def test_fits(make: object, size: tuple[int, int]) -> None:
    """A grey picture of any aspect: whole, cut off, or whole between black bars of its colour."""
    height, width = 32, 48
    clip = Clip(np.full((3, *size, 3), 200, np.uint8), 0.0)

    def levels(fit: str) -> torch.Tensor:
        counts = (2, 2) if make is condition_frames else (2,)
        video = make(clip, *counts, height, width, fit)  # type: ignore[operator]
        assert video.shape == (1, 3, 2, height, width)
        assert torch.equal(video[:, :, 0], video[:, :, 1])
        return video[0, 0, 0].float()

    stretched, cropped, padded = map(levels, ("stretch", "crop", "pad"))
    assert torch.allclose(stretched, cropped)
    black = (padded - stretched[0, 0]).abs() > 1e-3
    assert padded[black].unique().tolist() == [0 if make is covering_frames else -1]
    scale = min(height / size[0], width / size[1])
    kept = round(scale * size[0]), round(scale * size[1])
    rows, columns = (~black).any(1), (~black).any(0)
    assert abs(int(rows.sum()) - kept[0]) <= 1
    assert abs(int(columns.sum()) - kept[1]) <= 1
    for line in (rows, columns):  # in the middle
        first, last = line.nonzero()[[0, -1], 0].tolist()
        assert abs(first - (len(line) - 1 - last)) <= 1


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_planes_alone_give_the_frames(mode: str, fit: Fit) -> None:
    """The resize of a clip at once, as the reference has it, in the bits."""
    clip = noise(4, 37, 61)
    frames = torch.from_numpy(clip.frames[-3:]).permute(0, 3, 1, 2).float() / 128 - 1
    expected = fit_frames(frames, 48, 64, fit, mode)
    if mode == "bicubic":
        assert torch.equal(stretched_frames(clip, 3, 48, 64, fit)[0].transpose(0, 1), expected)
    else:
        signed = (frames + 1) * 128 / 255 * 2 - 1
        found = condition_frames(clip, 3, 3, 48, 64, fit)[0].transpose(0, 1)
        assert torch.allclose(found, fit_frames(signed, 48, 64, fit), atol=1e-6)


def test_the_long_side_is_rounded_then_even() -> None:
    for height, width, short, long in (
        (240, 320, 320, 428),
        (480, 854, 360, 642),
        (12, 20, 9, 16),
        (30, 30, 12, 12),
        (10, 13, 8, 10),
    ):
        assert scaled(noise(1, height, width).frames, short).shape[1:3] == (short, long)
        assert scaled(noise(1, width, height).frames, short).shape[1:3] == (long, short)
