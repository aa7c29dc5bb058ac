"""Noise levels of EDM: from `sigma_max` down, evenly spaced in sigma^(1 / rho).

Source: arXiv 2206.00364, equation 5. Two tables of the same curve, since the two generations of
checkpoints are sampled with tables that differ in their end and in their rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _check(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} is below 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min {sigma_min} and sigma_max {sigma_max} are not 0 < min < max")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho {rho} is not above 0")


def _curve(share: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    # in the dtype of `share`, which is 0 at sigma_max and 1 at sigma_min
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (start + share * (end - start)) ** rho


def karras_sigmas(
    num_steps: int, *, sigma_min: float = 0.0002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return the table of Cosmos-Predict1, for `euler`: (num_steps + 1,) float32 on the CPU.

    The first `num_steps` values run from sigma_max to sigma_min, then a 0 follows. Computed in
    float32, as the EDMEulerScheduler of diffusers 0.32.2 did: newer ones use float64, which
    differs by up to 2.3e-5.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(num_steps, sigma_min, sigma_max, rho)
    share = torch.linspace(0, 1, num_steps, dtype=torch.float32)
    sigmas = _curve(share, sigma_min, sigma_max, rho)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def res_sigmas(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return the table of Cosmos 1.0, for the RES solvers: (num_steps + 1,) float64 on the CPU.

    The last value is sigma_min: these solvers work in ln(sigma), so a table cannot end at 0. What
    is left at sigma_min is removed by one more evaluation of the denoiser, see `edm.sample`.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(num_steps, sigma_min, sigma_max, rho)
    share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return _curve(share, sigma_min, sigma_max, rho)
