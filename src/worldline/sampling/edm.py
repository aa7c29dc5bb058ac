"""Sampling of EDM networks: Text2World and Video2World of Cosmos 1.0 and Cosmos-Predict1.

Sources: preconditioning arXiv 2206.00364, table 1; `edm_euler` is run by
nvidia-cosmos/cosmos-predict1 `diffusion/model/model_t2w.py` and `model_v2w.py`, the `res_*`
samplers by NVIDIA/Cosmos `cosmos1/models/diffusion/model/model_t2w.py` and `model_v2w.py`.
Axes: B batch, C channels, T/H/W latent grid.

A network F is asked for F(c_in x, c_noise), and c_skip x + c_out F estimates the clean latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from worldline.choices import SAMPLERS, Reinsertion
from worldline.sampling.guidance import check_guidance, guided
from worldline.sampling.schedules import karras_sigmas, res_sigmas
from worldline.sampling.solvers import OnStep, euler, res_2ab, res_2mid

SIGMA_DATA = 0.5
SIGMA_MAX = 80.0
AUGMENT_SIGMA = 0.001

# (latents already times c_in, c_noise (B,), branch with the prompt?) -> F, in any floating dtype
Network = Callable[[Tensor, Tensor, bool], Tensor]
Number = TypeVar("Number", float, Tensor)


class Preconditioning(NamedTuple, Generic[Number]):
    """What a noise level multiplies the parts of an estimate by.

    Attributes:
        skip: of the noised latents.
        out: of the network's output.
        scale: of the network's input, c_in.
        noise: c_noise, the network's time.
    """

    skip: Number
    out: Number
    scale: Number
    noise: Number


def precondition(sigma: Number) -> Preconditioning[Number]:
    """Return the factors at a noise level (arXiv 2206.00364, table 1).

    Args:
        sigma: 0 or more, a number, for which `noise` is minus infinity at 0; or above 0, of any
            shape, float32: factors differ by five orders of magnitude.
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
class Given:
    """Frames that are known and continued (Video2World).

    While the noise level is above `sigma`, the network sees these frames with noise of that level
    in place of its own state. From there on they are denoised like all others. The condition mask,
    which marks them for the network, is the caller's, and stays as it is to the end.

    Attributes:
        latents: (B, C, T, H, W); what follows the first `frames` latent frames is not read.
        frames: latent frames that are known, 1 to T.
        noise: unit normal, in the shape of `latents`; the same at every step, in both branches.
        sigma: noise level that the known frames are shown with.
    """

    latents: Tensor
    frames: int
    noise: Tensor
    sigma: float = AUGMENT_SIGMA

    def __post_init__(self) -> None:
        shape = tuple(self.latents.shape)
        if len(shape) != 5:
            raise ValueError(f"given latents have shape {shape}, not (B, C, T, H, W)")
        if tuple(self.noise.shape) != shape:
            raise ValueError(f"noise {tuple(self.noise.shape)} of given latents {shape}")
        if not 1 <= self.frames <= shape[2]:
            raise ValueError(f"{self.frames} given frames are outside 1 to {shape[2]}")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma {self.sigma} of the given frames is not 0 or more")

    def known_at(self, sigma: float) -> bool:
        """Tell whether the known frames are held at this noise level."""
        return sigma > self.sigma


class _Denoiser:
    """The guided network as a denoiser, and the known frames in its input and output."""

    def __init__(
        self,
        network: Network,
        guidance: float,
        given: Given | None,
        reinsertion: Reinsertion,
        device: torch.device,
    ) -> None:
        self.network = network
        self.guidance = guidance
        self.given = given
        self.reinsertion = reinsertion
        if given is not None:
            cut = slice(given.frames)
            self.clean = given.latents[:, :, cut].to(device, torch.float32)
            noised = self.clean + given.sigma * given.noise[:, :, cut].to(device, torch.float32)
            self.shown = noised * precondition(given.sigma).scale  # what the network sees of them

    def inject(self, x: Tensor, sigma: float) -> Tensor:
        """Return `x` with the known frames such that the network will see `shown` there."""
        if self.given is None or not self.given.known_at(sigma):
            return x
        x = x.clone()
        x[:, :, : self.given.frames] = self.shown / precondition(sigma).scale
        return x

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Return the estimate of the clean latents, float32, from `x` after `inject`, float32."""
        skip, out, scale, noise = precondition(sigma)
        times = torch.full((x.shape[0],), noise, dtype=torch.float32, device=x.device)
        scaled = scale * x
        output = guided(lambda conditional: self.network(scaled, times, conditional), self.guidance)
        denoised = skip * x + out * output
        if self.given is not None and self.given.known_at(sigma):
            known = self.clean
            if self.reinsertion == "march_2025":
                # The first release put gt / c_out - c_skip x in place of F, a bracket too early.
                known = known + skip * (1 - out) * x[:, :, : self.given.frames]
            denoised[:, :, : self.given.frames] = known
        return denoised


def _intervals(sampler: str, num_steps: int) -> int:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}")
    per_step = 2 if sampler == "res_2mid" else 1  # evaluations
    if num_steps < per_step:
        raise ValueError(f"num_steps {num_steps} is below {per_step}, the least of {sampler}")
    return num_steps // per_step


def make_sigmas(
    sampler: str,
    num_steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float = SIGMA_MAX,
) -> Tensor:
    """Return the noise levels that `sample` goes through, one more than it makes steps.

    `res_2mid` makes num_steps // 2 steps, since each evaluates the network twice. After its last
    step, each `res_*` sampler evaluates once more, at the last noise level.

    Raises:
        ValueError: an argument is out of range.
    """
    count = _intervals(sampler, num_steps)
    table = karras_sigmas if sampler == "edm_euler" else res_sigmas
    if sigma_min is None:
        return table(count, sigma_max=sigma_max)
    return table(count, sigma_min=sigma_min, sigma_max=sigma_max)


def sample(
    network: Network,
    noise: Tensor,
    *,
    sampler: str,
    num_steps: int,
    guidance: float,
    given: Given | None = None,
    reinsertion: Reinsertion = "corrected",
    on_step: OnStep | None = None,
    sigma_min: float | None = None,
    sigma_max: float = SIGMA_MAX,
) -> Tensor:
    """Return clean latents, float32, in the shape and on the device of `noise`.

    Args:
        network: called with float32, twice an evaluation (once where guidance is 0).
        noise: unit normal (B, C, T, H, W); scaled here to the first noise level.
        sampler: "edm_euler" as Cosmos-Predict1 is sampled (the last step removes all noise), or
            "res_2ab" as Cosmos 1.0 is, or "res_1euler" or "res_2mid". The state of `edm_euler`
            is float32, of the others float64 where the device has it.
        num_steps: evaluations; the RES samplers make one more, at the end.
        guidance: see `guided`.
        given: frames that are known. `edm_euler` steps from the state that shows them,
            the RES samplers from their own state.
        reinsertion: "corrected" puts the known latents into each estimate; "march_2025" does as
            the first release of Cosmos-Predict1 did, whose known frames come out scaled (by
            about 1.59 at 35 steps). For `edm_euler` only.
        on_step: called after each step with its index, the state after it and the estimate of
            clean latents; `len(make_sigmas(...)) - 1` times. May stop by raising.
        sigma_min: noise level before the end; None takes the sampler's own.
        sigma_max: noise level of the start.

    Raises:
        ValueError: an argument is out of range.
    """
    sigmas = make_sigmas(sampler, num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
    check_guidance(guidance)
    if reinsertion not in get_args(Reinsertion):
        raise ValueError(f"reinsertion {reinsertion!r} is none of {get_args(Reinsertion)}")
    if reinsertion == "march_2025" and sampler != "edm_euler":
        raise ValueError(f"reinsertion 'march_2025' is of the sampler edm_euler, not of {sampler}")
    if given is not None and given.latents.shape != noise.shape:
        raise ValueError(
            f"given latents {tuple(given.latents.shape)} and noise {tuple(noise.shape)} differ"
        )
    noise = noise.float()
    denoiser = _Denoiser(network, guidance, given, reinsertion, noise.device)
    if sampler == "edm_euler":
        return euler(
            denoiser.denoise,
            noise * math.hypot(sigma_max, 1),  # not sigma_max: the variance of data is taken as 1
            sigmas,
            before_step=denoiser.inject,
            on_step=on_step,
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return denoiser.denoise(denoiser.inject(x.float(), sigma), sigma)

    solve = {"res_2ab": res_2ab, "res_1euler": euler, "res_2mid": res_2mid}[sampler]
    # float64 as in the reference; Apple's GPUs have none
    state = noise if noise.device.type == "mps" else noise.double()
    state = solve(denoise, state * sigma_max, sigmas, on_step=on_step)
    return denoise(state, sigmas[-1].item())  # the clean estimate at the last noise level
