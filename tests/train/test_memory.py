"""The memory plan of a run: closed forms, and what is chosen and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from worldline.errors import InsufficientMemoryError
from worldline.memory import WORKSPACE, Memory
from worldline.train.memory import Sizes, TrainingMemory, choose_checkpointing, plan_memory

PARAMETERS, BLOCK = 4_014_088_192, 218_112_256
SIZES = Sizes(
    parameters=PARAMETERS,
    trained=PARAMETERS,
    blocks=16,
    block=BLOCK,
    tokens=10_600,
    stream=2 * 4096,
    inside=2 * 100_000,
    gradients=2 * 10_000,
    shared=0,
    loss=0,
    tokenizer=10**8,
    coding=10**9,
)
REST = PARAMETERS - 16 * BLOCK
GATHERED = 2 * (REST + 2 * BLOCK)  # in bf16: what is outside blocks, and two of them
OUTSIDE, ONE = 2 * REST, 8 * BLOCK  # gradients: outside blocks; of a block, in float32 twice


def plan(
    checkpointed: bool, *, dp: int = 1, average: bool = False, **changes: int
) -> TrainingMemory:
    sizes = replace(SIZES, **changes)  # type: ignore[arg-type]
    return plan_memory(sizes, dp, torch.bfloat16, average=average, checkpointed=checkpointed)


def test_activations_that_are_kept() -> None:
    """Twelve bytes a parameter; gradients come while activations go."""
    kept = 10_600 * (16 * 200_000 + 20_000)
    assert plan(False).total == 12 * PARAMETERS + GATHERED + kept + OUTSIDE + 10**8 + WORKSPACE
    more = plan(False, accumulated=True).total - plan(False).total
    assert more == 4 * PARAMETERS, "those of an earlier batch stay"


def test_activations_that_are_computed_again() -> None:
    """Sixteen bytes a parameter where the way back ends, and one block's own activations."""
    one = 10_600 * 220_000
    late = 4 * (REST + BLOCK)  # gradients that come last
    held = 16 * PARAMETERS + GATHERED + OUTSIDE + ONE + 10**8 + WORKSPACE
    assert plan(True).total == held + one - late
    long = plan(True, tokens=10**6)
    streams = 10**6 * (16 * 2 * 4096 + 220_000)
    assert long.total == 12 * PARAMETERS + GATHERED + OUTSIDE + streams + 10**8 + WORKSPACE
    few = plan(True, tokens=1).phases[0]["activations"]
    assert few == OUTSIDE + ONE + 15 * 2 * 4096 + 220_000, "instead of the last block's stream"


def test_weights_are_shared() -> None:
    """A process holds a share of what the optimizer has, and whole blocks that compute."""
    one, four = plan(False, average=True), plan(False, dp=4, average=True)
    for name in ("weights", "moments", "average"):
        assert getattr(four, name) == getattr(one, name) // 4
    assert four.phases[0] == one.phases[0]


def test_averages_change_a_part_at_a_time() -> None:
    few = plan(True, average=True, tokens=1)
    assert few.average == 4 * PARAMETERS
    assert 0 < few.phases[2]["changes of the average"] < few.average // 4


def test_an_adapter_needs_little() -> None:
    """Frozen weights in the computation's precision, and sixteen bytes a number of the adapter."""
    memory = plan(True, trained=10**6)
    assert memory.weights + memory.moments == 2 * PARAMETERS + 12 * 10**6
    streams = 10_600 * (16 * 2 * 4096 + 220_000)
    assert memory.phases[0] == {"gradients": 0, "gathered": GATHERED, "activations": streams}
    assert memory.phases[1]["gradients"] == 4 * 10**6


def test_clips_are_encoded_beside_gradients() -> None:
    """Those of the step before are dropped behind it."""
    memory = plan(True, coding=10**11)
    assert memory.total == 16 * PARAMETERS + 10**11 + 10**8 + WORKSPACE
    assert "encoding 100.0" in str(memory)


PLANS = {
    again: plan_memory(SIZES, 1, torch.bfloat16, average=False, checkpointed=again)
    for again in (False, True)
}


@pytest.mark.parametrize(
    ("chosen", "free", "expected"),
    [("auto", 200, False), ("auto", 80, True), ("on", 200, True), ("off", 200, False)],
)
def test_what_is_chosen(chosen: str, free: int, expected: bool) -> None:
    memory = Memory(free * 10**9, 10**12)
    assert choose_checkpointing(PLANS, chosen, memory, "x") is expected


@pytest.mark.parametrize(
    ("chosen", "free", "advice"), [("auto", 20, "--lora"), ("off", 80, "checkpointing=auto")]
)
def test_what_is_refused(chosen: str, free: int, advice: str) -> None:
    memory = Memory(free * 10**9, 10**12)
    with pytest.raises(InsufficientMemoryError, match=f"training x needs about .*{advice}"):
        choose_checkpointing(PLANS, chosen, memory, "training x")
