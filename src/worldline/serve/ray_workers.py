"""Workers that are actors of a Ray cluster, seen from the API process; needs no torch there.

An actor owns a world, as a worker process of this machine does, and Ray places it on a node that
has GPUs for it. Inputs travel to it and files back as bytes, so that nodes share no disk with the
API process. Ray repeats no call and restarts no actor: the queue decides what follows a death.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from worldline.errors import one_line
from worldline.files import replacing_all
from worldline.fleet.driver import connect
from worldline.parallel.job import variables
from worldline.serve.actor import Process
from worldline.serve.errors import unkept
from worldline.serve.folder import synchronise
from worldline.serve.records import ENDS, Facts, Task, Worker, WorkerDied
from worldline.serve.workers import Handle

logger = logging.getLogger(__name__)

_BEAT_S = 2.0
_LOOK_S = 30.0  # between lines about a worker that waits for room
_STOP_S = 120.0  # for a step to end, at most
_ARRIVE_S = 5.0  # for its files to arrive
# calls wait for others of their group alone: a world answers while it makes videos
_MAKE, _CONCURRENT = "make", 4


class RayWorker(Handle):
    """A world in an actor, see `records.Worker`; where it has several GPUs, in one actor each."""

    def __init__(
        self,
        world: str,
        name: str,
        options: Mapping[str, Any],
        *,
        gpus: int = 1,
        place: str | None = None,
    ) -> None:
        """A worker that is not started; a cluster is connected.

        Args:
            world: what the server calls it.
            name: such as "tiny-Cosmos-Predict1-4B/0".
            options: load options.
            gpus: that make a video together; 0 for none.
            place: name or path, as of `worldline.load`; by default that of the world.
        """
        super().__init__(world, name)
        self.options = {**({} if gpus else {"device": "cpu"}), **options}
        self._gpus, self._place = gpus, place or world
        self._actors: list[Any] = []
        self._group: Any = None
        self._running: set[int] = set()  # batches
        self._cancelled: set[str] = set()

    async def start(self) -> None:
        """Start the actor, once a node has room, and wait until its world is loaded.

        Raises:
            WorkerDied: it cannot load; the message holds the reason.
        """
        try:
            self._begin()
            port = await self._patiently(_one(self._actors[0].port.remote()))
            loads = [
                actor.load.options(concurrency_group=_MAKE).remote(
                    version("worldline"),
                    *(self._place, self.options, variables(rank, len(self._actors), port)),
                )
                for rank, actor in enumerate(self._actors)
            ]
            answers = await self._patiently(_all(loads))
        except RayError as error:
            await self.stop(kill=True)
            raise WorkerDied(f"{self.name} ended while it was loaded: {one_line(error)}") from None
        except BaseException:
            await self.stop(kill=True)
            raise
        if messages := [answer["message"] for answer in answers if "message" in answer]:
            await self.stop(kill=True)
            raise WorkerDied(f"{self.name} cannot load: {messages[0]}")
        self.facts, self.state = Facts(**answers[0]), "ready"
        self.heartbeat = time.monotonic()
        self._tasks = [asyncio.create_task(self._beat(actor)) for actor in self._actors]

    def _begin(self) -> None:
        """Ask for the actors; they start once the cluster has room."""
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": min(1, self._gpus)}
        if self._gpus > 1:  # on one node, which must have room for all
            self._group = placement_group([{"CPU": 1, "GPU": 1}] * self._gpus, "STRICT_PACK")
        remote: Any = ray.remote(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_CONCURRENT,
            concurrency_groups={_MAKE: _CONCURRENT},
            **options,
        )(Process)
        for rank in range(max(1, self._gpus)):
            placed = {}
            if self._group is not None:
                placed["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, rank)
            self._actors.append(remote.options(**placed).remote(Path.cwd()))

    async def _patiently(self, work: Awaitable[Any]) -> Any:
        """Result of some work; each half minute a line about what it waits for."""
        future = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([future], timeout=_LOOK_S))[0]:
                has = ray.available_resources()
                logger.info(
                    "%s: loads, or waits for a node with %d GPU and %d CPU; the cluster has %g "
                    "and %g free",
                    *(self.name, self._gpus, len(self._actors)),
                    *(has.get("GPU", 0), has.get("CPU", 0)),
                    extra={"repeats": True},
                )
            return future.result()
        finally:
            future.cancel()

    async def _beat(self, actor: Any) -> None:
        """Ask an actor for signs of life, until it has none."""
        try:
            while True:
                peak = await actor.heartbeat.remote()
                if actor is self._actors[0]:
                    self.heartbeat, self.peak_bytes = time.monotonic(), peak
                await asyncio.sleep(_BEAT_S)
        except RayError as error:
            self._bury(error)

    def _bury(self, error: Exception) -> None:
        """Note that an actor has ended: the others of its world cannot go on."""
        self.state = "dead"
        self._reason = self._reason or f"{self.name} ended: {one_line(error)}"
        self._kill()

    def _kill(self) -> None:
        for actor in self._actors:
            with suppress(RayError, ValueError):  # ValueError: it was never there
                ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    async def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer: Mapping[str, Any] = await self._actors[0].check.remote(message)
        except RayError as error:
            self._bury(error)
            raise WorkerDied(self._reason) from None
        return answer

    def run(self, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
        """Make the videos of one batch, see `records.Worker`.

        Raises:
            WorkerDied: it ended meanwhile.
        """
        if self.state != "dead":
            self.state = "busy"
            self._unfreed += 1
        return self._follow(next(self._numbers), tasks)

    async def _follow(self, number: int, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
        folders = {task.id: Path(task.folder) for task in tasks}
        missing = {*folders}
        self._running.add(number)
        try:
            inputs = await asyncio.to_thread(_read_inputs, tasks)
            if self.state == "dead":
                raise WorkerDied(self._reason)
            options = {"num_returns": "streaming", "concurrency_group": _MAKE}
            call = self._actors[0].run.options(**options)
            async for reference in call.remote(number, tasks, inputs):
                event = await reference
                self.heartbeat = time.monotonic()
                if event["event"] == "begun" and event["id"] in self._cancelled:
                    self.cancel(event["id"])  # the first time it was not there yet
                if event["event"] == "free":
                    self._free()
                if (files := event.pop("files", None)) is not None:
                    event = await asyncio.to_thread(keep, folders[event["id"]], files, event)
                if event["event"] in ENDS:
                    missing.discard(event["id"])
                    self._cancelled.discard(event["id"])
                yield event
        except RayError as error:
            self._bury(error)
        finally:
            self._running.discard(number)
            for id in missing:  # nobody waits for them any more
                self.cancel(id)
                self._cancelled.discard(id)
        if missing:
            raise WorkerDied(self._reason or f"{self.name} was stopped")

    def cancel(self, id: str) -> None:
        """Stop a task at its next step; its last event is cancelled, or done if it was quicker."""
        if self.state == "busy":
            self._cancelled.add(id)
            self._actors[0].cancel.remote(id)

    async def stop(self, *, kill: bool = False) -> None:
        """End the actor: after the current step, with files that are being written; or at once."""
        if not kill and self.state in ("ready", "busy"):
            with suppress(RayError, TimeoutError):
                await asyncio.wait_for(_one(self._actors[0].stop.remote()), _STOP_S)
                end = time.monotonic() + _ARRIVE_S
                while self._running and time.monotonic() < end:
                    await asyncio.sleep(0.02)
        self.state = "dead"
        self._reason = self._reason or f"{self.name} was stopped"
        for task in self._tasks:
            task.cancel()
        self._kill()


async def _one(reference: Any) -> Any:
    return await reference


async def _all(references: Sequence[Any]) -> list[Any]:
    return [*await asyncio.gather(*map(_one, references))]


def _read_inputs(tasks: Sequence[Task]) -> dict[str, tuple[bytes, int]]:
    """Contents and times of inputs by id; a task whose input is absent fails by that."""
    inputs = {}
    for task in tasks:
        if task.input is not None:
            with suppress(OSError):
                path = Path(task.input)
                inputs[task.id] = path.read_bytes(), path.stat().st_mtime_ns
    return inputs


def keep(folder: Path, files: Mapping[str, bytes], event: dict[str, Any]) -> dict[str, Any]:
    """Write the files of a task, all whole or none; its last event."""
    paths = [folder / Path(name).name for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_all(paths) as temporaries:
            for temporary, content in zip(temporaries, files.values(), strict=True):
                temporary.write_bytes(content)
        synchronise(folder)
    except OSError as error:
        code, message = unkept(error)
        failed = {"event": "failed", "id": event["id"], "param": None}
        return {**failed, "code": code, "message": message}
    return event


class Cluster:
    """A connection to a Ray cluster, which makes workers of it."""

    def __init__(self, address: str | None, gpus: int) -> None:
        """Connect to a cluster, or make one of this machine; in the main thread.

        Args:
            address: as of `RayOptions`.
            gpus: of each worker.

        Raises:
            Error: there is no cluster at the address.
        """
        self.gpus, self.connected = gpus, connect(address)

    def worker(
        self, world: str, name: str, options: Mapping[str, Any], place: str | None = None
    ) -> Worker:
        """A worker that is not started, as of `RayWorker`."""
        return RayWorker(world, name, options, gpus=self.gpus, place=place)

    def close(self) -> None:
        """Disconnect; actors end."""
        if self.connected:
            ray.shutdown()
