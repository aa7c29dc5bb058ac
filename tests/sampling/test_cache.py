"""Step cache: which steps run a network's blocks, and what they are replaced by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldline.sampling.cache import StepCache, format_steps, parse_steps


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
    """Steps in which blocks ran, which add 10, 11, … in turn; the stream is 0 at their entry."""
    ran: list[int] = []
    for step, x in enumerate(inputs):
        for branch in (True, False):
            cache.enter(x, branch)
            stream = torch.zeros(1, 2, 3)
            found = cache.reuse(stream)
            if found is None:
                ran += [step] * branch
                cache.keep(torch.full_like(stream, 10 + step + branch / 2))
            else:
                assert (found == 10 + ran[-1] + branch / 2).all()
    return ran
