"""For Gaussian data the velocity and the end of the path are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from worldline.sampling.flow import (
    Conditioning,
    Network,
    Velocity,
    guided_velocity,
    make_schedule,
    unipc,
)
from worldline.sampling.solvers import Steps, finish, standard_noise

KNOWN_TIMESTEP = 0.1
SHAPE = (2, 3, 4, 2, 2)  # (B, C, T, H, W)
DATA_STD = 0.3


def spread(sigma: float) -> float:
    """Standard deviation of the state."""
    return math.hypot((1 - sigma) * DATA_STD, sigma)


def gaussian(sigmas: Tensor) -> Velocity:
    def velocity(x: Tensor, index: int) -> Tensor:
        sigma = sigmas[index].item()
        # the mean of noise - data, given the state
        return x * (sigma - (1 - sigma) * DATA_STD**2) / spread(sigma) ** 2

    return velocity


def network(latents: Tensor, timesteps: Tensor, conditional: bool) -> Tensor:
    """One that hears everything it is given."""
    times = timesteps[:, None, :, None, None] / 1000
    return (0.5 + 0.2 * conditional) * latents.roll(1, 2) - 0.1 * times


def steps_of(
    name: Any = "shifted", num_steps: int = 8, network: Network = network, **options: Any
) -> Steps:
    schedule = make_schedule(name, num_steps, shift=options.pop("shift", 5.0))
    noise = standard_noise(1, SHAPE)
    velocity = guided_velocity(network, noise, schedule, **{"guidance": 2.0, **options})
    return unipc(velocity, noise, schedule.sigmas)


def run(**options: Any) -> Tensor:
    return finish(steps_of(**options))


@pytest.mark.parametrize("steps", [1, 2, 10, 35, 200])
@pytest.mark.parametrize("name", ["shifted", "karras"])
def test_a_schedule_falls_from_noise_to_data(name: Any, steps: int) -> None:
    sigmas, timesteps = make_schedule(name, steps)
    evaluations = steps + (name == "karras")
    assert (sigmas.dtype, timesteps.dtype) == (torch.float32, torch.int64)
    assert (len(sigmas), len(timesteps)) == (evaluations + 1, evaluations)
    assert (sigmas.diff() < 0).all()
    assert 0.99 < sigmas[0] < 1
    assert sigmas[-1] == 0
    assert ((1000 * sigmas[:-1] - timesteps) < 1 + 1e-4).all()
    assert ((1000 * sigmas[:-1] - timesteps) > -1e-4).all()


def test_the_released_schedules() -> None:
    shifted, karras = (make_schedule(n, 35).timesteps.tolist() for n in ("shifted", "karras"))
    assert shifted[:5] + shifted[-3:] == [999, 993, 987, 981, 974, 318, 232, 128]
    assert karras[:5] + karras[-3:] == [995, 994, 993, 992, 990, 30, 17, 9]
    assert make_schedule("karras", 35).sigmas[0].item() == pytest.approx(200 / 201)


def test_without_shift_levels_are_evenly_spaced() -> None:
    sigmas = make_schedule("shifted", 10, shift=1.0).sigmas
    torch.testing.assert_close(sigmas.diff(), torch.full((10,), -0.0999))
    # a shift divides data by noise, at every level
    more = make_schedule("shifted", 10, shift=3.0).sigmas
    odds = [((1 - table) / table)[:-1] for table in (sigmas, more)]
    torch.testing.assert_close(odds[0] / 3, odds[1], rtol=1e-3, atol=0)


def error(steps: int) -> float:
    sigmas = make_schedule("shifted", steps, shift=1.0).sigmas.double()
    x = torch.tensor([2.0, -0.7], dtype=torch.float64)
    exact = x * DATA_STD / spread(sigmas[0].item())
    return (finish(unipc(gaussian(sigmas), x, sigmas)) - exact).abs().max().item()


def test_order() -> None:
    assert error(200) / error(400) == pytest.approx(4, rel=0.1)
    assert error(400) < 1e-4


def test_path_towards_a_single_point_is_exact() -> None:
    # all data at one point: the estimate does not change along the way, so no step can be too long
    point = torch.tensor([0.3, -2.0], dtype=torch.float64)
    start = torch.tensor([1.0, 0.5], dtype=torch.float64)
    sigmas = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    steps = unipc(lambda x, index: (x - point) / sigmas[index], start, sigmas)
    for step, sigma in zip(steps, sigmas[1:], strict=True):
        torch.testing.assert_close(step.x, point + (start - point) * (sigma / 0.9))


def test_one_step_is_the_estimate() -> None:
    x, sigmas = torch.randn(5), torch.tensor([0.9, 0.0])
    end = finish(unipc(lambda x, _index: 2 * x, x, sigmas))
    torch.testing.assert_close(end, x - 0.9 * 2 * x)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 35])
def test_diffusers_takes_the_same_steps(steps: int) -> None:
    """To the last bit, since a steep field makes much of one."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_max=200.0,
        sigma_min=0.01,
    )
    scheduler.set_timesteps(steps + 1)
    sigmas = make_schedule("karras", steps).sigmas
    torch.testing.assert_close(scheduler.sigmas, sigmas)
    scheduler.sigmas = sigmas

    def velocity(x: Tensor, index: int) -> Tensor:
        return 5.3 * x - 1.6 * torch.sin(3 * x) + 0.1 * index

    theirs = standard_noise(3, SHAPE)
    states = [step.x for step in unipc(velocity, theirs, sigmas)]
    assert len(states) == len(scheduler.timesteps) == steps + 1
    for index, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity(theirs, index), time, theirs, return_dict=False)[0]
        assert torch.equal(states[index], theirs)


def test_steps() -> None:
    steps = list(steps_of())
    assert len(steps) == 8
    # the last step leaves no noise: the state is the estimate
    torch.testing.assert_close(steps[-1].x, steps[-1].denoised)
    assert torch.equal(steps[-1].x, run())


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_what_the_network_is_given(guidance: float) -> None:
    seen: list[tuple[int, bool]] = []

    def asked(latents: Tensor, timesteps: Tensor, conditional: bool) -> Tensor:
        assert latents.dtype == timesteps.dtype == torch.float32
        assert latents.shape == SHAPE
        assert timesteps.shape == (2, 1)
        seen.append((int(timesteps[0, 0]), conditional))
        return latents.bfloat16()

    end = run(network=asked, guidance=guidance, name="karras")
    assert (end.dtype, end.shape) == (torch.float32, SHAPE)
    branches = [True, False] if guidance else [True]
    timesteps = make_schedule("karras", 8).timesteps.tolist()
    assert seen == [(time, branch) for time in timesteps for branch in branches]


def test_a_batch_gives_what_each_gives_alone() -> None:
    noise = standard_noise(1, SHAPE)
    clean, schedule = standard_noise(2, SHAPE)[:, :, :2], make_schedule("karras", 5)

    def sampled(rows: slice) -> Tensor:
        known = Conditioning(clean[rows], KNOWN_TIMESTEP)
        velocity = guided_velocity(network, noise[rows], schedule, guidance=1.0, conditioning=known)
        return finish(unipc(velocity, noise[rows], schedule.sigmas))

    both = sampled(slice(2))
    for row in range(2):
        alone = sampled(slice(row, row + 1))
        torch.testing.assert_close(alone, both[row : row + 1])


@pytest.mark.parametrize("timestep", [None, KNOWN_TIMESTEP])
def test_known_frames_are_seen_clean_at_their_own_timestep(timestep: float | None) -> None:
    clean, times = standard_noise(2, SHAPE), make_schedule("shifted", 8).timesteps.tolist()
    seen: list[Tensor] = []

    def asked(latents: Tensor, timesteps: Tensor, conditional: bool) -> Tensor:
        assert torch.equal(latents[:, :, :2], clean[:, :, :2])
        seen.append(timesteps)
        return network(latents, timesteps, conditional)

    run(network=asked, conditioning=Conditioning(clean[:, :, :2], timestep))
    for index, timesteps in enumerate(seen[::2]):
        if timestep is None:
            assert torch.equal(timesteps, torch.full((2, 1), float(times[index])))
        else:
            wanted = torch.tensor([timestep] * 2 + [float(times[index])] * 2)
            assert torch.equal(timesteps, wanted.expand(2, -1))


@pytest.mark.parametrize("name", ["shifted", "karras"])
def test_known_frames_leave_with_a_trace_of_noise(name: Any) -> None:
    clean, noise = standard_noise(2, SHAPE), standard_noise(1, SHAPE)
    end = run(conditioning=Conditioning(clean[:, :, :2]), name=name, num_steps=20)
    left = 1 - make_schedule(name, 20).sigmas[0]
    wanted = clean + left * (noise - clean)
    torch.testing.assert_close(end[:, :, :2], wanted[:, :, :2], rtol=0, atol=1e-5)


def test_the_velocity_of_known_frames_is_not_the_networks() -> None:
    clean, noise = standard_noise(2, SHAPE), standard_noise(1, SHAPE)
    schedule = make_schedule("shifted", 4)
    nowhere: Network = lambda latents, _times, _branch: torch.full_like(latents, torch.nan)  # noqa: E731
    known = Conditioning(clean[:, :, :3])
    velocity = guided_velocity(nowhere, noise, schedule, guidance=7, conditioning=known)
    y = velocity(noise, 0)
    assert torch.equal(y[:, :, :3], (noise - clean)[:, :, :3])
    assert y[:, :, 3:].isnan().all()
