"""Worker processes of this machine, seen from the API process; needs no torch."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from worldline.parallel.job import LISTENER, environments
from worldline.serve.errors import ApiError
from worldline.serve.media import probe
from worldline.serve.records import ENDS, Checked, Facts, MediaKind, Task, WorkerDied

logger = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 26  # bytes of a message
_END_S = 5.0  # for a process to end once its socket is closed
_STOP_S = 120.0  # for a step to end, at most
_EVIDENCE_S = 0.1  # in which another that was killed becomes known
_KEPT_LINES = 5  # of its log, for the reason of its end


def _log(line: str) -> None:
    logger.info("%s", line)


class Handle(ABC):
    """What every worker has, wherever its process is, see `records.Worker`."""

    def __init__(self, world: str, name: str) -> None:
        self.world, self.name = world, name
        self.state: Literal["loading", "ready", "busy", "dead"] = "loading"
        self.facts: Facts | None = None
        self.heartbeat = time.monotonic()
        self.peak_bytes = 0
        self._numbers = itertools.count(1)
        self._unfreed = 0  # batches after which no other may begin yet
        self._reason = ""  # why it is dead
        self._tasks: list[asyncio.Task[None]] = []

    @abstractmethod
    async def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer of the process to a check.

        Raises:
            WorkerDied: it ended meanwhile.
        """

    async def check(
        self, stated: Mapping[str, Any], input: str | None, kind: MediaKind | None
    ) -> Checked:
        """Check what a client stated, also while a job runs; the input is opened in a process.

        Raises:
            ApiError: invalid_value, unknown_parameter, unreadable_media….
            WorkerDied: it ended meanwhile.
        """
        info = None
        if input is not None and kind is not None:
            info = await probe(input, kind)
        if self.state not in ("ready", "busy"):
            raise WorkerDied(self._reason or f"{self.name} is not loaded")
        answer = await self._ask(
            {"check": dict(stated), "call": 0, "input": input, "kind": kind, "info": info}
        )
        if answer["event"] == "checked":
            return Checked(**answer["checked"])
        raise ApiError(answer["code"], answer["message"], answer.get("param"))

    def _free(self) -> None:
        """Note that another batch may begin."""
        self._unfreed -= 1
        if not self._unfreed and self.state == "busy":
            self.state = "ready"


@dataclass
class Rank:
    """One process of a worker.

    Attributes:
        label: before its name or lines, where it is not the first.
        writer: of the socket to it.
        heartbeat: as of `records.Worker`.
        peak_bytes: of memory.
        tail: last lines of its log.
    """

    label: str
    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    heartbeat: float
    peak_bytes: int = 0
    tail: list[str] = field(default_factory=list)

    def send(self, message: Mapping[str, Any]) -> None:
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        if self.process.returncode is None:  # `Process.kill` may reap one that asyncio waits for
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

    async def reap(self, seconds: float) -> None:
        """Wait for the end of the process, and kill it if it does not end."""
        try:
            await asyncio.wait_for(self.process.wait(), seconds)
        except TimeoutError:
            self.kill()
            await self.process.wait()


class LocalWorker(Handle):
    """A process that owns a world, or several that share one, see `records.Worker`.

    The first alone is asked for anything, and the others follow it. All end with any of them.

    Attributes:
        processes: number of them.
        devices: GPUs that they see; None: all.
        ranks: the processes, in order; none before they start.
    """

    def __init__(
        self,
        world: str,
        name: str,
        options: Mapping[str, Any],
        *,
        processes: int = 1,
        devices: Sequence[str | int] | None = None,
        place: str = "",
        log: Callable[[str], None] = _log,
    ) -> None:
        """A worker that is not started.

        Args:
            world: name or path, as of `worldline.load`.
            name: such as "tiny-Cosmos-Predict1-4B/0".
            options: load options, as JSON holds them.
            processes: that make a video together.
            devices: GPUs that each process sees, and the n-th of which the n-th takes; None: all.
            place: path of the world, where its name is another.
            log: gets each line that a process writes to standard error.
        """
        super().__init__(world, name)
        self.options, self.place = dict(options), place or world
        self.ranks: list[Rank] = []
        self.processes, self.devices, self._log = processes, devices, log
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._batches: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._ready: asyncio.Future[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Id of the first process; None before it starts."""
        return self.ranks[0].process.pid if self.ranks else None

    async def start(self) -> None:
        """Start the processes and wait until their world is loaded.

        Raises:
            WorkerDied: it cannot load; the message holds the reason.
        """
        await asyncio.gather(*self._tasks, return_exceptions=True)  # of processes that have died
        self.state, self.heartbeat = "loading", time.monotonic()
        self._reason, self._unfreed, self._stopping = "", 0, False
        self.ranks, self._tasks = [], []
        self._ready = asyncio.get_running_loop().create_future()
        try:
            with socket.socket() as listener:  # where several meet; nobody else can have the port
                listener.bind(("127.0.0.1", 0))
                for environment in self._environments(listener):
                    await self._begin(environment)
            await asyncio.shield(self._ready)
        except BaseException:
            await self.stop(kill=True)
            raise

    def _environments(self, listener: socket.socket) -> list[dict[str, str]]:
        first, *others = environments(self.processes, listener.getsockname()[1])
        if others:
            listener.listen()
            first[LISTENER] = str(listener.fileno())
        for environment in (first, *others):
            environment["PYTHONUNBUFFERED"] = "1"
            if self.devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.devices))
            if others and sys.platform == "linux":  # no other machine is to reach them
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return [first, *others]

    async def _begin(self, environment: Mapping[str, str]) -> None:
        """Start the next process."""
        label = f"rank {len(self.ranks)}: " if self.ranks else ""
        ours, theirs = socket.socketpair()
        try:
            # -P: a module of the working folder must not take the place of ours
            words = [sys.executable, "-P", "-m", "worldline.serve.worker", str(theirs.fileno())]
            words.append(f"{label}{self.name}")  # for whoever looks at the processes
            listener = [int(environment[LISTENER])] if LISTENER in environment else []
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno(), *listener],
                start_new_session=True,
                env=environment,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE)
        rank = Rank(label, process, writer, time.monotonic())
        self.ranks.append(rank)
        rank.send({"world": self.place, "options": self.options, "parent": os.getpid()})
        logs = asyncio.create_task(self._read_log(rank))
        self._tasks += [logs, asyncio.create_task(self._read(rank, reader, logs))]

    async def _read_log(self, rank: Rank) -> None:
        assert rank.process.stderr is not None
        while data := await rank.process.stderr.read(1 << 16):
            for line in data.decode(errors="replace").splitlines():
                rank.tail = [*rank.tail, line][-_KEPT_LINES:]
                self._log(f"{rank.label}{line}")

    async def _read(
        self, rank: Rank, reader: asyncio.StreamReader, logs: asyncio.Task[None]
    ) -> None:
        """Pass on what a process sends, until it ends."""
        try:
            with suppress(OSError, ValueError):  # ValueError: a line is too long
                while (line := await reader.readline()).endswith(b"\n"):
                    rank.heartbeat = time.monotonic()
                    self.heartbeat = min(each.heartbeat for each in self.ranks)
                    self._receive(rank, json.loads(line))
        finally:
            first, self.state = self.state != "dead", "dead"
            rank.writer.close()
            await rank.reap(_END_S)
            cause = await self._end_all(rank) if first else rank
            with suppress(TimeoutError):  # a child of it may hold its standard error
                await asyncio.wait_for(asyncio.shield(logs), 1)
            logs.cancel()
            if first:
                self._bury(cause)

    async def _end_all(self, rank: Rank) -> Rank:
        """End the other processes, which wait for the first that has ended; that, or its cause."""
        status, cause = rank.process.returncode or 0, rank
        if status == 0 and self._stopping:
            return rank  # they end, too
        if status > 0 and len(self.ranks) > 1:  # perhaps it has lost one that was killed
            await asyncio.sleep(_EVIDENCE_S)
            killed = (each for each in self.ranks if (each.process.returncode or 0) < 0)
            cause = next(killed, rank)
        self._kill()
        return cause

    def _kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def _bury(self, rank: Rank) -> None:
        """Raise `WorkerDied` wherever the processes are waited for, of which one has ended."""
        status = rank.process.returncode
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        last = rank.tail[-1] if rank.tail else "no message"
        self._reason = self._reason or f"{rank.label}{self.name} ended ({how}): {last}"
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(WorkerDied(self._reason))
            self._ready.exception()  # seen, though nobody may wait any more
        for call in self._calls.values():
            if not call.done():
                call.set_exception(WorkerDied(self._reason))
        for events in self._batches.values():
            events.put_nowait(None)

    def _receive(self, rank: Rank, message: dict[str, Any]) -> None:
        kind, batch = message["event"], message.pop("batch", None)
        if kind == "heartbeat":
            rank.peak_bytes = message["peak_bytes"]
            self.peak_bytes = max(each.peak_bytes for each in self.ranks)
        elif kind == "unloadable":
            self._reason = self._reason or f"{self.name} cannot load: {message['message']}"
        elif rank is not self.ranks[0]:
            return  # what all of them send, the first does
        elif kind == "ready":
            self.facts, self.state = Facts(**message["facts"]), "ready"
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif kind in ("checked", "refused"):
            call = self._calls.get(message["call"])
            if call is not None and not call.done():
                call.set_result(message)
        else:
            if kind == "free":
                self._free()
            if (events := self._batches.get(batch or 0)) is not None:
                events.put_nowait(message)

    async def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        number = next(self._numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        self._send({**message, "call": number})
        try:
            return await self._calls[number]
        finally:
            del self._calls[number]

    def run(self, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
        """Make the videos of one batch, see `records.Worker`; it begins at once.

        Raises:
            WorkerDied: it ended meanwhile.
        """
        number, events = next(self._numbers), asyncio.Queue[dict[str, Any] | None]()
        if self.state == "dead":
            events.put_nowait(None)
        else:
            self._batches[number] = events
            self._unfreed += 1
            self.state = "busy"
            self._send({"run": number, "tasks": [asdict(task) for task in tasks]})
        return self._follow(number, events, {task.id for task in tasks})

    async def _follow(
        self, number: int, events: asyncio.Queue[dict[str, Any] | None], missing: set[str]
    ) -> AsyncIterator[dict[str, Any]]:
        free = False
        try:
            while missing or not free:
                if (event := await events.get()) is None:
                    raise WorkerDied(self._reason)
                free = free or event["event"] == "free"
                if event["event"] in ENDS:
                    missing.discard(event["id"])
                yield event
        finally:
            self._batches.pop(number, None)
            for id in missing:  # nobody waits for them any more
                self.cancel(id)

    def cancel(self, id: str) -> None:
        """Stop a task at its next step; its last event is cancelled, or done if it was quicker."""
        self._send({"cancel": id})

    def _send(self, message: Mapping[str, Any]) -> None:
        if self.ranks:
            self.ranks[0].send(message)

    async def stop(self, *, kill: bool = False) -> None:
        """End the processes: after the current step and with the files of videos, or at once."""
        self._stopping = True
        if kill or self.state == "loading":
            self._kill()
        else:
            self._send({"stop": True})
        for place, rank in enumerate(self.ranks):  # the others end with the first
            await rank.reap(_END_S if place else _STOP_S)
        if not self.ranks:
            self.state = "dead"
        await asyncio.gather(*self._tasks, return_exceptions=True)
