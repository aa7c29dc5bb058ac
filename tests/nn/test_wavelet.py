"""Haar patches: perfect reconstruction with the exact tap, a known gain with the stored one."""

import pytest
import torch

from worldline.nn.wavelet import patch, unpatch


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_round_trip(size: int) -> None:
    video = torch.randn(2, 3, 1 + 2 * size, 2 * size, 3 * size, dtype=torch.float64)
    bands = patch(video, size)
    assert bands.shape == (2, 3 * size**3, 3, 2, 3)
    assert torch.allclose(unpatch(bands, size), video)


def test_the_stored_tap_scales_every_level() -> None:
    tap = torch.tensor(0.5).sqrt().bfloat16().item()
    video = torch.randn(1, 3, 5, 8, 8, dtype=torch.float64)
    gain = (tap / 0.5**0.5) ** 3
    assert torch.allclose(patch(video, 4, tap), patch(video, 4) * gain**2)


def test_the_first_band_is_the_mean_and_frame_0_stands_alone() -> None:
    video = torch.randn(1, 1, 5, 4, 4)
    bands = patch(video, 4)
    assert torch.allclose(bands[0, 0, 0], video[0, 0, 0].mean())
    assert torch.allclose(bands[0, 0, 1], video[0, 0, 1:].mean())


def test_bands_are_numbered_time_height_width() -> None:
    """A pattern that alternates along one axis alone lands in that axis' band."""
    for band, axis in ((1, 4), (2, 3), (4, 2)):
        signs = torch.tensor([1.0, -1.0] * 2)
        shape = [1, 1, 1, 1, 1]
        shape[axis] = 4
        video = signs.view(shape).expand(1, 1, 4, 4, 4)
        # one frame in front, so that pairs of frames start at an even one
        bands = patch(torch.cat([video[:, :, -1:], video], 2)[:, :, :5], 2)
        energy = bands[0, :, 1:].square().sum((1, 2, 3))
        assert energy.argmax() == band
