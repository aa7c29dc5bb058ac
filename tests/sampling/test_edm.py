from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from worldline.families.diffusion.request import Sampler
from worldline.sampling.edm import (
    SIGMA_DATA,
    Conditioning,
    Network,
    make_sigmas,
    precondition,
    sample,
)
from worldline.sampling.solvers import finish, standard_noise

SAMPLERS = get_args(Sampler)
SHAPE = (2, 3, 4, 2, 2)  # (B, C, T, H, W)
MEANS = {True: 0.4, False: -0.3}


def gaussian(std: float, means: dict[bool, float] = MEANS) -> Network:
    """The network that is right where the data are normal, with a mean for each branch."""

    def network(latents: Tensor, times: Tensor, conditional: bool) -> Tensor:
        sigma = math.exp(4 * times[0].item())
        skip, out, scale, _ = precondition(sigma)
        x = latents / scale
        clean = (std**2 * x + sigma**2 * means[conditional]) / (std**2 + sigma**2)
        return (clean - skip * x) / out

    return network


def known_frames(frames: int = 2, sigma: float = 0.001) -> Conditioning:
    clean, noise = (standard_noise(seed, SHAPE)[:, :, :frames] for seed in (5, 6))
    return Conditioning(0.5 * clean, noise, sigma)


def run(network: Network, sampler: str = "edm_euler", **options: Any) -> Tensor:
    settings = {"num_steps": 35, "guidance": 0.0, **options}
    return finish(sample(network, standard_noise(1, SHAPE), sampler=sampler, **settings))


def test_factors_keep_unit_variance() -> None:
    # EDM chooses them so that what the network reads and what it has to say have variance 1
    for sigma in (80.0, 1.0, 0.002):
        skip, out, scale, noise = precondition(sigma)
        assert (SIGMA_DATA**2 + sigma**2) * scale**2 == pytest.approx(1)
        wanted = (1 - skip) ** 2 * SIGMA_DATA**2 + skip**2 * sigma**2
        assert out**2 == pytest.approx(wanted)
        assert noise == pytest.approx(0.25 * math.log(sigma))
    assert precondition(0)[:3] == (1, 0, 1 / SIGMA_DATA)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaussian_data_are_reached(sampler: str) -> None:
    # the exact path: what exceeds the mean shrinks by the ratio of the standard deviations
    std, steps = 0.5, 400
    sigmas = make_sigmas(sampler, steps)
    top = math.hypot(80, 1) if sampler == "edm_euler" else 80.0
    excess = standard_noise(1, SHAPE) * top - MEANS[True]
    exact = MEANS[True] + excess * std / math.hypot(std, sigmas[0].item())
    off = (run(gaussian(std), sampler, num_steps=steps) - exact).abs().max().item()
    assert off < (0.03 if "euler" in sampler else 0.001)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_shifts_the_mean(sampler: str) -> None:
    # with equal spread, guided data are normal again, and their mean is the guided mean
    mean = MEANS[True] + 3 * (MEANS[True] - MEANS[False])
    guided = run(gaussian(0.5), sampler, guidance=3.0)
    direct = run(gaussian(0.5, {True: mean}), sampler)
    torch.testing.assert_close(guided, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_network_is_given(sampler: str) -> None:
    seen: list[tuple[float, bool]] = []

    def network(latents: Tensor, times: Tensor, conditional: bool) -> Tensor:
        assert latents.dtype == times.dtype == torch.float32
        assert times.shape == SHAPE[:1]
        assert latents.shape == SHAPE
        seen.append((math.exp(4 * times[0].item()), conditional))
        return latents.bfloat16()

    end = run(network, sampler, num_steps=6, guidance=1.0)
    assert (end.dtype, end.shape) == (torch.float32, SHAPE)
    assert [conditional for _, conditional in seen] == [True, False] * (len(seen) // 2)
    levels = [sigma for sigma, _ in seen[::2]]
    # 6 evaluations; the RES samplers end with one more, at the last level
    assert len(levels) == (6 if sampler == "edm_euler" else 7)
    if sampler == "res_2mid":
        levels = levels[::2]
    sigmas = make_sigmas(sampler, 6)
    expected = sigmas[:-1] if sampler == "edm_euler" else sigmas
    assert levels == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps(sampler: str) -> None:
    noise = standard_noise(1, SHAPE)
    steps = list(sample(gaussian(0.5), noise, sampler=sampler, num_steps=7, guidance=0.0))
    assert len(steps) == len(make_sigmas(sampler, 7)) - 1
    assert all(x.shape == denoised.shape == SHAPE for x, denoised in steps)
    assert all(denoised.dtype == torch.float32 for _, denoised in steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_frames_leave_as_they_came(sampler: str) -> None:
    # data spread out far more than the noise left at the end: nothing more is taken from the frames
    known = known_frames()
    end = run(gaussian(1e3), sampler, conditioning=known, guidance=2.0)
    if sampler == "edm_euler":  # below the level of the augmentation they are denoised like all
        torch.testing.assert_close(end[:, :, :2], known.latents, rtol=0, atol=2e-3)
    else:
        assert torch.equal(end[:, :, :2], known.latents)


def test_first_release_scales_the_known_frames() -> None:
    known = known_frames()
    sigmas = make_sigmas("edm_euler", 35).tolist()
    assert sum(known.held_at(sigma) for sigma in sigmas) == 33  # all but the last two steps
    factor = 2 - sigmas[33] / sigmas[32]
    end = run(gaussian(1e3), conditioning=known, reinsertion="march_2025")
    torch.testing.assert_close(end[:, :, :2], factor * known.latents, rtol=0, atol=6e-3)
    assert factor > 1.5
    # the frames to generate do not depend on it: this network looks at no neighbours
    right = run(gaussian(1e3), conditioning=known)
    assert torch.equal(right[:, :, 2:], end[:, :, 2:])


@pytest.mark.parametrize("sampler", ["edm_euler", "res_2ab"])
@pytest.mark.parametrize("augment", [0.001, 0.5])
def test_the_network_sees_known_frames_at_their_own_noise(sampler: str, augment: float) -> None:
    known = known_frames(1, augment)
    wanted = (known.latents + augment * known.noise) * precondition(augment).scale
    seen: list[tuple[bool, bool]] = []

    def network(latents: Tensor, times: Tensor, _conditional: bool) -> Tensor:
        sigma = math.exp(4 * times[0].item())
        same = torch.allclose(latents[:, :, :1], wanted, rtol=1e-4, atol=1e-5)
        seen.append((same, sigma > augment))
        return torch.zeros_like(latents)

    run(network, sampler, num_steps=12, conditioning=known)
    assert all(same == held for same, held in seen)
    assert seen[0] == (True, True)
    # once let go, they stay so
    assert [held for _, held in seen] == sorted((held for _, held in seen), reverse=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inputs_stay_as_they_are(sampler: str) -> None:
    noise, known = standard_noise(1, SHAPE), known_frames()
    before = noise.clone(), known.latents.clone()
    settings: dict[str, Any] = {"num_steps": 4, "guidance": 1.0, "conditioning": known}
    finish(sample(gaussian(1.0), noise, sampler=sampler, **settings))
    assert torch.equal(noise, before[0])
    assert torch.equal(known.latents, before[1])


def test_other_noise_levels() -> None:
    sigmas = make_sigmas("res_2ab", 15, sigma_min=0.02, sigma_max=40.0)
    assert (sigmas[0].item(), sigmas[-1].item()) == pytest.approx((40, 0.02))
    levels: list[float] = []

    def network(latents: Tensor, times: Tensor, _conditional: bool) -> Tensor:
        levels.append(math.exp(4 * times[0].item()))
        return torch.zeros_like(latents)

    run(network, "res_2ab", num_steps=15, sigma_min=0.02, sigma_max=40.0)
    assert levels == pytest.approx(sigmas.tolist(), rel=1e-5)


def test_fewest_steps() -> None:
    assert len(make_sigmas("edm_euler", 1)) == len(make_sigmas("res_2ab", 1)) == 2
    assert len(make_sigmas("res_2mid", 2)) == len(make_sigmas("res_2mid", 3)) == 2
    for sampler in SAMPLERS:
        assert run(gaussian(0.5), sampler, num_steps=2).isfinite().all()
