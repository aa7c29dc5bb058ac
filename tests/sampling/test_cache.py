"""Step cache: which steps run a network's blocks, and what they are replaced by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worldline.sampling.cache import StepCache, filtered_spectrum, format_steps, parse_steps
from worldline.sampling.edm import SIGMA_DATA, noise_ratios, sample
from worldline.sampling.solvers import finish


@pytest.mark.parametrize(
    ("pattern", "count", "steps"),
    [
        ("steps:0", 1, [0]),
        ("steps:0,1", 2, [0, 1]),
        ("steps:0-3,5,8-8,11-13", 14, [0, 1, 2, 3, 5, 8, 11, 12, 13]),
    ],
)
def test_patterns_name_steps(pattern: str, count: int, steps: list[int]) -> None:
    assert parse_steps(pattern, count) == steps
    assert parse_steps(format_steps(steps), count) == steps


def test_patterns_are_short() -> None:
    assert format_steps([0, 1, 2, 4, 6, 7]) == "steps:0-2,4,6-7"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("steps:1-6", ("steps 0 to 6", "both ends")),
        ("steps:0-5", ("steps 0 to 6", "both ends")),
        ("steps:0-7", ("steps 0 to 6", "both ends")),
        ("steps:0,3,2,6", ("rising",)),
        ("steps:0,3,3,6", ("rising",)),
        ("steps:0,4-2,6", ("rising",)),
    ],
)
def test_patterns_that_fit_no_sampler(pattern: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        parse_steps(pattern, 7)


def follow(cache: StepCache, inputs: list[Tensor]) -> list[int]:
    """Steps in which both branches' blocks ran; each step that skips them adds what these added."""
    ran: list[int] = []
    for step, x in enumerate(inputs):
        for branch in (True, False):
            cache.enter(x, branch)
            stream = torch.full((1, 2, 3), float(step))
            found = cache.reuse(stream)
            if found is None:
                ran += [step] * branch
                cache.keep(stream + 10 * step + branch)
            else:
                assert (found == stream + 10 * ran[-1] + branch).all()
    assert ran == cache.computed
    return ran


@pytest.mark.parametrize(
    ("threshold", "steps"),
    [("0.0", [*range(8)]), ("0.15", [0, 2, 4, 6, 7]), ("0.25", [0, 3, 6, 7]), ("9.0", [0, 7])],
)
def test_changes_add_up(threshold: str, steps: list[int]) -> None:
    """Inputs that grow by a tenth at one level of noise, whatever the filter."""
    x = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    inputs = [x * 1.1**step for step in range(8)]
    assert follow(StepCache(threshold, [0.7] * 8), inputs) == steps


def test_a_pattern_looks_at_no_input() -> None:
    inputs = [torch.full((1, 1, 1, 1, 1), float("nan"))] * 5
    assert follow(StepCache("steps:0,3-4", [1.0] * 5), inputs) == [0, 3, 4]


def test_the_first_process_decides() -> None:
    inputs = [torch.ones(1, 1, 1, 2, 2)] * 4  # which never change here
    cache = StepCache("0.5", [1.0] * 4, share=lambda change: change.fill_(0.3))
    assert follow(cache, inputs) == [0, 2, 3]


def test_noise_is_filtered() -> None:
    x = torch.randn(1, 1, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(filtered_spectrum(x, 0.0), torch.fft.fftn(x, dim=(2, 3, 4)))
    plain, noisy = (filtered_spectrum(x, ratio).abs()[0, 0, 0] for ratio in (0.0, 10.0))
    gains = (noisy / plain).diagonal()[:9]  # from the mean to the highest frequency
    assert (gains.diff() < 0).all()
    assert gains[0] > 1 > gains[8]


@pytest.mark.parametrize("sampler", ["edm_euler", "res_2ab", "res_1euler", "res_2mid"])
def test_every_evaluation_has_its_noise(sampler: str) -> None:
    times: list[float] = []

    def network(x: Tensor, time: Tensor, conditional: bool) -> Tensor:
        times.append(time.item())
        return torch.zeros_like(x)

    finish(sample(network, torch.ones(1, 1, 1, 2, 2), sampler=sampler, num_steps=6, guidance=0))
    ratios = [math.exp(4 * time) / SIGMA_DATA for time in times]
    assert ratios == pytest.approx(noise_ratios(sampler, 6), rel=1e-5)
