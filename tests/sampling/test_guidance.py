from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worldline.sampling.guidance import check_guidance, guided

BRANCHES = {True: torch.tensor([3.0, -1.0]), False: torch.tensor([1.0, 1.0])}


def test_pushes_away_from_the_branch_without_the_prompt() -> None:
    assert torch.equal(guided(BRANCHES.__getitem__, 7), torch.tensor([17.0, -15.0]))
    assert torch.equal(guided(BRANCHES.__getitem__, -1), BRANCHES[False])


def test_without_weight_the_second_branch_is_not_computed() -> None:
    asked = []

    def branch(conditional: bool) -> Tensor:
        asked.append(conditional)
        return BRANCHES[conditional]

    assert torch.equal(guided(branch, 0), BRANCHES[True])
    assert asked == [True]
    guided(branch, 0.5)
    assert asked == [True, True, False]


def test_difference_is_taken_in_float32() -> None:
    halves = {key: value.bfloat16() for key, value in BRANCHES.items()}
    out = guided(halves.__getitem__, 0.3)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, guided(BRANCHES.__getitem__, 0.3))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_refusals(scale: float) -> None:
    with pytest.raises(ValueError, match=f"guidance {scale}"):
        check_guidance(scale)
