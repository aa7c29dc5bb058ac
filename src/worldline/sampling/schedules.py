"""The noise that sampling starts from, and the EDM noise levels that it goes through.

Source: levels evenly spaced in sigma^(1 / rho), arXiv 2206.00364, equation 5. Two tables of the
same curve, since the two generations of checkpoints are sampled with tables that differ in their
end and in their rounding. Noise is that of NVIDIA/Cosmos
`cosmos1/models/diffusion/diffusion/modules/misc.py` (numpy's legacy generator, whose stream is
frozen), used here for all families.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RHO = 7.0


def standard_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit normal noise, float32, on the CPU: the same for a seed on any machine."""
    drawn = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(drawn.astype(np.float32))


def karras_sigmas(num_steps: int, *, sigma_min: float = 0.0002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels of Cosmos-Predict1, for `euler`: (num_steps + 1,) float32, on the CPU.

    `num_steps` values from sigma_max to sigma_min, then a 0. Computed in float32, as the
    EDMEulerScheduler of diffusers 0.32.2 does: newer ones use float64, which differs by up to
    2.3e-5.
    """
    share = torch.linspace(0, 1, num_steps, dtype=torch.float32)
    sigmas = _curve(share, sigma_min, sigma_max)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def res_sigmas(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels of Cosmos 1.0, for the RES solvers: (num_steps + 1,) float64, on the CPU.

    The last value is sigma_min: these solvers work in ln(sigma), so a table cannot end at 0.
    """
    share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return _curve(share, sigma_min, sigma_max)


def _curve(share: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    # in the dtype of `share`, which is 0 at sigma_max and 1 at sigma_min
    start, end = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return (start + share * (end - start)) ** RHO
