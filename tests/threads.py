"""Processes of an axis as threads of one: any number of them, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

from torch import Tensor

from worldline.parallel.mesh import Axis, Layout, Mesh

WAIT_S = 60  # for the others; a thread that failed lets them wait no longer


@dataclass
class Room:
    barrier: Barrier
    values: list[Any]


@dataclass(frozen=True)
class Seat(Axis):
    """The axis of one thread.

    Attributes:
        sent: numbers of elements that this thread gave to the others, call by call.
    """

    room: Any = None
    sent: list[int] = field(default_factory=list, hash=False, compare=False)

    def every(self, value: Any) -> list[Any]:
        self.room.values[self.rank] = value
        self.room.barrier.wait(WAIT_S)
        values = [*self.room.values]
        self.room.barrier.wait(WAIT_S)
        return values

    def parts(self, x: Tensor) -> list[Tensor]:
        self.sent.append(x.numel())
        return list(self.every(x.clone()))

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self.parts(x)
        return x.copy_(sum(others, first))

    def share(self, x: Tensor) -> Tensor:
        return x.copy_(self.parts(x)[0])


def in_threads(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of a function of an axis and arguments, called in each thread; by rank."""
    room = Room(Barrier(count), [None] * count)

    def call(rank: int) -> Any:
        try:
            return function(Seat(rank, count, room=room), *arguments)
        except BaseException:
            room.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return [one.result() for one in [pool.submit(call, rank) for rank in range(count)]]


def tensor_parallel(axis: Axis) -> Mesh:
    """A mesh of one axis, along which networks are cut."""
    return Mesh(Layout(tp=axis.count), tp=axis, video=axis, world=axis)
