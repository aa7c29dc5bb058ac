"""Sampling of EDM networks: Text2World and Video2World of Cosmos 1.0 and Cosmos-Predict1.

Sources: preconditioning arXiv 2206.00364, table 1; `edm_euler` is run by
nvidia-cosmos/cosmos-predict1 `diffusion/model/model_t2w.py` and `model_v2w.py`, the `res_*`
samplers by NVIDIA/Cosmos `cosmos1/models/diffusion/model/model_t2w.py` and `model_v2w.py`.
Axes: B batch, C channels, T/H/W latent grid.

A network F is asked for F(c_in x, c_noise), and c_skip x + c_out F estimates the clean latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from worldline.sampling.solvers import (
    Steps,
    euler,
    guided,
    karras_sigmas,
    res_2ab,
    res_2mid,
    res_sigmas,
)

SIGMA_DATA = 0.5
SIGMA_MAX = 80.0
AUGMENT_SIGMA = 0.001
SAMPLER_OF: dict[str, str] = {"1.0": "res_2ab", "Predict1": "edm_euler"}

# (latents already times c_in, c_noise (B,), branch with the prompt?) -> F, in any floating dtype
Network = Callable[[Tensor, Tensor, bool], Tensor]
Number = TypeVar("Number", float, Tensor)


class Preconditioning(NamedTuple, Generic[Number]):
    """Factors of an estimate at a noise level."""

    skip: Number  # c_skip, of the noised latents
    out: Number  # c_out, of the network's output
    scale: Number  # c_in, of the network's input
    noise: Number  # c_noise, the network's time


def precondition(sigma: Number) -> Preconditioning[Number]:
    """Factors at a noise level: a number, 0 or more, or a float32 tensor above 0.

    Float32, since factors differ by five orders of magnitude. `noise` is minus infinity at 0.
    """
    variance = sigma * sigma + SIGMA_DATA**2
    if isinstance(sigma, Tensor):
        noise = sigma.log() / 4
    else:
        noise = math.log(sigma) / 4 if sigma > 0 else -math.inf
    return Preconditioning(
        skip=SIGMA_DATA**2 / variance,
        out=sigma * SIGMA_DATA * variance**-0.5,
        scale=variance**-0.5,
        noise=noise,
    )


@dataclass(frozen=True)
class Conditioning:
    """Known frames at the start of a clip (Video2World).

    While the noise level is above `sigma`, the network sees these frames with noise of that level
    in place of its own state. From there on they are denoised like all others. The condition mask,
    which marks them for the network, is the caller's, and stays as it is to the end.

    Attributes:
        latents: (B, C, known frames, H, W), clean.
        noise: unit normal, in the shape of `latents`; the same at every step, in both branches.
        sigma: noise level at which the network sees the known frames.
    """

    latents: Tensor
    noise: Tensor
    sigma: float = AUGMENT_SIGMA

    def held_at(self, sigma: float) -> bool:
        """Whether the known frames replace the state at this noise level."""
        return sigma > self.sigma


def make_sigmas(
    sampler: str, num_steps: int, *, sigma_min: float | None = None, sigma_max: float = SIGMA_MAX
) -> Tensor:
    """Noise levels that `sample` goes through, one more than it makes steps.

    `res_2mid` makes num_steps // 2 steps, since each evaluates the network twice. After its last
    step, each `res_*` sampler evaluates once more, at the last noise level.
    """
    steps = num_steps // 2 if sampler == "res_2mid" else num_steps
    table = karras_sigmas if sampler == "edm_euler" else res_sigmas
    last = {} if sigma_min is None else {"sigma_min": sigma_min}
    return table(steps, sigma_max=sigma_max, **last)


def noise_ratios(sampler: str, num_steps: int, sigma_min: float | None = None) -> list[float]:
    """Deviation of noise over that of data, in each evaluation that `sample` makes."""
    sigmas = make_sigmas(sampler, num_steps, sigma_min=sigma_min).tolist()
    if sampler == "edm_euler":
        sigmas = sigmas[:-1]
    elif sampler == "res_2mid":
        halves = [math.sqrt(a * b) for a, b in pairwise(sigmas)]
        sigmas = sorted((*sigmas, *halves), reverse=True)
    return [sigma / SIGMA_DATA for sigma in sigmas]


def sample(
    network: Network,
    noise: Tensor,
    *,
    sampler: str,
    num_steps: int,
    guidance: float,
    conditioning: Conditioning | None = None,
    reinsertion: str = "corrected",
    sigma_min: float | None = None,
    sigma_max: float = SIGMA_MAX,
) -> Steps:
    """Clean latents, float32, in the shape and on the device of `noise`.

    Args:
        network: called with float32, twice an evaluation (once where guidance is 0).
        noise: unit normal (B, C, T, H, W); scaled here to the first noise level.
        sampler: "edm_euler", whose state is float32 and whose last step removes all noise; or
            "res_2ab", "res_1euler" or "res_2mid", float64 where the device has it.
        num_steps: evaluations; the RES samplers make one more, at the end.
        guidance: scale of `guided`.
        conditioning: known frames. `edm_euler` steps from the state that holds them, the RES
            samplers from their own state.
        reinsertion: "corrected" puts the known latents into each estimate; "march_2025" does as
            the first release of Cosmos-Predict1 did, whose known frames come out scaled (by
            about 1.59 at 35 steps). For `edm_euler` only.
        sigma_min: last noise level above 0; None takes the sampler's own.
        sigma_max: first noise level.
    """
    sigmas = make_sigmas(sampler, num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
    noise = noise.float()
    known = conditioning or Conditioning(noise[:, :, :0], noise[:, :, :0])
    clean, count = known.latents.to(noise), known.latents.shape[2]
    noised = clean + known.sigma * known.noise.to(noise)
    seen = noised * precondition(known.sigma).scale  # by the network

    def inject(x: Tensor, sigma: float) -> Tensor:
        """State with the known frames in place, such that the network sees `seen` there."""
        if not known.held_at(sigma):
            return x
        return torch.cat([seen / precondition(sigma).scale, x[:, :, count:]], 2)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        """Estimate of the clean latents, float32, from `x` after `inject`, float32."""
        skip, out, scale, time = precondition(sigma)
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        scaled = scale * x
        output = guided(lambda conditional: network(scaled, times, conditional), guidance)
        denoised = skip * x + out * output
        if known.held_at(sigma):
            denoised[:, :, :count] = clean
            if reinsertion == "march_2025":
                # The first release put gt / c_out - c_skip x in place of F, a bracket too early.
                denoised[:, :, :count] += skip * (1 - out) * x[:, :, :count]
        return denoised

    if sampler == "edm_euler":
        # not sigma_max alone: the variance of data is taken as 1
        start = noise * math.hypot(sigma_max, 1)
        return (yield from euler(denoise, start, sigmas, before_step=inject))

    def denoise_injected(x: Tensor, sigma: float) -> Tensor:
        return denoise(inject(x.float(), sigma), sigma)

    solve = {"res_2ab": res_2ab, "res_1euler": euler, "res_2mid": res_2mid}[sampler]
    # float64 as in the reference; Apple's GPUs have none
    state = noise if noise.device.type == "mps" else noise.double()
    state = yield from solve(denoise_injected, state * sigma_max, sigmas)
    return denoise_injected(state, sigmas[-1].item())  # the estimate at the last noise level
