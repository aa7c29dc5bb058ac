"""Solvers of dx/dsigma = (x - denoised) / sigma as generators, their noise levels and guidance.

Source: `euler` is arXiv 2206.00364, algorithm 1 without churn; the `res_*` solvers are the
exponential integrators of arXiv 2308.02157 as NVIDIA/Cosmos runs them
(`cosmos1/models/diffusion/diffusion/modules/res_sampler.py`); guidance is arXiv 2207.12598.

A noise level is a Python number, so nothing here waits for a GPU. The state keeps the dtype and
device that it comes with.
"""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

RHO = 7.0  # of the curve of noise levels, arXiv 2206.00364, equation 5

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


def standard_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit normal noise, float32, on the CPU: the same for a seed on any machine.

    From numpy's legacy generator, whose stream is frozen, as in NVIDIA/Cosmos.
    """
    drawn = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(drawn.astype(np.float32))


def karras_sigmas(num_steps: int, *, sigma_min: float = 0.0002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels of Cosmos-Predict1, for `euler`: (num_steps + 1,) float32, on the CPU.

    `num_steps` values from sigma_max to sigma_min, then a 0. Computed in float32, as the
    EDMEulerScheduler of diffusers 0.32.2 does: newer ones use float64, which differs by up to
    2.3e-5.
    """
    sigmas = _curve(torch.linspace(0, 1, num_steps, dtype=torch.float32), sigma_min, sigma_max)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def res_sigmas(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels of Cosmos 1.0's RES solvers and of "karras": (num_steps + 1,) float64, CPU.

    The last value is sigma_min: these solvers work in ln(sigma), so a table cannot end at 0.
    """
    share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return _curve(share, sigma_min, sigma_max)


def _curve(share: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    # in the dtype of `share`, which is 0 at sigma_max and 1 at sigma_min
    start, end = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return (start + share * (end - start)) ** RHO


def guided(branch: Callable[[bool], Tensor], scale: float) -> Tensor:
    """Classifier-free guidance: cond + scale * (cond - uncond), in float32.

    This scale is one less than in the more usual uncond + s * (cond - uncond). At 0 the branch
    without the prompt, `branch(False)`, has no weight, so it is not computed.
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
    The last level may be 0; the result then is exactly the last one of `denoise`. A step starts
    from the state that `before_step` makes.
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

    Levels are above 0. The first step is Euler's.
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

    A step calls `denoise` at its start and half way down in ln(sigma). Levels are above 0.
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
