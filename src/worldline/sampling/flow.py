"""Sampling of rectified flows: Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/models/{text,video}2world_model_rectified_
flow.py` and `fm_solvers_unipc.py`; the solver is UniPC-2 (bh2) of arXiv 2302.04867.
Axes: B batch, C channels, T/H/W latent grid.

At noise level s, from 1 (noise) to 0 (data), the state is (1 - s) data + s noise, and a network
gives the velocity noise - data, so that state - s velocity estimates the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from worldline.choices import ScheduleName
from worldline.sampling.guidance import check_guidance, guided
from worldline.sampling.schedules import res_sigmas
from worldline.sampling.solvers import OnStep

SHIFT = 5.0
# of the Karras table, in the terms of EDM, where the state is data + sigma noise
SIGMA_MIN, SIGMA_MAX = 0.01, 200.0
TIMESTEPS = 1000  # that the noise level 1 stands for
# known frames are shown to `2B/post-trained` as almost free of noise
KNOWN_TIMESTEP = 0.1

# (state with the known frames in it, timesteps (B, 1) or (B, T), branch with the prompt?)
# -> velocity, in any floating dtype
Network = Callable[[Tensor, Tensor, bool], Tensor]
Velocity = Callable[[Tensor, int], Tensor]  # (state, index of the noise level) -> velocity


class Schedule(NamedTuple):
    """The noise levels that a sampler goes through.

    Attributes:
        sigmas: (evaluations + 1,), falling from below 1 to 0, float32.
        timesteps: (evaluations,) that the network is told, int64.
    """

    sigmas: Tensor
    timesteps: Tensor


def make_schedule(name: ScheduleName, num_steps: int, *, shift: float = SHIFT) -> Schedule:
    """Return a schedule on the CPU.

    Args:
        name: "shifted" evaluates the network `num_steps` times; "karras", which only
            `2B/post-trained` was made for, once more.
        num_steps: 1 or more.
        shift: of "shifted": 1 is evenly spaced, above it more levels are near noise.

    Raises:
        ValueError: an argument is out of range.
    """
    if name not in get_args(ScheduleName):
        raise ValueError(f"schedule {name!r} is none of {', '.join(get_args(ScheduleName))}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} is below 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift} is not above 0")
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
class Given:
    """Latent frames that are known: the network sees them clean at every step.

    The condition mask, which marks them for the network, is the caller's.

    Attributes:
        latents: (B, C, T', H, W) with T' >= `frames`; what follows those is not read.
        frames: latent frames that are known, 1 or more.
        timestep: what the network is told of these frames, such as KNOWN_TIMESTEP; None tells it
            the same timestep for all frames.
    """

    latents: Tensor
    frames: int
    timestep: float | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.latents.shape)
        if len(shape) != 5:
            raise ValueError(f"given latents have shape {shape}, not (B, C, T, H, W)")
        if not 1 <= self.frames <= shape[2]:
            raise ValueError(f"{self.frames} given frames are outside 1 to {shape[2]}")
        if self.timestep is not None and not 0 <= self.timestep < math.inf:
            raise ValueError(f"timestep {self.timestep} of the given frames is not 0 or more")


def guided_velocity(
    network: Network,
    noise: Tensor,
    schedule: Schedule,
    *,
    guidance: float,
    given: Given | None = None,
) -> Velocity:
    """Return the velocity of the guided network, float32, with what is known of the given frames.

    Args:
        network: called once with the prompt and, unless `guidance` is 0, once without.
        noise: (B, C, T, H, W) that the sampler starts from.
        schedule: whose indices the velocity takes.
        guidance: see `guided`.
        given: frames that are known; they move straight from their noise to their latents.

    Raises:
        ValueError: the given frames do not fit the noise, or guidance is no number.
    """
    check_guidance(guidance)
    timesteps = schedule.timesteps.tolist()
    batch, _, frames = noise.shape[:3]
    known: Tensor | None = None
    if given is not None:
        known = given.latents[:, :, : given.frames].to(noise.device, torch.float32)
        if known.shape != noise[:, :, : given.frames].shape:
            raise ValueError(
                f"given latents {tuple(given.latents.shape)} and noise {tuple(noise.shape)} differ"
            )

    def velocity(x: Tensor, index: int) -> Tensor:
        count = frames if given is not None and given.timestep is not None else 1
        times = torch.full((batch, count), timesteps[index], dtype=torch.float32, device=x.device)
        if given is not None and known is not None:
            x = torch.cat([known, x[:, :, given.frames :].float()], dim=2)
            if given.timestep is not None:
                times[:, : given.frames] = given.timestep
        y = guided(lambda conditional: network(x, times, conditional), guidance)
        if given is not None and known is not None:
            y = torch.cat([noise[:, :, : given.frames] - known, y[:, :, given.frames :]], dim=2)
        return y

    return velocity


def unipc(
    velocity: Velocity, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Carry `x` from noise level sigmas[0] to 0 by UniPC of order 2 (bh2), with its corrector.

    Args:
        velocity: called once a step.
        x: any shape.
        sigmas: (steps + 1,), falling from below 1 to 0.
        on_step: called after each step with its index, the state and the estimate of the data; may
            stop by raising.

    Raises:
        ValueError: the noise levels do not fall from below 1 to 0.
    """
    levels: list[float] = sigmas.tolist()
    falling = all(sigma > target for sigma, target in pairwise(levels))
    if len(levels) < 2 or not falling or levels[0] >= 1 or levels[-1] != 0:
        raise ValueError(f"sigmas {levels} do not fall, two values or more, from below 1 to 0")
    steps = len(levels) - 1
    # Every number is a float32 of the CPU, made in the order of the reference: a guided network
    # may turn a last bit of one into a difference that can be seen.
    table = sigmas.float().cpu()
    logs = (1 - table).log() - table.log()
    estimates: list[Tensor] = []  # of the data: this step's last, two before it at most
    start, order = x, 0  # of the step before: the state it started from, its order
    for step in range(steps):
        estimates = [*estimates[-2:], x - table[step] * velocity(x, step)]
        if step > 0:
            x = _corrected(start, estimates, table, logs, step, order)
        start, order = x, min(2, step + 1, steps - step)
        x = _predicted(start, estimates, table, logs, step, order)
        if on_step is not None:
            on_step(step, x, estimates[-1])
    return x


def _advanced(
    x: Tensor,
    estimate: Tensor,
    change: Tensor | None,
    sigma: Tensor,
    target: Tensor,
    growth: Tensor,
) -> Tensor:
    """Return the state at `target`.

    Args:
        x: state at `sigma`.
        estimate: of the data at `sigma`.
        change: by which the mean estimate on the way differs from it.
        sigma: from where, ().
        target: to where, ().
        growth: expm1(-h), (), h the step in log signal-to-noise.
    """
    weight = (1 - target) * growth
    y = (target / sigma) * x - weight * estimate
    return y if change is None else y - weight * change


def _predicted(
    x: Tensor,
    estimates: list[Tensor],
    table: Tensor,
    logs: Tensor,
    step: int,
    order: int,
) -> Tensor:
    """Return the state at the next level; see `_corrected`."""
    h = logs[step + 1] - logs[step]
    change = None
    if order == 2:
        r = (logs[step - 1] - logs[step]) / h
        change = 0.5 * ((estimates[-2] - estimates[-1]) / r)
    return _advanced(x, estimates[-1], change, table[step], table[step + 1], torch.expm1(-h))


def _corrected(
    x: Tensor,
    estimates: list[Tensor],
    table: Tensor,
    logs: Tensor,
    step: int,
    order: int,
) -> Tensor:
    """Return the state at this level once more, now that the estimate there is known.

    Args:
        x: state that the step to this level started from.
        estimates: of the data; the last is at this level, of the predicted state.
        table: noise levels.
        logs: their log signal-to-noise.
        step: this level.
        order: of the prediction.
    """
    h = logs[step] - logs[step - 1]
    growth = torch.expm1(-h)
    before = estimates[-2]
    change = estimates[-1] - before
    if order == 1:
        change = 0.5 * change
    else:
        r = (logs[step - 2] - logs[step - 1]) / h
        a = growth / -h - 1
        wanted = torch.stack([a / growth, 2 * (a / -h - 0.5) / growth])
        one = torch.ones_like(r)
        earlier, later = torch.linalg.solve(torch.stack([one, one, r, one]).view(2, 2), wanted)
        change = earlier * ((estimates[-3] - before) / r) + later * change
    return _advanced(x, before, change, table[step - 1], table[step], growth)


def sample(
    network: Network,
    noise: Tensor,
    *,
    schedule: ScheduleName,
    num_steps: int,
    guidance: float,
    given: Given | None = None,
    on_step: OnStep | None = None,
    shift: float = SHIFT,
) -> Tensor:
    """Return clean latents, float32, in the shape and on the device of `noise`.

    Given frames leave with a trace of noise, (1 - sigmas[0]) of them short: the state itself is
    never overwritten, as in the reference.

    Args:
        network: called with float32, twice an evaluation (once where guidance is 0).
        noise: unit normal (B, C, T, H, W).
        schedule: see `make_schedule`, as `num_steps` and `shift`.
        num_steps: 1 or more.
        guidance: see `guided`.
        given: frames that are known.
        on_step: called after each step with its index, the state after it and the estimate of
            clean latents; `len(make_schedule(...).timesteps)` times. May stop by raising.
        shift: of the schedule "shifted".

    Raises:
        ValueError: an argument is out of range.
    """
    levels = make_schedule(schedule, num_steps, shift=shift)
    noise = noise.float()
    velocity = guided_velocity(network, noise, levels, guidance=guidance, given=given)
    return unipc(velocity, noise, levels.sigmas, on_step=on_step)
