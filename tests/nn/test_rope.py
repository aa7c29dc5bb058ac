"""Rotations keep lengths, and scores depend on distances alone."""

import math

import torch

from worldline.nn.rope import (
    Yarn,
    axis_sizes,
    inverse_frequencies,
    rotary_exponents,
    rotate,
    rotation_3d,
    sincos_3d,
    stretched_angles_3d,
)
from worldline.shapes import LatentShape

GRID = LatentShape(3, 4, 5)


def test_sizes_of_the_released_head() -> None:
    assert axis_sizes(128) == (44, 42, 42)
    for size in (16, 32, 48, 96):
        assert sum(axis_sizes(size)) == size


def test_a_rotation_keeps_length_and_the_origin_stays() -> None:
    x = torch.randn(2, GRID.tokens, 32, dtype=torch.float64)
    turned = rotate(x, rotation_3d(GRID, 32, 5e5).to(torch.device("cpu"), torch.float64))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(turned[:, 0], x[:, 0])


def test_scores_depend_on_the_offset_alone() -> None:
    rotation = rotation_3d(GRID, 32, 100.0)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(a: int, b: int) -> float:
        return float((rotate(q, rotation.rows(a, 1)) * rotate(k, rotation.rows(b, 1))).sum())

    def cell(t: int, h: int, w: int) -> int:
        return (t * GRID.height + h) * GRID.width + w

    here = score(cell(1, 2, 3), cell(0, 1, 1))
    assert math.isclose(here, score(cell(2, 3, 4), cell(1, 2, 2)), abs_tol=1e-4)
    assert not math.isclose(here, score(cell(2, 3, 4), cell(1, 2, 3)), abs_tol=1e-3)


def test_leading_tokens_are_not_turned() -> None:
    plain, shifted = rotation_3d(GRID, 32, 5e5), rotation_3d(GRID, 32, 5e5, leading=2)
    assert torch.equal(shifted.cos[2:], plain.cos)
    assert torch.equal(shifted.cos[:2], torch.ones(2, 32))


def test_yarn_keeps_fast_turns_and_stretches_slow_ones() -> None:
    plain = inverse_frequencies(42, 5e5)
    stretched = inverse_frequencies(42, 5e5, Yarn(), 40)
    fast, slow = plain >= 2 * math.pi * 4 / 40, plain <= 2 * math.pi / 40
    assert torch.equal(stretched[fast], plain[fast])
    assert torch.allclose(stretched[slow], plain[slow] / 2)
    # in time even the fastest frequency is below one turn over three latent frames
    assert torch.allclose(inverse_frequencies(44, 5e5, Yarn(), 3), inverse_frequencies(44, 5e5) / 2)


def test_the_fixed_table_holds_sines_and_cosines_of_each_axis() -> None:
    table = sincos_3d(GRID, 96, leading=1)
    assert torch.equal(table[0], torch.zeros(96))
    first = table[1].view(3, 2, 16)
    assert torch.equal(first[:, 0], torch.zeros(3, 16))
    assert torch.equal(first[:, 1], torch.ones(3, 16))
    assert torch.equal(table, table.bfloat16().float())


def test_angles_follow_the_exponents_that_are_given() -> None:
    ratio = (1.0, 3.0, 3.0)
    plain = [rotary_exponents(size) for size in axis_sizes(32)]
    angles = stretched_angles_3d(GRID, 32, ratio=ratio, time_scale=None)
    again = stretched_angles_3d(GRID, 32, ratio=ratio, time_scale=None, exponents=plain)
    assert torch.equal(angles, again)
    other = [plain[0], plain[1] + 0.01, plain[2]]
    moved = stretched_angles_3d(GRID, 32, ratio=ratio, time_scale=None, exponents=other)
    base = 10_000 * 3 ** (10 / 8)
    time, rows = slice(0, 6), slice(6, 11)  # of the 16 different angles
    assert torch.equal(moved[:, time], angles[:, time])
    assert torch.allclose(moved[:, rows], angles[:, rows] * base**-0.01)
