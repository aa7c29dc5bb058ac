"""What becomes of each job: begun, a step further, ended, or in the line again.

Every change is on the disk before an event speaks of it; progress alone is written later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from worldline.files import remove
from worldline.serve.errors import ApiError
from worldline.serve.line import Batch, Entry, Line
from worldline.serve.progress import Estimates, Progress
from worldline.serve.records import ENDED, Job, Status
from worldline.serve.store import Store
from worldline.serve.streams import Publisher

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Observer = Callable[[str, Mapping[str, Any]], None]
_TOGETHER = 0.1  # seconds


class Outcomes:
    """Jobs that have not ended, and what happens to them.

    Attributes:
        entries: by id.
        lines: by world.
        attempts: times that a job may begin whose worker dies.
        keep_seconds: after which a job that has ended is removed; None: never.
    """

    def __init__(
        self, store: Store, batch_window: float, attempts: int, keep_seconds: float | None
    ) -> None:
        self.store, self.attempts, self.keep_seconds = store, attempts, keep_seconds
        self.entries: dict[str, Entry] = {}
        self.lines: dict[str, Line] = {}
        self.publisher, self.estimates = Publisher(), Estimates()
        self.observers: list[Observer] = []
        self._window, self._due = batch_window, set[str]()
        # one thread, so that writes keep their order
        self._executor = ThreadPoolExecutor(1, "store")

    def line(self, world: str) -> Line:
        return self.lines.setdefault(world, Line(self._window))

    def add(self, job: Job) -> Entry:
        """Put a job at the end of its line."""
        now = asyncio.get_running_loop().time()
        entry = Entry(job.id, job.owner, job.model, job.batch_key, now, job.attempts)
        self.entries[job.id] = entry
        self.line(job.model).waiting.append(entry)
        return entry

    async def blocking(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what waits for the disk, after all that was asked for before."""
        loop = asyncio.get_running_loop()
        try:
            future = loop.run_in_executor(self._executor, function, *args)
        except RuntimeError as error:  # it is closed
            raise ApiError("shutting_down", "The server shuts down.", retry_after=10) from error
        return await future

    async def write(self, id: str, **columns: Any) -> Job:
        """Change a job on the disk; in memory alone, for now, where the disk takes nothing."""
        try:
            return await self.blocking(lambda: self.store.update(id, **columns))
        except ApiError as error:
            if error.code == "video_not_found":
                raise
            return self.store.note(id, **columns)

    def close(self) -> None:
        self._executor.shutdown()

    def observe(self, name: str, facts: Mapping[str, Any]) -> None:
        for observer in self.observers:
            try:
                observer(name, facts)
            except Exception:  # a metric must not end a job
                logger.exception("an observer of %s failed", name)

    def positions(self, world: str) -> Mapping[str, int]:
        """Place of each queued job in its line; 0 is the next."""
        line = self.line(world)
        # one that has begun is written so a moment before it leaves the line
        starting = [e.id for e in line.starting if self.store.get(e.id, None).status == "queued"]
        waiting = [entry.id for entry in line.waiting]
        return {id: place for place, id in enumerate(starting + waiting)}

    def publish_positions(self, world: str) -> None:
        """Send each queued job's place that has changed, in a moment: many change together."""
        if self.publisher.is_heard and world not in self._due:
            self._due.add(world)
            loop = asyncio.get_running_loop()
            loop.call_later(_TOGETHER, self._send_positions, world)

    def _send_positions(self, world: str) -> None:
        self._due.discard(world)
        if self.publisher.is_heard:
            for id, place in self.positions(world).items():
                entry = self.entries[id]
                if entry.place != place:
                    entry.place = place
                    data = {"id": id, "status": "queued", "queue_position": place}
                    self.publisher.publish("status", entry.owner, id, data)

    def present(self, job: Job) -> list[tuple[str, Mapping[str, Any] | Job]]:
        """Events that describe a job as it is."""
        if job.status in ENDED:
            return [(job.status, job)]
        place = self.positions(job.model).get(job.id)
        data = {"id": job.id, "status": job.status, "queue_position": place}
        events: list[tuple[str, Mapping[str, Any] | Job]] = [("status", data)]
        entry = self.entries.get(job.id)
        if entry and entry.progress and job.step_kind:
            events.append(("progress", self._progress_data(job, entry.progress)))
        return events

    # while a worker makes it

    async def begun(self, entry: Entry) -> None:
        now, line = asyncio.get_running_loop().time(), self.line(entry.world)
        job = self.store.get(entry.id, None)
        entry.begun, entry.began_at = True, now
        entry.progress = Progress(self.estimates.stages(job), now, job.progress)
        columns = {"status": "in_progress", "started_at": time.time()}
        job = await self.write(entry.id, **columns, attempts=entry.charged + 1)
        if entry in line.starting:
            line.starting.remove(entry)
        seconds = max(0.0, time.time() - job.created_at)  # the clock may have been set
        self.observe("started", {"world": job.model, "queue_seconds": seconds})
        data = {"id": job.id, "status": job.status, "queue_position": None}
        self.publisher.publish("status", job.owner, job.id, data)
        self.publish_positions(entry.world)

    def step(self, entry: Entry, kind: str, done: int, total: int) -> None:
        now = asyncio.get_running_loop().time()
        if entry.progress is None:  # it was not begun
            return
        stage, seconds = entry.progress.step(kind, done, total, now)
        self.estimates.record_step(entry.world, seconds)
        self.observe("step", {"world": entry.world, "stage": stage, "seconds": seconds})
        columns = {"step_kind": kind, "step_done": done, "step_total": total}
        job = self.store.note(entry.id, progress=entry.progress.percent, **columns)
        self.publisher.publish(
            "progress", job.owner, job.id, self._progress_data(job, entry.progress)
        )

    def preview(self, entry: Entry, event: Mapping[str, Any]) -> None:
        data = {key: event[key] for key in ("id", "done", "total", "jpeg_base64")}
        self.publisher.publish("preview", entry.owner, entry.id, data)

    # its end

    async def done(self, entry: Entry, result: Mapping[str, Any]) -> None:
        """Complete a job, if its files are whole."""
        job, code = self.store.get(entry.id, None), "internal_error"
        try:
            whole = await self.blocking(self.store.seal, job)
        except ApiError as error:
            whole, code = False, error.code
        if whole:
            await self.finish(entry, "completed", progress=100, result=dict(result))
        else:
            await self.fail(entry, code, "The files of the video could not be written.")

    async def failed(self, batch: Batch, entry: Entry, event: Mapping[str, Any]) -> None:
        """End a job that its worker could not make; one of a batch without memory waits again."""
        code, key = event.get("code") or "internal_error", entry.batch_key
        if entry.wish in ("cancel", "delete"):
            await self.stopped(entry)
        elif code == "out_of_memory" and batch.size > 1 and key is not None:
            self.line(entry.world).halve(key, batch.size)
            await self.requeue(entry, batch.again)
            batch.again.append(entry.id)
        else:
            message = event.get("message") or "The video could not be made."
            await self.fail(entry, code, message, event.get("param"))

    async def stopped(self, entry: Entry) -> None:
        """End a job as was wished when it was stopped."""
        if entry.wish == "cancel":
            seconds = asyncio.get_running_loop().time() - entry.wished_at
            await self.finish(entry, "cancelled")
            self.observe("cancel", {"world": entry.world, "seconds": seconds})
        elif entry.wish == "delete":
            await self.remove(entry)
        elif entry.wish == "timeout":
            await self.fail(entry, "timeout", "The video took longer than a job may take.")
        elif entry.wish == "drain":
            await self.requeue(entry)
            logger.info("%s: stopped; it is among the first at the next start", entry.id)
        else:
            await self.fail(entry, "internal_error", "The worker stopped without a reason.")

    async def died(self, batch: Batch) -> None:
        """End jobs whose worker has died, or let them wait again, the first one in front."""
        for entry in reversed([*batch.entries]):  # each may have been cancelled meanwhile
            if entry.wish in ("cancel", "delete", "timeout"):
                await self.stopped(entry)
                continue
            charge = not batch.innocent and entry.wish != "drain"
            entry.charged += charge
            if charge and batch.size > 1:  # which of them it was turns out when each is alone
                entry.alone, entry.charged = True, min(entry.charged, self.attempts - 1)
            if entry.charged < self.attempts:
                await self.requeue(entry)
            else:
                message = f"The worker of the video ended {self.attempts} times while it made it."
                await self.fail(entry, "worker_died", message)

    async def fail(self, entry: Entry, code: str, message: str, param: str | None = None) -> None:
        error = {"error_code": code, "error_message": message, "error_param": param}
        await self.finish(entry, "failed", **error)

    async def finish(self, entry: Entry, status: Status, **columns: Any) -> None:
        """End a job: row, then what no one needs any more, then the event."""
        if entry.wish == "delete":
            await self.remove(entry)
            return
        self._leave(entry)
        now = time.time()
        if self.keep_seconds is not None:
            columns["expires_at"] = now + self.keep_seconds
        job = await self.write(entry.id, status=status, completed_at=now, **columns)
        if status != "completed":
            await self.blocking(remove, self.store.folder(entry.id))
        self._report(entry, job)
        self.entries.pop(entry.id, None)
        self.publisher.end(job)
        entry.ended.set()

    async def remove(self, entry: Entry) -> None:
        """Remove a job that is stopped, with its files."""
        self._leave(entry)
        job = self.store.get(entry.id, None)
        try:
            await self.blocking(self.store.delete, entry.id)
        except ApiError:  # the disk takes nothing now; it must not be made all the same
            with contextlib.suppress(ApiError):
                self.store.note(entry.id, status="cancelled", completed_at=time.time())
        self.entries.pop(entry.id, None)
        self.publish_removal(job)
        entry.ended.set()

    def publish_removal(self, job: Job) -> None:
        """End the streams of a job that was removed; lists hear that it is gone."""
        self.publisher.forget(job.id)
        data = {"id": job.id, "status": "deleted", "queue_position": None}
        self.publisher.publish("status", job.owner, job.id, data)
        self.publisher.close(job.id)

    async def requeue(self, entry: Entry, after: Collection[str] = ()) -> None:
        """Let a job wait again, before all but those named; nothing is charged."""
        self._leave(entry)
        entry.begun, entry.progress, entry.wish, entry.place = False, None, None, None
        self.line(entry.world).put_back(entry, after)
        # nothing may be awaited before: whoever cancels it now must write after this
        columns = {"status": "queued", "started_at": None, "attempts": entry.charged}
        job = await self.write(entry.id, **columns)
        self.publisher.forget(entry.id)
        self.publish_positions(job.model)

    def _leave(self, entry: Entry) -> None:
        """Take a job out of its line and its batch."""
        line = self.line(entry.world)
        for places in (line.waiting, line.starting, entry.batch.entries if entry.batch else []):
            if entry in places:
                places.remove(entry)
        entry.batch = None

    def _progress_data(self, job: Job, progress: Progress) -> dict[str, Any]:
        eta = progress.remaining(asyncio.get_running_loop().time())
        return {
            "id": job.id,
            "progress": job.progress,
            "step": {"kind": job.step_kind, "done": job.step_done, "total": job.step_total},
            "eta_s": None if eta is None else round(eta, 1),
        }

    def _report(self, entry: Entry, job: Job) -> None:
        """Log the end of a job, learn from it, and let observers know."""
        left = job.started_at or job.completed_at or 0.0
        queued = max(0.0, left - job.created_at)  # the clock may have been set
        seconds = asyncio.get_running_loop().time() - entry.began_at if entry.begun else 0.0
        if job.status == "completed" and entry.progress:
            self.estimates.record(job, seconds, entry.progress.seconds)
            for stage, spent in entry.progress.seconds.items():
                self.observe("stage", {"world": job.model, "stage": stage, "seconds": spent})
        code = job.error_code
        words = f"{job.status} {code}" if code else job.status
        logger.info("%s: %s after %.1f s in the queue and %.1f s", job.id, words, queued, seconds)
        facts = {"world": job.model, "status": job.status, "code": code, "param": job.error_param}
        seconds_of = {"queue_seconds": queued, "job_seconds": seconds}
        frames = job.shape.get("num_frames") if job.status == "completed" else 0
        self.observe("finished", facts | seconds_of | {"frames": frames})
