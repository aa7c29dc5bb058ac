"""Solvers of dx/dsigma = (x - denoised) / sigma, which carries noise to data.

Source: `euler` is arXiv 2206.00364, algorithm 1 without churn; the `res_*` solvers are the
exponential integrators of arXiv 2308.02157 as NVIDIA/Cosmos runs them
(`cosmos1/models/diffusion/diffusion/modules/res_sampler.py`).

A noise level is a Python number, so nothing here waits for a GPU. The state keeps the dtype and
device that it comes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]  # (noised x, sigma) -> estimate of the clean x
OnStep = Callable[[int, Tensor, Tensor], None]  # (index, state after the step, denoised)


def _levels(sigmas: Tensor, *, may_end_at_zero: bool) -> list[float]:
    levels: list[float] = sigmas.tolist()
    falling = all(sigma > target for sigma, target in pairwise(levels))
    lowest_is_fine = levels and (levels[-1] > 0 or (may_end_at_zero and levels[-1] == 0))
    if len(levels) < 2 or not falling or not lowest_is_fine or math.isinf(levels[0]):
        end = "0 or more" if may_end_at_zero else "a value above 0"
        raise ValueError(f"sigmas {levels} do not fall, two values or more, to {end}")
    return levels


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    before_step: Denoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Carry `x` from noise level sigmas[0] to sigmas[-1] by Euler's rule, of first order.

    In ln(sigma) this is the exponential Euler rule too, so it also is the solver `1euler` of RES.

    Args:
        denoise: called once a step.
        x: any shape; pure noise must be scaled to the first noise level.
        sigmas: (steps + 1,), falling; the last may be 0, and the result then is what the last
            call of `denoise` returned, exactly.
        before_step: given state and sigma, returns the state that the step starts from.
        on_step: called after each step, to draw progress or to stop by raising.

    Raises:
        ValueError: the noise levels do not fall.
    """
    for step, (sigma, target) in enumerate(pairwise(_levels(sigmas, may_end_at_zero=True))):
        if before_step is not None:
            x = before_step(x, sigma)
        denoised = denoise(x, sigma)
        x = denoised + (target / sigma) * (x - denoised)
        if on_step is not None:
            on_step(step, x, denoised)
    return x


def _phi1(z: float) -> float:
    return math.expm1(z) / z


def _phi2(z: float) -> float:
    return (_phi1(z) - 1) / z


def _two_estimates(
    x: Tensor, sigma: float, target: float, denoised: Tensor, other: Tensor, other_sigma: float
) -> Tensor:
    """Return the state at `target`, from estimates at `sigma` (of `x`) and at `other_sigma`.

    Between the two, the estimate is taken as linear in ln(sigma); the rest is integrated exactly.
    """
    h = math.log(sigma / target)
    where = math.log(sigma / other_sigma) / h  # of the other estimate: 0 at sigma, 1 at target
    b2 = _phi2(-h) / where
    b1 = _phi1(-h) - b2
    estimate = b1 * denoised.to(x.dtype) + b2 * other.to(x.dtype)
    return (target / sigma) * x + h * estimate


def res_2ab(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Carry `x` from sigmas[0] to sigmas[-1] by two-step exponential Adams-Bashforth, order 2.

    Args:
        denoise: called once a step; its last result but one is kept.
        x: any shape, float64 where the reference is to be matched.
        sigmas: (steps + 1,), falling, above 0. The first step is Euler's.
        on_step: called after each step.

    Raises:
        ValueError: the noise levels do not fall, or reach 0.
    """
    before: tuple[Tensor, float] | None = None  # the estimate of the previous step, and its sigma
    for step, (sigma, target) in enumerate(pairwise(_levels(sigmas, may_end_at_zero=False))):
        denoised = denoise(x, sigma)
        if before is None:
            x = denoised + (target / sigma) * (x - denoised)
        else:
            x = _two_estimates(x, sigma, target, denoised, *before)
        before = denoised, sigma
        if on_step is not None:
            on_step(step, x, denoised)
    return x


def res_2mid(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Carry `x` from sigmas[0] to sigmas[-1] by the exponential midpoint rule, order 2.

    Args:
        denoise: called twice a step: at its start, and half way down in ln(sigma).
        x: any shape, float64 where the reference is to be matched.
        sigmas: (steps + 1,), falling, above 0.
        on_step: called after each step, with the estimate half way.

    Raises:
        ValueError: the noise levels do not fall, or reach 0.
    """
    for step, (sigma, target) in enumerate(pairwise(_levels(sigmas, may_end_at_zero=False))):
        denoised = denoise(x, sigma)
        middle = math.sqrt(sigma * target)
        half_way = denoise(denoised + (middle / sigma) * (x - denoised), middle)
        x = _two_estimates(x, sigma, target, denoised, half_way, middle)
        if on_step is not None:
            on_step(step, x, half_way)
    return x
