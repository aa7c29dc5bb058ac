from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from worldline.sampling.schedules import karras_sigmas, res_sigmas


@pytest.mark.parametrize("steps", [1, 2, 15, 35, 200])
def test_ends(steps: int) -> None:
    euler, res = karras_sigmas(steps), res_sigmas(steps)
    assert (euler.dtype, res.dtype) == (torch.float32, torch.float64)
    assert euler.shape == res.shape == (steps + 1,)
    assert euler[0].item() == pytest.approx(80, rel=1e-6)
    assert euler[-1].item() == 0
    if steps > 1:
        assert euler[-2].item() == pytest.approx(0.0002, rel=1e-4)  # computed in float32
    assert res[0].item() == pytest.approx(80, rel=1e-13)
    assert res[-1].item() == pytest.approx(0.002, rel=1e-10)
    for sigmas in (euler, res):
        assert (sigmas.diff() < 0).all()


def test_curve_is_straight_in_the_root_of_sigma() -> None:
    roots = res_sigmas(15, sigma_min=0.02, sigma_max=10, rho=3) ** (1 / 3)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(15) / 15)


@pytest.mark.parametrize("table", [karras_sigmas, res_sigmas])
@pytest.mark.parametrize(
    ("steps", "options", "said"),
    [
        (0, {}, "num_steps 0"),
        (-3, {}, "num_steps -3"),
        (5, {"sigma_min": 0.0}, "sigma_min 0.0"),
        (5, {"sigma_min": 90.0}, "sigma_min 90.0"),
        (5, {"sigma_max": math.inf}, "sigma_max inf"),
        (5, {"sigma_max": math.nan}, "sigma_max nan"),
        (5, {"rho": 0.0}, "rho 0.0"),
    ],
)
def test_refusals(table: Any, steps: int, options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table(steps, **options)
