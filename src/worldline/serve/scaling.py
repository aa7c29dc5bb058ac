"""Number of workers on a cluster, by the seconds that wait for them; needs no Ray.

Ray itself is met in `serve/ray_workers.py` alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from worldline.errors import InputError, option
from worldline.fleet import needing_ray
from worldline.request import Options

if TYPE_CHECKING:
    from worldline.serve.jobs import Queue

logger = logging.getLogger(__name__)

_RECENT = 50  # jobs of a world whose seconds count


class RayOptions(Options):
    """Options of `--workers ray`: workers on the nodes of a Ray cluster.

    All nodes have the same worldline, and find the models at the same place.
    """

    address: str | None = Field(
        None,
        min_length=1,
        description="Ray cluster, HOST:PORT, or auto for the one that this machine is of. Whoever "
        "reaches the ports of a cluster runs code on it, and no API key protects them: keep them "
        "in a private network.  [default: RAY_ADDRESS, else that of this machine, or one of it "
        "alone]",
    )
    min_workers: int = Field(1, ge=1, le=1000, description="Workers of each world that always run.")
    max_workers: int = Field(8, ge=1, le=1000, description="Most workers of each world.")
    target_wait_s: float = Field(
        60.0, gt=0, description="Seconds that jobs are to wait: more workers are started above it."
    )
    idle_s: float = Field(
        300.0, ge=0, description="Seconds that a worker is idle before it is stopped."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        least, most = self.min_workers, self.max_workers
        if most < least:
            raise InputError(
                f"{option('max_workers', most)} is below {option('min_workers', least)}; give "
                "the same or more"
            )
        return self

    def wanted(self, queued: int, seconds: float) -> int:
        """Workers that begin so many jobs, of so many seconds each, within the target."""
        return min(
            self.max_workers,
            max(self.min_workers, math.ceil(queued * seconds / self.target_wait_s)),
        )


def import_cluster() -> Any:
    """The class `ray_workers.Cluster`, with which Ray is imported.

    Raises:
        Error: Ray is not installed.
    """
    with needing_ray("--workers ray"):
        from worldline.serve.ray_workers import Cluster
    return Cluster


class Demand:
    """What the jobs of one world ask for.

    Attributes:
        seconds: of recent jobs that were completed.
        sizes: of recent batches.
        running_since: when the oldest job since the last end was begun.
        full_since: when each of its workers was last seen busy, or their number changed.
    """

    def __init__(self, now: float) -> None:
        self.seconds: deque[float] = deque(maxlen=_RECENT)
        self.sizes: deque[int] = deque(maxlen=_RECENT)
        self.running_since: float | None = None
        self.full_since = now

    def job_seconds(self, now: float) -> float:
        """Seconds of a worker that one job costs; at least, where none was completed yet."""
        share = mean(self.sizes) if self.sizes else 1.0  # jobs of a batch share its seconds
        if self.seconds:
            return median(self.seconds) / share
        return (now - self.running_since) / share if self.running_since is not None else 0.0


class Autoscaler:
    """Adds workers to a queue at once, and removes those that are idle, one at a time."""

    def __init__(
        self, queue: Queue, options: RayOptions, *, look_s: float = 1.0, down_s: float = 60.0
    ) -> None:
        """Autoscaler that is not started.

        Args:
            queue: started with `min_workers` of each world.
            options: bounds and times.
            look_s: seconds between two looks at the queue.
            down_s: seconds between two removals of a world.
        """
        self.queue, self.options = queue, options
        self._look_s, self._down_s = look_s, down_s
        now = time.monotonic()
        self._demands = {world: Demand(now) for world in queue.worlds}
        self._removed = dict.fromkeys(queue.worlds, -math.inf)
        self._task: asyncio.Task[None] | None = None
        queue.observers.append(self._observe)

    def start(self) -> None:
        """Begin to look; in the queue's event loop, once it has started."""
        for world, demand in self._demands.items():
            recent = f"model = ? AND status = 'completed' ORDER BY id DESC LIMIT {_RECENT}"
            for job in reversed(self.queue.store.rows.select(recent, world)):
                if seconds := job.result.get("inference_time_s"):
                    demand.seconds.append(seconds)
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """End; before the queue is drained."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _observe(self, name: str, facts: Mapping[str, Any]) -> None:
        if (demand := self._demands.get(facts.get("world", ""))) is None:
            return
        if name == "started" and demand.running_since is None:
            demand.running_since = time.monotonic()
        elif name == "batch":
            demand.sizes.append(facts["size"])
        elif name == "finished":
            demand.running_since = None
            if facts["status"] == "completed":
                demand.seconds.append(facts["job_seconds"])

    async def _follow(self) -> None:
        while True:
            for world in self._demands:
                try:
                    await self._fit(world)
                except Exception:  # the next look may fare better
                    logger.exception("%s: the number of its workers cannot be changed", world)
            await asyncio.sleep(self._look_s)

    async def _fit(self, world: str) -> None:
        """Bring the workers of a world to the number that is wanted, or one nearer to it."""
        if self.queue.health()[0] == "shutting_down":
            return
        demand, now = self._demands[world], time.monotonic()
        slots = [slot for slot in self.queue.pool.slots[world] if not slot.retired]
        queued = self.queue.store.counts().get((world, "queued"), 0)
        seconds = demand.job_seconds(now)
        wanted, count = self.options.wanted(queued, seconds), len(slots)
        if wanted > count:
            logger.info(
                "%s: %d jobs of %.1f s wait; %d workers become %d",
                *(world, queued, seconds, count, wanted),
            )
            for _ in range(wanted - count):
                self.queue.pool.add(world)
            demand.full_since = now
        elif all(not slot.is_idle or slot.worker.state == "loading" for slot in slots):
            demand.full_since = now
        elif (
            wanted < count
            and now - demand.full_since >= self.options.idle_s
            and now - self._removed[world] >= self._down_s
            and (name := await self.queue.pool.remove(world)) is not None
        ):
            logger.info("%s: it was idle and is stopped; %d are left", name, count - 1)
            self._removed[world] = time.monotonic()
