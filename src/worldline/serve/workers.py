"""Worker processes of this machine, seen from the API process; needs no torch."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

from worldline.serve.errors import ApiError
from worldline.serve.media import probe
from worldline.serve.records import ENDS, Checked, Facts, MediaKind, Task, WorkerDied

logger = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 26  # bytes of a message
_END_S = 5.0  # for a process to end once its socket is closed
_STOP_S = 120.0  # for a step to end, at most
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


class LocalWorker(Handle):
    """A process that owns a world, see `records.Worker`.

    Attributes:
        pid: of the process; None before it starts.
    """

    def __init__(
        self,
        world: str,
        name: str,
        options: Mapping[str, Any],
        *,
        devices: Sequence[str | int] | None = None,
        place: str = "",
        log: Callable[[str], None] = _log,
    ) -> None:
        """A worker that is not started.

        Args:
            world: name or path, as of `worldline.load`.
            name: such as "tiny-Cosmos-Predict1-4B/0".
            options: load options, as JSON holds them.
            devices: GPUs that the process sees; None: all.
            place: path of the world, where its name is another.
            log: gets each line that the process writes to standard error.
        """
        super().__init__(world, name)
        self.options, self.place = dict(options), place or world
        self.pid: int | None = None
        self._devices, self._log = devices, log
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._batches: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._tail: list[str] = []
        self._ready: asyncio.Future[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        """Start the process and wait until its world is loaded.

        Raises:
            WorkerDied: it cannot load; the message holds the reason.
        """
        self.state, self.heartbeat = "loading", time.monotonic()
        self._reason, self._tail, self._unfreed = "", [], 0
        self._ready = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        try:
            # -P: a module of the working folder must not take the place of ours
            words = [sys.executable, "-P", "-m", "worldline.serve.worker", str(theirs.fileno())]
            words.append(self.name)  # for whoever looks at the processes
            self._process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=self._environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE)
        self._send({"world": self.place, "options": self.options, "parent": os.getpid()})
        logs = asyncio.create_task(self._read_log(self._process))
        self._tasks = [logs, asyncio.create_task(self._read(reader, self._process, logs))]
        try:
            await asyncio.shield(self._ready)
        except asyncio.CancelledError:
            await self.stop(kill=True)
            raise

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._devices))
        return environment

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while data := await process.stderr.read(1 << 16):
            for line in data.decode(errors="replace").splitlines():
                self._tail = [*self._tail, line][-_KEPT_LINES:]
                self._log(line)

    async def _read(
        self,
        reader: asyncio.StreamReader,
        process: asyncio.subprocess.Process,
        logs: asyncio.Task[None],
    ) -> None:
        """Pass on what the process sends, until it ends."""
        try:
            with suppress(OSError, ValueError):  # ValueError: a line is too long
                while (line := await reader.readline()).endswith(b"\n"):
                    self.heartbeat = time.monotonic()
                    self._receive(json.loads(line))
        finally:
            self.state = "dead"
            if self._writer is not None:
                self._writer.close()
            await self._reap(process, _END_S)
            with suppress(TimeoutError):  # a child of it may hold its standard error
                await asyncio.wait_for(asyncio.shield(logs), 1)
            logs.cancel()
            self._bury(process.returncode)

    async def _reap(self, process: asyncio.subprocess.Process, seconds: float) -> None:
        """Wait for the end of a process, and kill it if it does not end."""
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _bury(self, status: int | None) -> None:
        """Raise `WorkerDied` wherever the process is waited for."""
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        last = self._tail[-1] if self._tail else "no message"
        self._reason = self._reason or f"{self.name} ended ({how}): {last}"
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(WorkerDied(self._reason))
            self._ready.exception()  # seen, though nobody may wait any more
        for call in self._calls.values():
            if not call.done():
                call.set_exception(WorkerDied(self._reason))
        for events in self._batches.values():
            events.put_nowait(None)

    def _receive(self, message: dict[str, Any]) -> None:
        kind, batch = message["event"], message.pop("batch", None)
        if kind == "heartbeat":
            self.peak_bytes = message["peak_bytes"]
        elif kind == "ready":
            self.facts, self.state = Facts(**message["facts"]), "ready"
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif kind == "unloadable":
            self._reason = f"{self.name} cannot load: {message['message']}"
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

    async def stop(self, *, kill: bool = False) -> None:
        """End the process: after the current step and with the files of videos, or at once."""
        process = self._process
        if process is None:
            self.state = "dead"
            return
        if kill or self.state == "loading":
            with suppress(ProcessLookupError):
                process.kill()
        else:
            self._send({"stop": True})
        await self._reap(process, _STOP_S)
        await asyncio.gather(*self._tasks, return_exceptions=True)
