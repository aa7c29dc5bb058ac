"""Attempts are counted by line, and a line is made or given up, never both, never lost."""

from __future__ import annotations

import random

import pytest

from worldline.fleet.queue import Queue, Unit


def take(queue: Queue, size: int = 1) -> Unit:
    unit = queue.take(size)
    assert unit is not None
    return unit


def test_units_are_batches_in_order() -> None:
    queue = Queue(7, 3)
    assert [take(queue, 3).lines for _ in range(3)] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert queue.take(3) is None
    assert queue.open == 7


def test_a_line_that_fails_is_tried_again_then_given_up() -> None:
    queue = Queue(3, 2)
    first, second = take(queue), take(queue)
    assert queue.settle(first, {0: False}) == ([], [])
    assert queue.settle(second, {}) == ([1], [])
    assert take(queue).lines == (2,)  # new lines come first
    again = take(queue)
    assert (again.lines, again.attempts) == ((0,), 1)
    assert queue.settle(again, {0: False}) == ([], [0])
    assert (again.attempts, queue.open) == (2, 1)


def test_what_would_fail_again_is_not_tried_again() -> None:
    queue = Queue(2, 5)
    assert queue.settle(take(queue, 2), {1: True}) == ([0], [1])
    assert queue.open == 0


def test_a_call_that_never_began_is_free() -> None:
    queue = Queue(200, 1)
    unit, _ = take(queue, 2), take(queue, 198)
    for _ in range(10):
        queue.give_back(unit)
        assert take(queue) is unit
    assert queue.settle(unit, {}) == ([0, 1], [])


def test_a_batch_that_dies_is_tried_line_by_line() -> None:
    queue = Queue(3, 1)
    assert queue.settle(take(queue, 3), dict.fromkeys(range(3), False), charge=0) == ([], [])
    for line in range(3):
        unit = take(queue, 3)
        assert (unit.lines, unit.attempts) == ((line,), 0)
        made, lost = queue.settle(unit, {1: False} if line == 1 else {})
        assert (made, lost) == (([], [1]) if line == 1 else ([line], []))
    assert queue.open == 0


def test_a_second_copy_of_the_last() -> None:
    queue = Queue(200, 2)
    units = [take(queue) for _ in range(200)]
    for unit in units[:197]:
        assert queue.take(1) is None
        queue.settle(unit, {})
    queue.settle(units[197], {})
    assert queue.take(1) is units[198]
    assert queue.take(1) is units[199]
    assert queue.take(1) is None  # a third is none
    assert queue.copied == {198, 199}
    # of one the copy fails, the original does not
    assert queue.settle(units[198], {198: False}) == ([], [])
    assert queue.settle(units[198], {}) == ([198], [])
    # of the other both are made
    assert queue.settle(units[199], {}) == ([199], [])
    assert queue.settle(units[199], {}) == ([], [])
    assert queue.open == 0


def test_a_stopped_queue_gives_nothing() -> None:
    queue = Queue(4, 2)
    unit = take(queue)
    queue.stopped = True
    assert queue.take(1) is None
    assert queue.settle(unit, {}) == ([0], [])


@pytest.mark.parametrize("seed", range(8))
def test_every_line_ends_once(seed: int) -> None:
    """With actors that die, fail and return calls at random."""
    dice = random.Random(seed)
    count, attempts = dice.randint(1, 40), dice.randint(1, 4)
    poison = {line for line in range(count) if dice.random() < 0.2}
    queue, flying = Queue(count, attempts), list[Unit]()
    ended: list[int] = []
    charged: dict[int, int] = dict.fromkeys(range(count), 0)
    while queue.open:
        size = dice.randint(1, 3)
        while len(flying) < 3 and (unit := queue.take(size)):
            flying.append(unit)
        unit = flying.pop(dice.randrange(len(flying)))
        if dice.random() < 0.2:
            queue.give_back(unit)
            continue
        bad = poison & {*unit.lines}
        failed = unit.lines if bad else ()
        charge = int(len(unit.lines) == 1)
        for line in failed:
            charged[line] += charge
        made, lost = queue.settle(unit, dict.fromkeys(failed, False), charge)
        assert poison.issuperset(lost)
        assert poison.isdisjoint(made)
        ended += made + lost
    assert sorted(ended) == [*range(count)]
    assert all(charged[line] == 0 for line in range(count) if line not in poison)
    assert all(charged[line] == attempts for line in poison)
