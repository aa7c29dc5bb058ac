"""Sampling of rectified flows: Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/models/{text,video}2world_model_rectified_
flow.py` and `fm_solvers_unipc.py`; the solver is UniPC-2 (bh2) of arXiv 2302.04867.
Axes: B batch, C channels, T/H/W latent grid.

At noise level s, from 1 (noise) to 0 (data), the state is (1 - s) data + s noise, and a network
gives the velocity noise - data, so that state - s velocity estimates the data.
"""

from __future__ import annotations

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
    if name == "karras":
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
    """Velocity of the guided network, float32; known frames move straight to their latents."""
    conditioning = conditioning or Conditioning(noise[:, :, :0])
    known, timestep = conditioning.latents.to(noise.device, torch.float32), conditioning.timestep
    count = known.shape[2]
    shape = len(noise), 1 if timestep is None else noise.shape[2]
    timesteps = schedule.timesteps.tolist()

    def velocity(x: Tensor, index: int) -> Tensor:
        times = torch.full(shape, timesteps[index], dtype=torch.float32, device=x.device)
        if timestep is not None:
            times[:, :count] = timestep
        x = torch.cat([known, x[:, :, count:].float()], dim=2)
        y = guided(lambda conditional: network(x, times, conditional), guidance)
        return torch.cat([noise[:, :, :count] - known, y[:, :, count:]], dim=2)

    return velocity


def unipc(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Steps:
    """Carry `x` from noise level sigmas[0] to 0 by UniPC of order 2 (bh2), with its corrector."""
    steps = len(sigmas) - 1
    # Every number is a float32 of the CPU, made in the order of the reference: a guided network
    # may turn a last bit of one into a difference that can be seen.
    table = sigmas.float().cpu()
    logs = (1 - table).log() - table.log()  # log signal-to-noise
    estimates: list[Tensor] = []  # of the data: this step's last, two before it at most
    start, order = x, 0  # of the step before: the state it started from, its order
    for step in range(steps):
        estimates = [*estimates[-2:], x - table[step] * velocity(x, step)]
        change: Tensor | None
        if step > 0:
            change = _corrector_change(estimates, logs[: step + 1], order)
            x = _advanced(start, estimates[-2], change, table[step - 1 :], logs[step - 1 :])
        start, order = x, min(2, step + 1, steps - step)
        change = None
        if order == 2:
            r = (logs[step - 1] - logs[step]) / (logs[step + 1] - logs[step])
            change = 0.5 * ((estimates[-2] - estimates[-1]) / r)
        x = _advanced(start, estimates[-1], change, table[step:], logs[step:])
        yield Stepped(x, estimates[-1])
    return x


def _advanced(
    x: Tensor, estimate: Tensor, change: Tensor | None, table: Tensor, logs: Tensor
) -> Tensor:
    """State at the next noise level, from state and estimate of the data at this one.

    `table` and `logs` begin at this level. `change` is the mean estimate on the way less
    `estimate`; None for order 1.
    """
    weight = (1 - table[1]) * torch.expm1(-(logs[1] - logs[0]))
    y = (table[1] / table[0]) * x - weight * estimate
    return y if change is None else y - weight * change


def _corrector_change(estimates: list[Tensor], logs: Tensor, order: int) -> Tensor:
    """Mean estimate of the last step less that at its start, now that the one at its end is known.

    `estimates` and `logs` end at this level, `order` is that of the prediction.
    """
    change = estimates[-1] - estimates[-2]
    if order == 1:
        return 0.5 * change
    h = logs[-1] - logs[-2]
    growth = torch.expm1(-h)
    r = (logs[-3] - logs[-2]) / h
    a = growth / -h - 1
    wanted = torch.stack([a / growth, 2 * (a / -h - 0.5) / growth])
    one = torch.ones_like(r)
    earlier, later = torch.linalg.solve(torch.stack([one, one, r, one]).view(2, 2), wanted)
    return earlier * ((estimates[-3] - estimates[-2]) / r) + later * change


def sample(
    network: Network,
    noise: Tensor,
    schedule: Schedule,
    *,
    guidance: float,
    conditioning: Conditioning | None = None,
) -> Steps:
    """Clean latents, float32, in the shape and on the device of `noise`.

    Known frames leave with a trace of noise, (1 - sigmas[0]) of them short: the state itself is
    never overwritten, as in the reference.

    Args:
        network: called with float32, twice an evaluation (once where guidance is 0).
        noise: unit normal (B, C, T, H, W).
        schedule: of `make_schedule`; a step for each timestep.
        guidance: scale of `guided`.
        conditioning: known frames.
    """
    noise = noise.float()
    velocity = guided_velocity(
        network, noise, schedule, guidance=guidance, conditioning=conditioning
    )
    return (yield from unipc(velocity, noise, schedule.sigmas))
