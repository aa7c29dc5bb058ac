"""The memory plan of a run: closed forms, and what is chosen and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from worldline.errors import InsufficientMemoryError
from worldline.memory import WORKSPACE, Memory
from worldline.train.memory import Sizes, choose_checkpointing, plan_memory

PARAMETERS, BLOCK = 4_014_088_192, 218_112_256
SIZES = Sizes(
    parameters=PARAMETERS,
    trained=PARAMETERS,
    blocks=16,
    block=BLOCK,
    tokens=10_600,
    stream=2 * 4096,
    inside=2 * 100_000,
    loss=0,
    tokenizer=10**9,
)


def test_bytes_of_a_full_run() -> None:
    """Sixteen bytes a parameter, four more with an average, spread over processes."""
    plan = plan_memory(SIZES, 1, torch.bfloat16, average=False, checkpointed=False)
    held = plan.weights + plan.gradients + plan.moments + plan.average
    assert held == 16 * PARAMETERS
    assert plan.activations == 10_600 * 16 * 200_000
    averaged = plan_memory(SIZES, 4, torch.bfloat16, average=True, checkpointed=False)
    spread = averaged.weights + averaged.gradients + averaged.moments + averaged.average
    assert spread == 20 * PARAMETERS // 4
    assert averaged.activations == plan.activations


def test_activations_that_are_computed_again() -> None:
    """A stream a block, and one block's own."""
    plan = plan_memory(SIZES, 1, torch.bfloat16, average=False, checkpointed=True)
    assert plan.activations == 10_600 * (16 * 2 * 4096 + 200_000)


def test_an_adapter_needs_little() -> None:
    """Frozen weights in the computation's precision, and sixteen bytes a number of the adapter."""
    plan = plan_memory(
        replace(SIZES, trained=10**6), 1, torch.bfloat16, average=False, checkpointed=True
    )
    assert plan.weights + plan.gradients + plan.moments == 2 * PARAMETERS + 16 * 10**6


def test_clips_are_encoded_before() -> None:
    """The larger of the tokenizer's need and the activations counts."""
    plan = plan_memory(SIZES, 1, torch.float32, average=False, checkpointed=True)
    beside = plan.weights + plan.gradients + plan.moments + plan.gathered
    assert plan.total == beside + max(plan.activations, 10**9)
    half = plan_memory(SIZES, 1, torch.bfloat16, average=False, checkpointed=True)
    assert half.workspace == WORKSPACE


PLANS = {
    again: plan_memory(SIZES, 1, torch.bfloat16, average=False, checkpointed=again)
    for again in (False, True)
}


@pytest.mark.parametrize(
    ("chosen", "free", "expected"),
    [("auto", 200, False), ("auto", 90, True), ("on", 200, True), ("off", 200, False)],
)
def test_what_is_chosen(chosen: str, free: int, expected: bool) -> None:
    memory = Memory(free * 10**9, 10**12)
    assert choose_checkpointing(PLANS, chosen, memory, "x") is expected


@pytest.mark.parametrize(
    ("chosen", "free", "advice"), [("auto", 20, "--lora"), ("off", 90, "checkpointing=auto")]
)
def test_what_is_refused(chosen: str, free: int, advice: str) -> None:
    memory = Memory(free * 10**9, 10**12)
    with pytest.raises(InsufficientMemoryError, match=f"training x needs about .*{advice}"):
        choose_checkpointing(PLANS, chosen, memory, "training x")
