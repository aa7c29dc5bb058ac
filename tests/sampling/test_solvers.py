"""For Gaussian data the best denoiser and the end of the path are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from worldline.sampling.solvers import (
    Steps,
    euler,
    finish,
    guided,
    karras_sigmas,
    res_2ab,
    res_2mid,
    res_sigmas,
    standard_noise,
)

DATA_STD = 0.7
MAX_SEED = 2**32 - 1
Solver = Callable[..., Steps]
SOLVERS = [euler, res_2ab, res_2mid]


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x * DATA_STD**2 / (DATA_STD**2 + sigma**2)


def error(solver: Solver, steps: int) -> float:
    sigmas = res_sigmas(steps, sigma_min=0.05)
    x = torch.tensor([80.0, -30.0], dtype=torch.float64)
    shrunk = math.hypot(DATA_STD, sigmas[-1].item()) / math.hypot(DATA_STD, sigmas[0].item())
    return (finish(solver(denoise, x, sigmas)) - x * shrunk).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (res_2ab, 2), (res_2mid, 2)])
def test_order(solver: Solver, order: int) -> None:
    assert error(solver, 400) / error(solver, 800) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_path_towards_a_single_point_is_exact(solver: Solver) -> None:
    # all data at one point: the estimate does not change along the way, so no step can be too long
    point = torch.tensor([0.3, -2.0], dtype=torch.float64)
    start = torch.tensor([50.0, 20.0], dtype=torch.float64)
    sigmas = torch.tensor([60.0, 3.0, 0.2], dtype=torch.float64)
    end = finish(solver(lambda _x, _sigma: point, start, sigmas))
    torch.testing.assert_close(end, point + (start - point) * (0.2 / 60), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [res_2ab, res_2mid])
def test_estimates_linear_in_log_sigma_are_integrated_exactly(solver: Solver) -> None:
    # dx/du = estimate - x with u = -ln(sigma) and estimate = u + 1: x = u + c exp(-u)
    sigmas = torch.tensor([5.0, 2.0, 0.3, 0.1], dtype=torch.float64)
    u = -sigmas.log()
    first = torch.zeros(1, dtype=torch.float64)

    def exact(index: int, other: int, x: Tensor) -> Tensor:
        return u[index] + (x - u[other]) * (u[other] - u[index]).exp()

    steps = solver(lambda x, sigma: torch.full_like(x, 1 - math.log(sigma)), first, sigmas)
    states = [step.x for step in steps]
    # the first step of Adams-Bashforth knows one estimate only
    start = 1 if solver is res_2ab else 0
    chain = [first, *states]
    for index in range(start, 3):
        torch.testing.assert_close(chain[index + 1], exact(index + 1, index, chain[index]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps(solver: Solver) -> None:
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5])
    asked: list[float] = []

    def asking(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return denoise(x, sigma)

    steps = list(solver(asking, torch.ones(2), sigmas))
    assert len(steps) == 3
    assert torch.equal(steps[-1].x, finish(solver(denoise, torch.ones(2), sigmas)))
    assert all(x.shape == denoised.shape == (2,) for x, denoised in steps)
    levels = sigmas.tolist()
    if solver is res_2mid:
        middles = [math.sqrt(a * b) for a, b in pairwise(levels)]
        assert asked == [sigma for pair in zip(levels, middles, strict=False) for sigma in pair]
    else:
        assert asked == levels[:-1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_runs_between_steps(solver: Solver) -> None:
    asked: list[float] = []
    steps = solver(lambda x, s: asked.append(s) or x, torch.ones(1), torch.tensor([4.0, 2.0, 1.0]))
    assert not asked
    next(steps)
    once = len(asked)
    steps.close()
    assert len(asked) == once < 3


def test_last_step_to_zero_returns_the_estimate_itself() -> None:
    estimate = torch.randn(5)
    start, sigmas = torch.randn(5) * 80, torch.tensor([80.0, 3.0, 0.0])
    end = finish(euler(lambda _x, _sigma: estimate, start, sigmas))
    assert torch.equal(end, estimate)


def test_a_step_starts_from_the_state_that_is_put_in_place() -> None:
    sigmas = torch.tensor([4.0, 1.0])
    replaced = torch.tensor([8.0])
    start = torch.tensor([100.0])
    end = finish(euler(lambda x, _sigma: x / 2, start, sigmas, before_step=lambda _x, _s: replaced))
    assert torch.equal(end, torch.tensor([4 + 4 / 4.0]))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_state_is_kept(solver: Solver, dtype: torch.dtype) -> None:
    sigmas = res_sigmas(4)
    start = torch.ones(2, dtype=dtype)
    end = finish(solver(lambda x, s: denoise(x, s).float(), start, sigmas))
    assert end.dtype == dtype


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
