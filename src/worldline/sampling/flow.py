"""Sampling of rectified flows: Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/models/{text,video}2world_model_rectified_
flow.py` and `fm_solvers_unipc.py`; the solver is UniPC-2 (bh2) of arXiv 2302.04867.
Axes: B batch, C channels, T/H/W latent grid.

At noise level s, from 1 (noise) to 0 (data), the state is (1 - s) data + s noise, and a network
gives the velocity noise - data, so that state - s velocity estimates the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from worldline.sampling.solvers import Stepped, Steps, guided, res_sigmas

SHIFT = 5.0
# of the Karras table, in the terms of EDM, where the state is data + sigma noise
SIGMA_MIN, SIGMA_MAX = 0.01, 200.0
TIMESTEPS = 1000  # the timestep of noise level 1

# (state with the known frames in it, timesteps (B, 1) or (B, T), branch with the prompt?)
# -> velocity, in any floating dtype
Network = Callable[[Tensor, Tensor, bool], Tensor]
Velocity = Callable[[Tensor, int], Tensor]  # (state, index of the noise level) -> velocity


class Schedule(NamedTuple):
    """Noise levels and timesteps of a sampler."""

    sigmas: Tensor  # (evaluations + 1,), falling from below 1 to 0, float32
    timesteps: Tensor  # (evaluations,), the network's time, int64


def make_schedule(name: str, num_steps: int, *, shift: float = SHIFT) -> Schedule:
    """Schedule on the CPU.

    Args:
        name: "shifted" evaluates the network `num_steps` times; "karras", which only
            `2B/post-trained` was made for, once more.
        num_steps: 1 or more.
        shift: of "shifted": 1 is evenly spaced, above it more levels are near noise.
    """
    if name == "karras":  # the curve of EDM without its 0; `karras_sigmas` ends with one
        levels = res_sigmas(num_steps, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        levels = levels / (1 + levels)
    else:
        start = torch.tensor(1 - 1 / TIMESTEPS, dtype=torch.float32).item()
        share = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)[:-1]
        levels = shift * share / (1 + (shift - 1) * share)
    # truncated before the levels are rounded to float32, which can pass a whole number
    timesteps = (TIMESTEPS * levels).long()
    return Schedule(torch.cat([levels, levels.new_zeros(1)]).float(), timesteps)


@dataclass(frozen=True)
class Conditioning:
    """Known latent frames at the start of a clip: the network sees them clean at every step.

    The condition mask, which marks them for the network, is the caller's.

    Attributes:
        latents: (B, C, known frames, H, W).
        timestep: the network's time of these frames; None is that of the other frames.
    """

    latents: Tensor
    timestep: float | None = None


def guided_velocity(
    network: Network,
    noise: Tensor,
    schedule: Schedule,
    *,
    guidance: float,
    conditioning: Conditioning | None = None,
) -> Velocity:
    """Velocity of the guided network, float32; known frames move straight to their latents.

    They leave with a trace of noise, (1 - sigmas[0]) of them short: the state itself is never
    overwritten, as in the reference.

    Args:
        network: called with float32, twice an evaluation (once where guidance is 0).
        noise: unit normal (B, C, T, H, W), float32, from which `unipc` starts.
        schedule: of `make_schedule`; a step for each timestep.
        guidance: scale of `guided`.
        conditioning: known frames.
    """
    conditioning = conditioning or Conditioning(noise[:, :, :0])
    known, timestep = conditioning.latents.to(noise), conditioning.timestep
    count = known.shape[2]
    shape = len(noise), 1 if timestep is None else noise.shape[2]
    timesteps = schedule.timesteps.tolist()

    def velocity(x: Tensor, index: int) -> Tensor:
        times = torch.full(shape, timesteps[index], dtype=torch.float32, device=x.device)
        if timestep is not None:
            times[:, :count] = timestep
        x = torch.cat([known, x[:, :, count:]], dim=2)
        y = guided(lambda conditional: network(x, times, conditional), guidance)
        return torch.cat([noise[:, :, :count] - known, y[:, :, count:]], dim=2)

    return velocity


def unipc(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Steps:
    """Carry `x` from noise level sigmas[0] to 0 by UniPC of order 2 (bh2), with its corrector.

    The first step and the last are of order 1.
    """
    # Every number is a float32 of the CPU, made in the order of the reference: a guided network
    # may turn a last bit of one into a difference that can be seen.
    table = sigmas.float().cpu()
    h = ((1 - table).log() - table.log()).diff()  # of the log signal-to-noise
    ratios, weights = table[1:] / table[:-1], (1 - table[1:]) * torch.expm1(-h)

    def advanced(x: Tensor, estimate: Tensor, change: Tensor | float, step: int) -> Tensor:
        """State at the end of a step; `change` is the mean estimate on the way less `estimate`."""
        return ratios[step] * x - weights[step] * estimate - weights[step] * change

    r = -h[:-1] / h[1:]
    start = estimate = x  # of the step before
    slope: Tensor | float = 0.0  # of the estimates, before this step
    for step in range(len(h)):
        clean = x - table[step] * velocity(x, step)  # estimate of the data
        if step > 0:
            change = 0.5 * (clean - estimate)
            if step > 1:
                earlier, later = _corrector_weights(h[step - 1], r[step - 2])
                change = earlier * slope + later * (clean - estimate)
            x = advanced(start, estimate, change, step - 1)
        start, slope = x, 0.0
        if 0 < step < len(h) - 1:
            slope = (estimate - clean) / r[step - 1]
        estimate = clean
        x = advanced(x, estimate, 0.5 * slope, step)
        yield Stepped(x, estimate)
    return x


def _corrector_weights(h: Tensor, r: Tensor) -> Tensor:
    """Weights (2,) of the slope before a step and of the change of the estimate during it."""
    growth = torch.expm1(-h)
    a = growth / -h - 1
    wanted = torch.stack([a / growth, 2 * (a / -h - 0.5) / growth])
    one = torch.ones_like(r)
    return torch.linalg.solve(torch.stack([one, one, r, one]).view(2, 2), wanted)
