from __future__ import annotations

import numpy as np
import pytest
import torch

from worldline.sampling.schedules import karras_sigmas, res_sigmas, standard_noise

MAX_SEED = 2**32 - 1


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
    roots = res_sigmas(15, sigma_min=0.02, sigma_max=10) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(15) / 15)


def test_noise_is_that_of_the_legacy_generator() -> None:
    noise = standard_noise(7, (2, 3, 4))
    expected = np.random.RandomState(7).standard_normal(24).astype(np.float32)
    assert noise.dtype == torch.float32
    assert torch.equal(noise.flatten(), torch.from_numpy(expected))


def test_noise_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = standard_noise(3, (5,)), standard_noise(3, torch.Size((5,)))
    assert torch.equal(first, second)
    assert not torch.equal(first, standard_noise(4, (5,)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_ends_of_the_seeds() -> None:
    for seed in (0, MAX_SEED):
        assert standard_noise(seed, (1,)).isfinite().all()
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match="Seed"):
            standard_noise(seed, (1,))
