"""Queue of jobs: which worker makes which next, and what becomes of each.

A job is queued, then in_progress once a worker has begun it, then completed, failed or cancelled.
Each of these is on the disk before anyone hears of it. All methods belong to one event loop; the
disk is waited for in one thread beside it, so that writes keep their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldline.errors import Error
from worldline.files import remove
from worldline.serve.dispatch import Dispatcher, Settings
from worldline.serve.errors import ApiError
from worldline.serve.line import Entry, Wish
from worldline.serve.outcomes import Outcomes
from worldline.serve.progress import stages_of
from worldline.serve.records import ENDED, Checked, Facts, Job, MediaKind, Worker, WorkerDied
from worldline.serve.recovery import recover
from worldline.serve.store import Store
from worldline.serve.streams import Subscription

__all__ = ["Queue", "Settings"]

logger = logging.getLogger(__name__)

_LONGEST_RETRY = 120.0  # of Retry-After; above it the official client gives up


class Queue:
    """Jobs of all worlds and the workers that make them.

    Attributes:
        worlds: their names.
        pool: the workers.
        observers: called with what happened, and its facts:
            "submitted" world · "started" world, queue_seconds · "batch" world, size ·
            "step" world, stage, seconds · "stage" world, stage, seconds (of a completed job) ·
            "finished" world, status, code, param, queue_seconds, job_seconds, frames ·
            "cancel" world, seconds · "loaded" world, worker, seconds · "restart" world, worker.
    """

    def __init__(
        self,
        store: Store,
        worlds: Mapping[str, Sequence[Worker]],
        make_worker: Callable[[str, str], Worker],
        settings: Settings,
    ) -> None:
        self.store, self.settings, self.worlds = store, settings, tuple(worlds)
        keep = None if settings.keep_hours is None else settings.keep_hours * 3600
        self._outcomes = Outcomes(store, settings.batch_window, settings.attempts, keep)
        self.observers = self._outcomes.observers
        self._dispatcher = Dispatcher(self._outcomes, worlds, make_worker, settings)
        self.pool = self._dispatcher.pool
        self._arriving: Counter[str] = Counter()  # by owner, while they are written
        # a process opens each input, with up to 1 GB; the others wait
        self._opening = asyncio.Semaphore(max(4, os.cpu_count() or 1))
        self._etas: dict[str, tuple[float, Mapping[str, float]]] = {}
        self._drained = asyncio.Event()

    async def start(self) -> None:
        """Recover what an earlier server left, and start the workers in the background.

        Raises:
            Error: the disk is full.
        """
        blocking = self._outcomes.blocking
        try:
            limits = self.settings.attempts, self._outcomes.keep_seconds
            jobs = await blocking(recover, self.store, self.worlds, *limits)
        except ApiError as error:
            raise Error(f"{self.store.path}: {error.message}") from error
        for job in jobs:
            self._outcomes.add(job)
        recent = "status = 'completed' ORDER BY id DESC LIMIT 200"
        for job in reversed(await blocking(self.store.rows.select, recent)):
            if seconds := job.result.get("inference_time_s"):
                stages = job.result.get("stage_durations") or {}
                self._outcomes.estimates.record(job, seconds, stages_of(stages))
        self._dispatcher.start()
        self._dispatcher.spawn(self._keep_house())

    # what is asked of it

    def facts(self, model: str) -> Facts | None:
        """Facts of a world; None while it is loaded for the first time."""
        return self.pool.facts.get(model)

    async def check(
        self,
        model: str,
        stated: Mapping[str, Any],
        input: Path | None,
        kind: MediaKind | None,
    ) -> Checked:
        """Let a worker of the world check what a client stated.

        Raises:
            ApiError: of the worker; or model_not_found, loading, no_worker, shutting_down.
        """
        self._refuse_if_stopping()
        self._refuse_unknown(model)
        async with self._opening if input else contextlib.nullcontext():
            for slot in self.pool.alive(model):
                with contextlib.suppress(WorkerDied, TimeoutError):
                    path = None if input is None else str(input)
                    check = slot.worker.check(stated, path, kind)
                    return await asyncio.wait_for(check, self.settings.check_seconds)
        raise self.unavailable(model)

    def unavailable(self, model: str) -> ApiError:
        """Error of a world that no worker can be asked for."""
        self._refuse_if_stopping()
        if self._state(model) == "loading":
            facts = self.facts(model)
            wait = min(_LONGEST_RETRY, max(1.0, facts.load_seconds if facts else 10.0))
            message = f"{model} is loading; ask again in {wait:.0f} s"
            return ApiError("loading", message, retry_after=wait)
        message = f"{model} has no worker; the server's log has the reason"
        return ApiError("no_worker", message, retry_after=30)

    async def submit(self, job: Job, input: Path | None) -> Job:
        """Accept a job: once this returns it is on the disk.

        The input moves from incoming/, and is removed where the job is not kept.

        Returns:
            The job; or the earlier one that its idempotency key names.

        Raises:
            ApiError: idempotency_conflict, queue_full, key_limit, disk_full, shutting_down.
        """
        # a client that hangs up must not leave a job that no worker ever gets
        return await asyncio.shield(self._dispatcher.spawn(self._submit(job, input)))

    async def cancel(self, id: str) -> Job:
        """Cancel a job, and wait a moment for its end; one that has ended stays as it is.

        Raises:
            ApiError: video_not_found.
        """
        job = self.store.get(id, None)
        if job.status in ENDED or id not in self._outcomes.entries:
            return job
        entry = self._outcomes.entries[id]
        end = self._dispatcher.spawn(self._stop(entry, "cancel"))
        await asyncio.wait([end], timeout=self.settings.cancel_wait)
        return self.store.get(id, None)

    async def delete(self, id: str) -> None:
        """Remove a job and its files; one that runs is stopped at its next step before.

        Raises:
            ApiError: video_not_found.
        """
        await asyncio.shield(self._dispatcher.spawn(self._delete(id)))

    def position(self, job: Job) -> int | None:
        """Number of jobs of the world that begin before it; None once it has begun."""
        return self._outcomes.positions(job.model).get(job.id) if job.status == "queued" else None

    def eta(self, job: Job) -> float | None:
        """Seconds until a job is made; None where nothing like it was made yet."""
        entry = self._outcomes.entries.get(job.id)
        if entry is None:
            return None
        now = asyncio.get_running_loop().time()
        if entry.progress:
            return entry.progress.remaining(now)
        computed, ends = self._etas.get(job.model, (-1.0, {}))
        if now - computed > (0.5 if job.id in ends else 0.05):  # else many who ask cost much
            computed, ends = now, self._dispatcher.ends(job.model)
            self._etas[job.model] = computed, ends
        end = ends.get(job.id)
        return None if end is None else max(0.0, end - (now - computed))

    def poll_milliseconds(self, job: Job) -> int:
        """After which to ask again: a step of a job that runs, a tenth of a wait."""
        entry, seconds = self._outcomes.entries.get(job.id), 1.0
        if entry is None:
            seconds = 0.0
        elif entry.progress:
            seconds = entry.progress.step_seconds or seconds
        elif (eta := self.eta(job)) is not None:
            seconds = eta / 10
        return int(1000 * min(5.0, max(0.25, seconds)))

    async def wait(self, id: str) -> Job:
        """The job once it has ended.

        Raises:
            ApiError: video_not_found (it was deleted, too), shutting_down.
        """
        job = self.store.get(id, None)
        if entry := self._outcomes.entries.get(id):  # until its files are in order, too
            await entry.ended.wait()
            job = self.store.get(id, None)
        if job.status not in ENDED:
            raise ApiError(
                "shutting_down",
                "The server shuts down; the video is made after its next start.",
                retry_after=10,
                extra={"video_id": id},
            )
        return job

    def subscribe(self, owner: str | None, id: str | None) -> Subscription:
        """Events of one job, or of all of an owner, from the present state on.

        Raises:
            ApiError: video_not_found.
        """
        subscription = Subscription(owner, id)
        jobs = [self.store.get(id, owner)] if id is not None else self.store.live()
        for job in jobs:
            if not subscription.wants(job.owner, job.id):
                continue
            for name, data in self._outcomes.present(job):
                subscription.put(job.id, self._outcomes.publisher.event(name, data))
        self._outcomes.publisher.add(subscription)
        if self._dispatcher.stopping:
            subscription.put("", self._outcomes.publisher.event("shutdown", {}))
            subscription.close()
        return subscription

    @property
    def num_listeners(self) -> int:
        """Number of streams of events that are open."""
        return self._outcomes.publisher.num_listeners

    def health(self) -> tuple[str, str]:
        """State in a word and a sentence: ready, or why it is not.

        That is shutting_down, disk_full, stuck, no_worker or loading.
        """
        if self._dispatcher.stopping:
            return "shutting_down", "The server shuts down."
        if self.store.free_bytes < self.settings.min_free_bytes:
            return "disk_full", "The server's disk is full."
        states = {world: self._state(world) for world in self.worlds}
        for state, words in (
            ("stuck", "no progress; the worker is replaced"),
            ("no_worker", "no worker"),
            ("loading", "loading"),
        ):
            if worlds := [world for world in self.worlds if states[world] == state]:
                return state, f"{', '.join(worlds)}: {words}."
        return "ready", f"{', '.join(self.worlds)} can be asked for videos."

    async def drain(self, seconds: float) -> None:
        """End: jobs that are not made within `seconds` are queued for the next start.

        A second call ends at once.
        """
        if self._dispatcher.stopping:
            self._dispatcher.hurry.set()
            await self._drained.wait()
            return
        self._dispatcher.stopping = True
        self._outcomes.publisher.shutdown()
        await self._dispatcher.idle(seconds)
        for entry in [*self._outcomes.entries.values()]:
            if entry.batch and not entry.wish:
                self._dispatcher.ask(entry, "drain")
        await self._dispatcher.idle(4.0)
        await self.pool.close(0.0 if self._dispatcher.hurry.is_set() else 2.0)
        self._dispatcher.hurry.clear()
        await self._dispatcher.idle(2.0)
        with contextlib.suppress(ApiError):
            await self._outcomes.blocking(self.store.flush)
        for entry in self._outcomes.entries.values():
            entry.ended.set()
        self._dispatcher.close()
        self._outcomes.close()
        self._drained.set()

    async def _keep_house(self) -> None:
        """Write the progress, remove what has expired and what no row names."""
        now = time.monotonic
        hours = self.settings.keep_hours
        expired = swept = -math.inf
        while True:
            try:
                await self._outcomes.blocking(self.store.flush)
                if hours is not None and now() - expired > min(60.0, hours * 360):
                    expired = now()
                    await self._remove_expired(hours * 3600)
                if now() - swept > 600:
                    swept = now()
                    await asyncio.to_thread(self.store.sweep)  # long; others must not wait
            except ApiError as error:  # a disk that takes nothing now may do later
                logger.error("store: %s", error.message)
            except Exception:
                logger.exception("store: what was to be removed is not")
            await asyncio.sleep(self.settings.flush_seconds)

    async def _remove_expired(self, seconds: float) -> None:
        for id in await self._outcomes.blocking(self.store.expired, seconds):
            with contextlib.suppress(ApiError):
                await self._delete(id)

    async def _submit(self, job: Job, input: Path | None) -> Job:
        try:
            self._refuse_if_stopping()
            key = job.idempotency_key
            if earlier := self.store.find(job.owner, key, job.body_sha256):
                return earlier
            self._refuse_unknown(job.model)
            self._refuse_excess(job)
            self._arriving[job.owner] += 1
            try:
                kept = await self._outcomes.blocking(self.store.add, job, input)
            finally:
                self._arriving[job.owner] -= 1
                self._arriving += Counter()  # without those that are zero
        finally:
            if input:
                remove(input)
        if kept.id == job.id:
            self._outcomes.add(kept)
            self._outcomes.observe("submitted", {"world": job.model})
            self._outcomes.publish_positions(job.model)
            self._dispatcher.schedule(job.model)
        return kept

    def _refuse_if_stopping(self) -> None:
        if self._dispatcher.stopping:
            raise ApiError("shutting_down", "The server shuts down.", retry_after=10)

    def _refuse_unknown(self, model: str) -> None:
        if model not in self.worlds:
            raise ApiError("model_not_found", f"There is no world {model!r:.80} here.", "model")

    def _refuse_excess(self, job: Job) -> None:
        settings, world = self.settings, job.model
        if self.store.free_bytes < settings.min_free_bytes:
            raise ApiError("disk_full", "The server's disk is full; try later.", retry_after=60)
        waiting = [entry for line in self._outcomes.lines.values() for entry in line.waiting]
        if len(waiting) + self._arriving.total() >= settings.queue_size:
            message = f"{settings.queue_size} videos wait already; try later."
            raise ApiError("queue_full", message, retry_after=self._retry_after(world))
        own = sum(entry.owner == job.owner for entry in waiting) + self._arriving[job.owner]
        if job.owner and own >= settings.queue_per_key:
            message = f"{settings.queue_per_key} videos of this key wait already; try later."
            raise ApiError("key_limit", message, retry_after=self._retry_after(world))

    def _retry_after(self, world: str) -> float:
        """Seconds until one of those that wait has begun."""
        busy = [seconds for seconds in self._dispatcher.busy(world) if seconds is not None]
        return min(_LONGEST_RETRY, max(1.0, min(busy, default=10.0)))

    async def _stop(self, entry: Entry, wish: Wish) -> None:
        """Stop a job, and wait until it has ended, of itself perhaps."""
        if entry in self._outcomes.line(entry.world).waiting:
            entry.wish, entry.wished_at = wish, asyncio.get_running_loop().time()
            await self._outcomes.stopped(entry)
            self._outcomes.publish_positions(entry.world)
        elif entry.batch and (entry.wish in (None, "drain") or wish == "delete"):
            self._dispatcher.ask(entry, wish)
        await entry.ended.wait()

    async def _delete(self, id: str) -> None:
        job = self.store.get(id, None)
        if entry := self._outcomes.entries.get(id):
            await self._stop(entry, "delete")
            with contextlib.suppress(ApiError):
                job = self.store.get(id, None)  # it was quicker
                entry = None
            if entry:
                return
        await self._outcomes.blocking(self.store.delete, id)
        self._outcomes.publish_removal(job)

    def _state(self, world: str) -> str:
        slots = self.pool.slots[world]
        if any(slot.stuck for slot in slots):
            return "stuck"
        if any(slot.is_alive for slot in slots):
            return "ready"
        return "loading" if any(not slot.failures for slot in slots) else "no_worker"
