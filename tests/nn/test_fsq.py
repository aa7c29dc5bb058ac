"""FSQ: ids and codes are one to one, and the numbers of the released levels."""

import math

import pytest
import torch

from worldline.nn import fsq

RELEASED = (8, 8, 8, 5, 5, 5)


@pytest.mark.parametrize("levels", [RELEASED, (4, 4, 4, 3, 3, 3), (2,), (7, 5, 5, 5, 5), (8,) * 4])
def test_every_id_has_its_own_code(levels: tuple[int, ...]) -> None:
    ids = torch.arange(math.prod(levels))
    codes = fsq.indices_to_codes(ids, levels)
    assert codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_indices(codes, levels).long(), ids)


def test_codes_are_fixed_points_of_quantising() -> None:
    # the middle of a cell: atanh of its bounded value
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    codes = fsq.quantize(z, RELEASED)
    again = fsq.indices_to_codes(fsq.codes_to_indices(codes, RELEASED), RELEASED)
    assert torch.equal(codes, again)


def test_zero_is_the_documented_id() -> None:
    codes = fsq.quantize(torch.zeros(1, 6), RELEASED)
    assert fsq.codes_to_indices(codes, RELEASED).tolist() == [32036]


def test_codes_are_exact_in_bf16() -> None:
    codes = fsq.indices_to_codes(torch.arange(64_000), RELEASED)
    assert torch.equal(codes.bfloat16().float(), codes)


def test_gradient_is_that_of_the_bound() -> None:
    z = torch.randn(3, 6, requires_grad=True)
    fsq.quantize(z, RELEASED).sum().backward()
    straight = z.grad
    z.grad = None
    halves = torch.tensor([4.0, 4, 4, 2, 2, 2])
    (fsq.bound(z, RELEASED) / halves).sum().backward()
    assert torch.allclose(straight, z.grad)


def test_bf16_input_is_quantised_in_float32() -> None:
    z = torch.randn(100, 6).bfloat16()
    assert torch.equal(fsq.quantize(z, RELEASED), fsq.quantize(z.float(), RELEASED))
