"""Dispatch of jobs to workers, and the watch over both."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from worldline.serve.errors import ApiError
from worldline.serve.line import Batch, Entry, Wish
from worldline.serve.outcomes import Outcomes
from worldline.serve.pool import Pool, Slot
from worldline.serve.records import Worker, WorkerDied

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Limits of a queue; seconds, where nothing else is stated.

    Attributes:
        queue_size: jobs that wait, of all worlds.
        queue_per_key: jobs of one key that wait; without keys there is no such limit.
        batch_window: for which the oldest job waits for others of its batch.
        job_timeout: after which a job is stopped at its next step.
        attempts: times that a job may begin whose worker dies.
        keep_hours: after which jobs that have ended are removed; None: never.
        cancel_grace: from a cancel to the end of the worker that does not heed it.
        cancel_wait: for which `cancel` waits for the end of the job.
        min_free_bytes: of the disk; below, no job is accepted.
        stuck_seconds: without a step, after which a worker is replaced; or 10 times the slowest
            step of its world, if that is longer.
        heartbeat_seconds: without a sign of life, after which a worker is replaced.
        check_seconds: for which a worker may check a request.
        flush_seconds: between writes of the progress.
        watch_seconds: between looks at all of these.
        load_backoff: before a world that could not be loaded is loaded again; doubled each time.
    """

    queue_size: int = 256
    queue_per_key: int = 64
    batch_window: float = 0.05
    job_timeout: float = 7200.0
    attempts: int = 2
    keep_hours: float | None = None
    cancel_grace: float = 60.0
    cancel_wait: float = 1.0
    min_free_bytes: float = 2e9
    stuck_seconds: float = 120.0
    heartbeat_seconds: float = 30.0
    check_seconds: float = 60.0
    flush_seconds: float = 5.0
    watch_seconds: float = 0.25
    load_backoff: float = 1.0


class Dispatcher:
    """Gives workers what waits for them, and ends what stands still.

    Attributes:
        pool: the workers.
        stopping: no more jobs begin.
        hurry: ends every wait of `idle`.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        worlds: Mapping[str, Sequence[Worker]],
        make_worker: Callable[[str, str], Worker],
        settings: Settings,
    ) -> None:
        self.outcomes, self.store, self.settings = outcomes, outcomes.store, settings
        observe, backoff = outcomes.observe, settings.load_backoff
        self.pool = Pool(worlds, make_worker, self.schedule, observe, backoff)
        self.stopping, self.hurry = False, asyncio.Event()
        self._batches: set[Batch] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self) -> None:
        """Start the workers, in the background."""
        self.pool.start()
        self.spawn(self._watch())

    def close(self) -> None:
        """End all that goes on."""
        self._closed = True
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def schedule(self, world: str) -> None:
        """Give workers that are free what waits for them."""
        line, facts = self.outcomes.line(world), self.pool.facts.get(world)
        for slot in self.pool.free(world):
            if self.stopping or not line.waiting:
                return
            now = self._now()
            taken = line.take(facts.max_batch_size if facts else 1, now)
            if isinstance(taken, float):
                asyncio.get_running_loop().call_later(taken, self.schedule, world)
                return
            batch = Batch(slot, taken, len(taken), now)
            slot.batch, slot.worked = batch, True
            for entry in taken:
                entry.batch, entry.begun = batch, False
            run = self.spawn(self._run(batch))
            slot.runs.add(run)
            run.add_done_callback(slot.runs.discard)
            self._batches.add(batch)
            self.outcomes.observe("batch", {"world": world, "size": batch.size})

    async def _run(self, batch: Batch) -> None:
        """Let a worker make a batch."""
        slot, worker, outcomes = batch.slot, batch.slot.worker, self.outcomes
        change: asyncio.Task[None] | None = None
        try:
            tasks = []
            for entry in [*batch.entries]:
                try:
                    tasks.append(await outcomes.blocking(self.store.task, entry.id))
                except ApiError as error:
                    await outcomes.fail(entry, error.code, error.message)
            if not tasks:
                return
            async for event in worker.run(tasks):
                batch.last = self._now()
                if work := self._change(batch, event):
                    change = self.spawn(work)
                    await asyncio.shield(change)
            if batch.entries:
                raise WorkerDied("it left jobs without an end")
        except (Exception, asyncio.CancelledError) as error:
            if self._closed:
                raise
            if not isinstance(error, WorkerDied | asyncio.CancelledError):
                logger.exception("%s: its run failed", slot.name)
            if slot.worker is worker:
                self.pool.kill(slot, f"it ended in a job: {error}")
            if change:
                await asyncio.wait([change])
            await asyncio.shield(self.spawn(outcomes.died(batch)))
        finally:
            self._batches.discard(batch)
            self._free(batch)

    def _free(self, batch: Batch) -> None:
        batch.freed = True
        if batch.slot.batch is batch:
            batch.slot.batch = None
        self.schedule(batch.slot.world)

    def _change(self, batch: Batch, event: Mapping[str, Any]) -> Coroutine[Any, Any, None] | None:
        """React to what a worker reports; work, where the disk is to be waited for."""
        name, outcomes = event["event"], self.outcomes
        entry = next((entry for entry in batch.entries if entry.id == event.get("id")), None)
        if name == "free":
            self._free(batch)
        elif entry is None:  # it has ended
            return None
        elif name == "step":
            outcomes.step(entry, event["kind"], event["done"], event["total"])
        elif name == "preview":
            facts = self.pool.facts.get(entry.world)
            if facts and not facts.guardrails:  # no frame is seen before a guardrail has seen it
                outcomes.preview(entry, event)
        elif name == "begun":
            if entry.wish:  # it was asked to stop before it had the job
                batch.slot.worker.cancel(entry.id)
            return outcomes.begun(entry)
        elif name == "done":
            return outcomes.done(entry, event.get("result") or {})
        elif name == "failed":
            return outcomes.failed(batch, entry, event)
        elif name == "cancelled":
            return outcomes.stopped(entry)
        return None

    async def _watch(self) -> None:
        """Look for workers that stand still, and for jobs that take too long."""
        while True:
            try:
                for slot in self.pool.all():
                    self._watch_worker(slot)
                self._watch_jobs()
            except Exception:  # else one fault would end the watch for good
                logger.exception("the watch over workers failed")
            await asyncio.sleep(self.settings.watch_seconds)

    def _watch_worker(self, slot: Slot) -> None:
        now, settings, state = self._now(), self.settings, slot.worker.state
        if slot.killed or not slot.was_ready or state == "loading":
            return
        if state == "dead":
            self.pool.kill(slot, "it has ended")
            return
        if (silent := time.monotonic() - slot.worker.heartbeat) > settings.heartbeat_seconds:
            slot.stuck = True
            self.pool.kill(slot, f"it gave no sign of life for {silent:.0f} s")
            return
        slowest = self.outcomes.estimates.slowest_step(slot.world)
        limit = max(settings.stuck_seconds, 10 * slowest)
        for batch in [batch for batch in self._batches if batch.slot is slot]:
            # files are written in one long step
            if now - batch.last > (5 * limit if batch.freed else limit):
                slot.stuck = True
                self._kill(batch, f"it made no step for {now - batch.last:.0f} s")

    def _kill(self, batch: Batch, reason: str) -> None:
        """Kill a worker for what one of its batches does."""
        for other in self._batches - {batch}:
            other.innocent = other.innocent or other.slot is batch.slot
        self.pool.kill(batch.slot, reason)

    def _watch_jobs(self) -> None:
        now, settings = self._now(), self.settings
        for entry in [*self.outcomes.entries.values()]:
            if (batch := entry.batch) is None:
                continue
            if entry.wish and now - entry.wished_at > settings.cancel_grace:
                batch.innocent = True  # but for those that were to stop
                self._kill(batch, f"it did not stop {entry.id} when asked to")
            elif entry.begun and not entry.wish and now - entry.began_at > settings.job_timeout:
                self.ask(entry, "timeout")

    def busy(self, world: str) -> list[float | None]:
        """Seconds until each worker of a world is free; None where that cannot be known."""
        now, facts = self._now(), self.pool.facts.get(world)
        busy: list[float | None] = []
        for slot in self.pool.slots.get(world, ()):
            batch = slot.batch if isinstance(slot.batch, Batch) else None
            if slot.is_alive and batch is None:
                busy.append(0.0)
            elif batch is not None and slot.is_alive:
                left = [entry.progress.remaining(now) for entry in batch.entries if entry.progress]
                known = [seconds for seconds in left if seconds is not None]
                busy.append(max(known) if known else None)
            elif facts is not None:
                loaded = time.monotonic() - slot.loading_since
                busy.append(max(0.0, facts.load_seconds - loaded))
        return busy

    def ends(self, world: str) -> Mapping[str, float]:
        """Seconds until each job that waits for a world is made."""
        facts = self.pool.facts.get(world)
        busy = [seconds for seconds in self.busy(world) if seconds is not None]

        def seconds(entry: Entry) -> float | None:
            return self.outcomes.estimates.seconds(self.store.get(entry.id, None))

        largest = facts.max_batch_size if facts else 1
        return self.outcomes.line(world).ends(busy, largest, seconds)

    def ask(self, entry: Entry, wish: Wish) -> None:
        """Have a job that runs stopped at its next step."""
        if entry.batch:
            entry.wished_at = entry.wished_at if entry.wish == "cancel" else self._now()
            entry.wish = wish
            entry.batch.slot.worker.cancel(entry.id)

    async def idle(self, seconds: float) -> None:
        """Wait until no worker makes anything, at most so long, and not in a hurry."""
        end = self._now() + seconds
        while self._batches and self._now() < end and not self.hurry.is_set():
            await asyncio.sleep(0.02)

    def spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Task that goes on whoever waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, though whoever waited may be gone

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
