"""Haar patches: perfect reconstruction with the exact tap, a known gain with the stored one.

FSQ: ids and codes are one to one, and the numbers of the released levels.
"""

import math

import pytest
import torch

from worldline.nn.transforms import (
    bound,
    codes_to_indices,
    indices_to_codes,
    patch,
    quantize,
    unpatch,
)

RELEASED = (8, 8, 8, 5, 5, 5)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_round_trip(size: int) -> None:
    cells = torch.randn(2, 1 + 2 * size, 2 * size, 3 * size, 3, dtype=torch.float64)
    bands = patch(cells, size)
    assert bands.shape == (2, 3, 2, 3, 3 * size**3)
    assert torch.allclose(unpatch(bands, size), cells)


def test_the_stored_tap_scales_every_level() -> None:
    tap = torch.tensor(0.5).sqrt().bfloat16().item()
    cells = torch.randn(1, 5, 8, 8, 3, dtype=torch.float64)
    gain = (tap / 0.5**0.5) ** 3
    assert torch.allclose(patch(cells, 4, tap), patch(cells, 4) * gain**2)


def test_the_first_band_is_the_mean_and_frame_0_stands_alone() -> None:
    cells = torch.randn(1, 5, 4, 4, 1)
    bands = patch(cells, 4)
    assert torch.allclose(bands[0, 0, 0, 0, 0], cells[0, 0].mean())
    assert torch.allclose(bands[0, 1, 0, 0, 0], cells[0, 1:].mean())


def test_bands_are_numbered_time_height_width() -> None:
    """A pattern that alternates along one axis alone lands in that axis' band."""
    for band, axis in ((1, 3), (2, 2), (4, 1)):
        signs = torch.tensor([1.0, -1.0] * 2)
        shape = [1, 1, 1, 1, 1]
        shape[axis] = 4
        cells = signs.view(shape).expand(1, 4, 4, 4, 1)
        # one frame in front, so that pairs of frames start at an even one
        bands = patch(torch.cat([cells[:, -1:], cells], 1)[:, :5], 2)
        energy = bands[0, 1:].square().sum((0, 1, 2))
        assert energy.argmax() == band


@pytest.mark.parametrize("levels", [RELEASED, (4, 4, 4, 3, 3, 3), (2,), (7, 5, 5, 5, 5), (8,) * 4])
def test_every_id_has_its_own_code(levels: tuple[int, ...]) -> None:
    ids = torch.arange(math.prod(levels))
    codes = indices_to_codes(ids, levels)
    assert codes.abs().max() <= 1
    assert torch.equal(codes_to_indices(codes, levels).long(), ids)


def test_codes_are_fixed_points_of_quantising() -> None:
    # the middle of a cell: atanh of its bounded value
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    codes = quantize(z, RELEASED)
    again = indices_to_codes(codes_to_indices(codes, RELEASED), RELEASED)
    assert torch.equal(codes, again)


def test_zero_is_the_documented_id() -> None:
    codes = quantize(torch.zeros(1, 6), RELEASED)
    assert codes_to_indices(codes, RELEASED).tolist() == [32036]


def test_codes_are_exact_in_bf16() -> None:
    codes = indices_to_codes(torch.arange(64_000), RELEASED)
    assert torch.equal(codes.bfloat16().float(), codes)


def test_gradient_is_that_of_the_bound() -> None:
    z = torch.randn(3, 6, requires_grad=True)
    quantize(z, RELEASED).sum().backward()
    straight = z.grad
    z.grad = None
    halves = torch.tensor([4.0, 4, 4, 2, 2, 2])
    (bound(z, RELEASED) / halves).sum().backward()
    assert torch.allclose(straight, z.grad)


def test_bf16_input_is_quantised_in_float32() -> None:
    z = torch.randn(100, 6).bfloat16()
    assert torch.equal(quantize(z, RELEASED), quantize(z.float(), RELEASED))
