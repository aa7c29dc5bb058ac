"""For Gaussian data the best denoiser and the end of the path are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from worldline.sampling.schedules import res_sigmas
from worldline.sampling.solvers import Steps, euler, finish, guided, res_2ab, res_2mid

DATA_STD = 0.7
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
