"""Line of the jobs that wait for one world: their order, their batches, when they will be made."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from worldline.serve.pool import Slot
from worldline.serve.progress import Progress

Wish = Literal["cancel", "delete", "timeout", "drain"]


@dataclass(eq=False)
class Entry:
    """One job that has not ended.

    Attributes:
        queued_at: time of the event loop.
        charged: attempts that count against it.
        alone: it was in a batch whose worker died, and is made in no other.
        batch: that it is in; None while it waits.
        begun: a worker has begun it.
        wish: how it is to end at its next step, if it is; and when that was asked for.
        ended: set once it has, or is deleted.
    """

    id: str
    owner: str
    world: str
    batch_key: str | None
    queued_at: float
    charged: int = 0
    alone: bool = False
    batch: Batch | None = None
    begun: bool = False
    progress: Progress | None = None
    wish: Wish | None = None
    wished_at: float = 0.0
    began_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Batch:
    """Jobs that one worker makes together.

    Attributes:
        entries: that have not ended.
        size: number of all.
        last: time of the last event.
        freed: the worker may take the next batch, while files of this one are written.
        again: ids of those that had too little memory, and wait again.
        innocent: if its worker ends, that is not for what these jobs are.
    """

    slot: Slot
    entries: list[Entry]
    size: int
    last: float
    freed: bool = False
    innocent: bool = False
    again: list[str] = field(default_factory=list)


class Line:
    """Jobs of one world in order: those given to a worker that has not begun, then the waiting.

    Attributes:
        starting: given to a worker.
        waiting: the next one first.
    """

    def __init__(self, window: float) -> None:
        self.starting: list[Entry] = []
        self.waiting: deque[Entry] = deque()
        self._window = window
        self._limits: dict[str, int] = {}

    def take(self, largest: int, now: float) -> list[Entry] | float:
        """The next batch, which leaves the line; else seconds to wait for more of its kind.

        Jobs that can be made together with the oldest pass those between: it is not delayed by
        them, and beyond the window it does not wait for them.

        Args:
            largest: number of clips in a batch.
            now: time of the event loop.
        """
        mates = self._mates([*self.waiting], largest)
        if len(mates) < self._limit(mates[0], largest):
            wait = mates[0].queued_at + self._window - now
            if wait > 0:
                return wait
        for entry in mates:
            self.waiting.remove(entry)
        self.starting += mates
        return mates

    def put_back(self, entry: Entry, after: Collection[str] = ()) -> None:
        """Let a job wait again, before all others but those with these ids that are in front."""
        ahead = takewhile(lambda other: other.id in after, self.waiting)
        self.waiting.insert(sum(1 for _ in ahead), entry)

    def halve(self, key: str, size: int) -> None:
        """Make batches of a key smaller: one of this size was out of memory."""
        self._limits[key] = min(max(1, size // 2), self._limits.get(key, size))

    def positions(self) -> Mapping[str, int]:
        return {entry.id: place for place, entry in enumerate((*self.starting, *self.waiting))}

    def ends(
        self,
        busy: Iterable[float],
        largest: int,
        seconds: Callable[[Entry], float | None],
    ) -> Mapping[str, float]:
        """Seconds until each waiting job is made; those that cannot be known are absent.

        Args:
            busy: seconds until each worker is free.
            largest: number of clips in a batch.
            seconds: that a job takes.
        """
        workers, rest = [*busy], [*self.waiting]
        heapq.heapify(workers)
        ends: dict[str, float] = {}
        while rest and workers:
            mates = self._mates(rest, largest)
            if (length := seconds(mates[0])) is None:
                break
            end = heapq.heapreplace(workers, workers[0] + length) + length
            ends.update((entry.id, end) for entry in mates)
            together = {*mates}
            rest = [entry for entry in rest if entry not in together]
        return ends

    def _limit(self, entry: Entry, largest: int) -> int:
        if entry.alone or entry.batch_key is None:
            return 1
        return min(largest, self._limits.get(entry.batch_key, largest))

    def _mates(self, entries: Sequence[Entry], largest: int) -> list[Entry]:
        """The first of some jobs, with those that can be made together with it."""
        first = entries[0]
        if (limit := self._limit(first, largest)) <= 1:
            return [first]
        key = first.batch_key
        return [entry for entry in entries if entry.batch_key == key and not entry.alone][:limit]
