"""Solvers of dx/dsigma = (x - denoised) / sigma as generators, and classifier-free guidance.

Source: `euler` is arXiv 2206.00364, algorithm 1 without churn; the `res_*` solvers are the
exponential integrators of arXiv 2308.02157 as NVIDIA/Cosmos runs them
(`cosmos1/models/diffusion/diffusion/modules/res_sampler.py`); guidance is arXiv 2207.12598.

A noise level is a Python number, so nothing here waits for a GPU. The state keeps the dtype and
device that it comes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Result = TypeVar("Result")
Denoise = Callable[[Tensor, float], Tensor]  # (noised x, sigma) -> estimate of the clean x


class Stepped(NamedTuple):
    """A sampler after one step.

    Attributes:
        x: state.
        denoised: estimate of the clean latents, for previews.
    """

    x: Tensor
    denoised: Tensor


Steps = Generator[Stepped, None, Tensor]  # returns the final state


def finish(steps: Generator[Any, None, Result]) -> Result:
    """Run a generator to its end; its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def guided(branch: Callable[[bool], Tensor], scale: float) -> Tensor:
    """Classifier-free guidance: cond + scale * (cond - uncond), in float32.

    This scale is one less than in the more usual uncond + s * (cond - uncond). At 0 the branch
    without the prompt has no weight, so it is not computed.

    Args:
        branch: gives the output with the prompt (True) or without (False), any floating dtype.
        scale: 0 or more in practice; -1 is the branch without the prompt alone.
    """
    conditional = branch(True).float()  # float32: the difference of two near bf16 values is coarse
    if scale == 0:
        return conditional
    return conditional + scale * (conditional - branch(False).float())


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, before_step: Denoise | None = None
) -> Steps:
    """Carry `x` from noise level sigmas[0] to sigmas[-1] by Euler's rule, order 1.

    In ln(sigma) this is the exponential Euler rule too, so it also is the solver `1euler` of RES.

    Args:
        denoise: called once a step.
        x: any shape; pure noise must be scaled to the first noise level.
        sigmas: (steps + 1,), falling; the last may be 0, and the result then is what the last
            call of `denoise` returned, exactly.
        before_step: given state and sigma, returns the state that the step starts from.
    """
    for sigma, target in pairwise(sigmas.tolist()):
        if before_step is not None:
            x = before_step(x, sigma)
        denoised = denoise(x, sigma)
        x = denoised + (target / sigma) * (x - denoised)
        yield Stepped(x, denoised)
    return x


def res_2ab(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Carry `x` from sigmas[0] to sigmas[-1] by two-step exponential Adams-Bashforth, order 2.

    Args:
        denoise: called once a step; its last result but one is kept.
        x: any shape, float64 where the reference is to be matched.
        sigmas: (steps + 1,), falling, above 0. The first step is Euler's.
    """
    previous: tuple[Tensor, float] | None = None  # estimate of the previous step, and its sigma
    for sigma, target in pairwise(sigmas.tolist()):
        denoised = denoise(x, sigma)
        if previous is None:
            x = denoised + (target / sigma) * (x - denoised)
        else:
            x = _two_estimates(x, sigma, target, denoised, *previous)
        previous = denoised, sigma
        yield Stepped(x, denoised)
    return x


def res_2mid(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Carry `x` from sigmas[0] to sigmas[-1] by the exponential midpoint rule, order 2.

    Args:
        denoise: called twice a step: at its start, and half way down in ln(sigma).
        x: any shape, float64 where the reference is to be matched.
        sigmas: (steps + 1,), falling, above 0.
    """
    for sigma, target in pairwise(sigmas.tolist()):
        denoised = denoise(x, sigma)
        middle = math.sqrt(sigma * target)
        half_way = denoise(denoised + (middle / sigma) * (x - denoised), middle)
        x = _two_estimates(x, sigma, target, denoised, half_way, middle)
        yield Stepped(x, half_way)
    return x


def _two_estimates(
    x: Tensor, sigma: float, target: float, denoised: Tensor, other: Tensor, other_sigma: float
) -> Tensor:
    """State at `target`, from estimates at `sigma` (of `x`) and at `other_sigma`.

    Between the two, the estimate is taken as linear in ln(sigma); the rest is integrated exactly.
    """
    h = math.log(sigma / target)
    where = math.log(sigma / other_sigma) / h  # of the other estimate: 0 at sigma, 1 at target
    phi1 = math.expm1(-h) / -h
    b2 = (phi1 - 1) / -h / where
    b1 = phi1 - b2
    estimate = b1 * denoised.to(x.dtype) + b2 * other.to(x.dtype)
    return (target / sigma) * x + h * estimate
