"""What processes exchange is what one process would have computed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import Together
from worldline.errors import (
    CheckpointError,
    GuardrailRefusal,
    InputError,
    InsufficientMemoryError,
    NonFiniteError,
)
from worldline.parallel.mesh import ALONE, Axis, Layout, make_mesh

pytestmark = pytest.mark.slow


def exchange(axis: Axis) -> dict[str, Any]:
    whole = torch.arange(24.0).view(2, 6, 2)
    own = axis.part(whole, 1)
    # process r sends r + 1 rows to each, of which the first number is its own rank
    rows = [rank + 1 for rank in range(axis.count)]
    sent = torch.full((axis.count * rows[axis.rank], 2), axis.rank)
    arrived = axis.all_to_all(sent, [rows[axis.rank]] * axis.count, rows)
    passed = torch.empty(axis.rank or axis.count)  # as long as what the one before sends
    axis.pass_on(torch.full((axis.rank + 1,), float(axis.rank)), passed)()
    return {
        "joined": torch.equal(axis.all_gather(own, 1), whole),
        "summed": axis.all_reduce(torch.tensor([axis.rank + 1.0])).item(),
        "arrived": arrived[:, 0].tolist()
        == [rank for rank in range(axis.count) for _ in range(rank + 1)],
        "passed": set(passed.tolist()) == {(axis.rank - 1) % axis.count},
        "dealt": list(axis.deal("abc")),
        "any": axis.any(axis.rank == 1),
        "every": axis.every(axis.rank),
        "once": axis.once(lambda: {"rank": axis.rank, "x": torch.ones(2)})["rank"],
    }


def share(axis: Axis) -> list[bool]:
    with torch.inference_mode():
        table = torch.arange(12).view(3, 4).bfloat16()
    frames = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    frames.flags.writeable = False
    values = [table, table.T, table[:0], frames, frames[:, ::2], {"x": torch.tensor(True)}]
    got = axis.once(lambda: values)
    same = [torch.equal(a, b) for a, b in zip(values[:3], got[:3], strict=True)]
    same += [np.array_equal(a, b) for a, b in zip(values[3:5], got[3:5], strict=True)]
    return [*same, bool(got[5]["x"]), (got is values) == axis.first]


def fail(axis: Axis, error: Exception) -> list[str]:
    def make() -> None:
        if axis.first:
            raise error

    caught = []
    for call in (axis.once, axis.together):
        try:
            call(make)
        except type(error) as raised:
            caught.append(f"{raised} {vars(raised)}")
    return caught


def fail_each(axis: Axis, kinds: list[Any]) -> str:
    def make() -> None:
        if kind := kinds[axis.rank]:
            raise kind(f"of {axis.rank}")

    try:
        axis.together(make)
    except Exception as raised:
        return repr(raised)
    return ""


def steps(axis: Axis) -> tuple[list[int], str]:
    def make() -> Generator[int, None, str]:
        yield 1
        yield 2
        return f"of {axis.rank}"

    seen = []
    generator = axis.steps_once(make())
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as stop:
            return seen, stop.value


def shape(axis: Axis, layout: Layout) -> list[tuple[int, int]]:
    mesh = make_mesh(layout, axis)
    assert make_mesh(layout, axis) is mesh
    return [(one.rank, one.count) for one in (mesh.dp, mesh.cfg, mesh.cp, mesh.tp, mesh.video)]


def test_parts_are_joined_summed_and_turned(two: Together, three: Together) -> None:
    for together, count in ((two, 2), (three, 3)):
        results = together(exchange)
        assert sorted(thing for got in results for thing in got["dealt"]) == ["a", "b", "c"]
        for got in results:
            assert all(got[name] for name in ("joined", "arrived", "passed", "any"))
            assert got["summed"] == sum(range(1, count + 1))
            assert (got["every"], got["once"]) == (list(range(count)), 0)


def test_tensors_and_arrays_arrive_as_they_were(two: Together) -> None:
    assert all(map(all, two(share)))


@pytest.mark.parametrize(
    "error",
    [GuardrailRefusal("a word", "prompt"), NonFiniteError("NaN", 3), InputError("x"), OSError(28)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_one_is_raised_by_all(two: Together, error: Exception) -> None:
    ours, theirs = two(fail, error)
    assert len(ours) == 2
    assert ours == theirs


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        ([InsufficientMemoryError, CheckpointError], "InsufficientMemoryError('of 0')"),
        ([None, OSError], "OSError('of 1')"),
        ([None, None], ""),
    ],
)
def test_of_several_errors_all_raise_the_first(two: Together, kinds: list[Any], name: str) -> None:
    assert two(fail_each, kinds) == [name, name]


def test_a_generator_runs_in_the_first_alone(two: Together) -> None:
    assert two(steps) == [([1, 2], "of 0"), ([], "of 0")]


def test_axes_hold_the_processes_of_a_layout(two: Together) -> None:
    assert two(shape, Layout(dp=2))[1] == [(1, 2), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert two(shape, Layout(tp=2))[1] == [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2)]


def test_one_process_sends_nothing() -> None:
    x = torch.ones(2, 2)
    for same in (ALONE.cp.part(x, 0), ALONE.cp.all_gather(x, 0), ALONE.cp.all_to_all(x, [2], [2])):
        assert same is x
    assert ALONE.cp.once(lambda: 3) == ALONE.cp.together(lambda: 3) == 3
