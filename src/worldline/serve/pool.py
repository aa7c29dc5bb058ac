"""Pool of workers: starts them, replaces those that end, adds and removes some."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worldline.serve.records import Facts, Worker, WorkerDied

logger = logging.getLogger(__name__)

_LONGEST_BACKOFF = 60.0
_PROVEN = (
    60.0  # seconds after which a worker that ends without a job counts as one that loaded well
)


class Slot:
    """Place of one worker, which replacements take one after another.

    Attributes:
        failures: loads in a row that came to nothing.
        reason: why the last one did.
        batch: what its worker makes until the next may begin.
        runs: tasks that read events of its worker; more than one while files are written.
        killed: the worker was killed, or has ended, and is to be replaced.
        stuck: it was killed because it made no step or gave no sign of life.
        retired: no replacement is wanted.
        worked: its worker was given a batch.
        was_ready: its worker's world was loaded.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker, self.name, self.world = worker, worker.name, worker.world
        self.failures, self.reason = 0, ""
        self.batch: object | None = None
        self.runs: set[asyncio.Task[None]] = set()
        self.killed = self.stuck = self.retired = self.worked = self.was_ready = False
        self.loading_since = time.monotonic()
        self.keeper: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    @property
    def is_alive(self) -> bool:
        return self.worker.state in ("ready", "busy") and not self.killed

    @property
    def is_free(self) -> bool:
        return self.worker.state == "ready" and self.batch is None and not self._leaves

    @property
    def is_idle(self) -> bool:
        return self.batch is None and not self.runs

    @property
    def _leaves(self) -> bool:
        return self.killed or self.retired

    def leave(self) -> None:
        """End the wait for the worker's end."""
        self._gone.set()

    async def left(self, seconds: float | None = None) -> None:
        """Wait until the worker is to be replaced or removed, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), seconds)
        self._gone.clear()

    def replace(self, worker: Worker) -> None:
        self.worker, self.batch = worker, None
        self.killed = self.stuck = self.worked = self.was_ready = False
        self.loading_since = time.monotonic()


class Pool:
    """Workers of all worlds.

    Attributes:
        facts: of each world that was loaded once, by name.
    """

    def __init__(
        self,
        worlds: Mapping[str, Sequence[Worker]],
        make_worker: Callable[[str, str], Worker],
        changed: Callable[[str], None],
        observe: Callable[[str, Mapping[str, Any]], None],
        backoff: float = 1.0,
    ) -> None:
        """Pool that is not started.

        Args:
            worlds: workers that are not started, by world.
            make_worker: makes one more, of a world and a name.
            changed: called with a world once one of its workers may take a batch.
            observe: called with what happened.
            backoff: seconds before a world that could not be loaded is loaded again; doubled each
                time, to one minute.
        """
        self.slots = {world: [*map(Slot, workers)] for world, workers in worlds.items()}
        self.facts: dict[str, Facts] = {}
        self._make, self._changed, self._observe = make_worker, changed, observe
        self._backoff, self._closing = backoff, False
        self._turn = 0
        self._kills: set[asyncio.Task[None]] = set()

    def all(self) -> list[Slot]:
        return [slot for slots in self.slots.values() for slot in slots]

    def free(self, world: str) -> list[Slot]:
        return [slot for slot in self.slots.get(world, ()) if slot.is_free]

    def alive(self, world: str) -> list[Slot]:
        """Workers that answer: those without a batch first, in turn."""
        slots = [slot for slot in self.slots.get(world, ()) if slot.is_alive]
        self._turn += 1
        turn = self._turn % len(slots) if slots else 0
        return sorted(slots[turn:] + slots[:turn], key=lambda slot: slot.batch is not None)

    def start(self) -> None:
        for slot in self.all():
            slot.keeper = asyncio.create_task(self._keep(slot))

    def add(self, world: str) -> str:
        """Start one more worker; its name."""
        names = {slot.name for slot in self.slots[world]}
        name = next(n for n in (f"{world}/{i}" for i in range(len(names) + 1)) if n not in names)
        slot = Slot(self._make(world, name))
        self.slots[world].append(slot)
        slot.keeper = asyncio.create_task(self._keep(slot))
        return slot.name

    async def remove(self, world: str) -> str | None:
        """Stop one worker that makes nothing, the newest; its name, None where all are busy."""
        for slot in reversed(self.slots[world]):
            if slot.is_idle and not slot.retired:
                slot.retired = True
                slot.leave()
                if slot.worker.state == "loading":  # `start` need not heed anything else
                    await self._stop(slot, kill=True)
                if slot.keeper:
                    await asyncio.wait([slot.keeper], timeout=10)
                self.slots[world].remove(slot)
                return slot.name
        return None

    def kill(self, slot: Slot, reason: str) -> None:
        """Kill a worker, which is then replaced; its runs end with `WorkerDied`."""
        if not slot.killed and not self._closing:
            logger.error("%s: %s; it is replaced", slot.name, reason)
            slot.killed = True
            task = asyncio.create_task(self._kill(slot))
            self._kills.add(task)
            task.add_done_callback(self._kills.discard)

    async def _kill(self, slot: Slot) -> None:
        await self._stop(slot, kill=True)
        if runs := [*slot.runs]:
            _, deaf = await asyncio.wait(runs, timeout=5)
            for run in deaf:
                run.cancel()
        slot.leave()

    async def close(self, seconds: float) -> None:
        """Stop all workers, those that do not stop in time by force."""
        self._closing = True

        async def end(slot: Slot) -> None:
            slot.leave()
            with contextlib.suppress(TimeoutError):
                if slot.worker.state != "loading" and seconds > 0:
                    await asyncio.wait_for(self._stop(slot, kill=False), seconds)
            await self._stop(slot, kill=True)
            if slot.keeper:
                slot.keeper.cancel()
                await asyncio.wait([slot.keeper], timeout=1)

        await asyncio.gather(*map(end, self.all()))

    async def _stop(self, slot: Slot, *, kill: bool) -> None:
        if slot.worker.state == "dead" and not kill:
            return
        try:
            await asyncio.wait_for(slot.worker.stop(kill=kill), 10 if kill else None)
        except TimeoutError:
            logger.error("%s: it cannot be stopped", slot.name)
        except Exception:  # whatever an end costs, the server goes on
            logger.exception("%s: its end failed", slot.name)

    async def _keep(self, slot: Slot) -> None:
        """Load a worker, and another one each time that it ended."""
        while not self._closing and not slot.retired:
            if await self._load(slot):
                slot.was_ready, ready = True, time.monotonic()
                self._changed(slot.world)
                await slot.left()
                proven = slot.worked or slot.retired or time.monotonic() - ready > _PROVEN
                slot.failures = 0 if proven else slot.failures + 1
            if self._closing:
                return
            await self._stop(slot, kill=not slot.retired)
            if slot.failures:
                wait = self._backoff * 2 ** min(slot.failures - 1, 10)
                await slot.left(min(wait, _LONGEST_BACKOFF))
            if not slot.retired and not self._closing:
                facts = {"world": slot.world, "worker": slot.name}
                self._observe("restart", facts)
                slot.replace(self._make(slot.world, slot.name))

    async def _load(self, slot: Slot) -> bool:
        began = time.monotonic()
        try:
            await slot.worker.start()
        except WorkerDied as error:
            slot.reason = str(error)
            logger.error("%s: it cannot load its world: %s", slot.name, error)
        except Exception as error:  # a worker that cannot be made must not end the others
            slot.reason = str(error)
            logger.exception("%s: it cannot load its world", slot.name)
        else:
            if slot.worker.facts is not None:
                self.facts[slot.world] = slot.worker.facts
                seconds = time.monotonic() - began
                facts = {"world": slot.world, "worker": slot.name, "seconds": seconds}
                self._observe("loaded", facts)
                logger.info("%s: ready after %.1f s", slot.name, seconds)
                return True
        slot.failures += 1
        return False
