"""Streams of events: what happens to jobs, for those who listen; no history is kept."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from worldline.serve.records import ENDED, Job

# seconds between two events of a name and job
INTERVALS = {"progress": 0.25, "preview": 1.0}
_LARGEST = 1024  # events that wait for a slow listener, the latest of each name and job alone


@dataclass(frozen=True)
class Event:
    """What happened to a job.

    Attributes:
        name: status, progress, preview, completed, failed, cancelled or shutdown.
        id: of the event; rises, also over restarts of the server.
        data: the job itself where the name is that of its end.
    """

    name: str
    id: str
    data: Mapping[str, Any] | Job


class Subscription(AsyncIterator[Event]):
    """Events for one listener; a pending `anext` may be cancelled without loss.

    A slow listener gets the latest state of each job, not each change.
    """

    def __init__(self, owner: str | None, id: str | None) -> None:
        self.owner, self.id = owner, id
        self._pending: OrderedDict[tuple[str, str], Event] = OrderedDict()
        self._change = asyncio.Event()
        self.is_closed = False

    def wants(self, owner: str, id: str) -> bool:
        return self.owner in (None, owner) and self.id in (None, id) and not self.is_closed

    def put(self, id: str, event: Event) -> None:
        ends = event.name in ENDED
        if ends:
            for name in ("status", "progress", "preview"):
                self._pending.pop((id, name), None)
        key = (id, "end" if ends else event.name)
        self._pending[key] = event
        self._pending.move_to_end(key)
        while len(self._pending) > _LARGEST:
            self._pending.popitem(last=False)
        if ends and self.id is not None:
            self.is_closed = True
        self._change.set()

    def close(self) -> None:
        """End the stream after what is pending."""
        self.is_closed = True
        self._change.set()

    async def __anext__(self) -> Event:
        while not self._pending:
            if self.is_closed:
                raise StopAsyncIteration
            self._change.clear()
            await self._change.wait()
        return self._pending.popitem(last=False)[1]


class Publisher:
    """Sends events to all who subscribed; previews and progress not too often."""

    def __init__(self) -> None:
        # one that its listener forgot is gone with it
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        self._last_id = 0
        self._sent: dict[tuple[str, str], float] = {}
        self._delayed: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}

    @property
    def is_heard(self) -> bool:
        return bool(self._subscriptions)

    @property
    def num_listeners(self) -> int:
        """Number of streams that are open."""
        return sum(not each.is_closed for each in self._subscriptions)

    def add(self, subscription: Subscription) -> None:
        self._subscriptions.add(subscription)

    def event(self, name: str, data: Mapping[str, Any] | Job) -> Event:
        self._last_id = max(self._last_id + 1, time.time_ns() // 1_000_000)
        return Event(name, str(self._last_id), data)

    def publish(self, name: str, owner: str, id: str, data: Mapping[str, Any]) -> None:
        """Send an event; or, where one of its name and job was sent just now, the latest later."""
        key, interval = (id, name), INTERVALS.get(name, 0.0)
        if not self.is_heard:
            return
        if interval:
            loop = asyncio.get_running_loop()
            wait = self._sent.get(key, -interval) + interval - loop.time()
            if wait > 0:
                self._delayed[key] = (owner, data)
                if key not in self._timers:
                    self._timers[key] = loop.call_later(wait, self._send_delayed, key)
                return
            self._sent[key] = loop.time()
        self._send(owner, id, self.event(name, data))

    def end(self, job: Job) -> None:
        """Send the one event of a job's end, which closes streams of this job alone."""
        self.forget(job.id)
        self._send(job.owner, job.id, self.event(job.status, job))

    def forget(self, id: str) -> None:
        """Send nothing more that was delayed."""
        for name in INTERVALS:
            if timer := self._timers.pop((id, name), None):
                timer.cancel()
            self._delayed.pop((id, name), None)
            self._sent.pop((id, name), None)

    def close(self, id: str) -> None:
        """End the streams of one job alone."""
        for subscription in list(self._subscriptions):
            if subscription.id == id:
                subscription.close()

    def shutdown(self) -> None:
        """End all streams."""
        for subscription in list(self._subscriptions):
            subscription.put("", self.event("shutdown", {}))
            subscription.close()

    def _send_delayed(self, key: tuple[str, str]) -> None:
        del self._timers[key]
        owner, data = self._delayed.pop(key)
        self.publish(key[1], owner, key[0], data)

    def _send(self, owner: str, id: str, event: Event) -> None:
        for subscription in list(self._subscriptions):
            if subscription.wants(owner, id):
                subscription.put(id, event)
