"""Process of an actor, which owns a world as `serve/worker.py` does; needs no Ray.

Its methods are called from several threads at once.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worldline.errors import Error, one_line
from worldline.files import remove, remove_stale, temporary_name
from worldline.serve.records import ENDS, Task

logger = logging.getLogger(__name__)


class Process:
    """The process of an actor: a world, or its share of one that several GPUs hold."""

    def __init__(self, folder: Path) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        with suppress(OSError):  # where the API process finds its models
            os.chdir(folder)
        name = Path(tempfile.gettempdir()) / "worldline-serve"
        remove_stale(name)  # of processes that were killed
        self._folder = temporary_name(name)
        self._folder.mkdir(mode=0o700)
        self._worker: Any = None
        self._making: threading.Thread | None = None
        self._answer: dict[str, Any] = {}
        self._batches: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}

    def port(self) -> int:
        """A port of the node that is free."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number: int = free.getsockname()[1]
            return number

    def pid(self) -> int:
        """Id of the process."""
        return os.getpid()

    def load(
        self, release: str, world: str, options: Mapping[str, Any], environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Facts of the world, once it is loaded; or {"message"}: why it is not.

        Args:
            release: of worldline in the API process.
            world: name or path.
            options: load options.
            environment: what names this process among several.
        """
        from worldline.serve.worker import Worker

        if (here := version("worldline")) != release:
            node = f"node {os.uname().nodename}"
            return {"message": f"{node}: it has worldline {here}; install {release} as the server"}
        os.environ.update(environment)
        worker = self._worker = Worker(self, world, dict(options))
        try:
            worker.load(time.monotonic())
        except Exception as error:
            if not isinstance(error, Error):
                logger.exception("%s cannot load", world)
            return {"message": str(error) if isinstance(error, Error) else one_line(error)}
        self._making = threading.Thread(target=self._make, name="make", daemon=True)
        self._making.start()
        facts: dict[str, Any] = self._answer["facts"]
        return facts

    def _make(self) -> None:
        self._worker.make()
        for events in [*self._batches.values()]:
            events.put(None)

    def send(self, event: dict[str, Any]) -> None:
        """Take an event of the worker, as its socket elsewhere does."""
        events = self._batches.get(event.pop("batch", 0))
        if events is not None:
            events.put(event)
        elif event["event"] == "ready":
            self._answer = event

    def run(
        self, number: int, tasks: Sequence[Task], inputs: Mapping[str, tuple[bytes, int]]
    ) -> Iterator[dict[str, Any]]:
        """Events of a batch, as of `records.Worker.run`; done has "files", their contents by name.

        Args:
            number: of the batch.
            tasks: their inputs are names, their folders are the API process's.
            inputs: contents and times of modification by id.
        """
        events = self._batches[number] = queue.SimpleQueue()
        missing, free = {task.id for task in tasks}, False
        folder = self._folder / f"{number}"
        folder.mkdir()
        try:
            here = [_place(task, folder, inputs.get(task.id)) for task in tasks]
            self._worker.maker.add(here)
            self._worker.batches.put((number, here))
            while (missing or not free) and (event := events.get()) is not None:
                free = free or event["event"] == "free"
                if event["event"] in ENDS:
                    missing.discard(event["id"])
                if event["event"] == "done":
                    made = folder / event["id"]
                    event["files"] = {path.name: path.read_bytes() for path in made.iterdir()}
                    remove(made)
                yield event
        finally:
            del self._batches[number]
            remove(folder)

    def check(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, while videos are made, too."""
        answer: dict[str, Any] = self._worker.check(message)
        return answer

    def cancel(self, id: str) -> None:
        """End a task at its next step."""
        self._worker.maker.cancel(id)

    def heartbeat(self) -> int:
        """Peak bytes of memory."""
        peak: int = self._worker.measure()
        return peak

    def stop(self) -> None:
        """End after the current step, and files that are being written."""
        self._worker.stop()
        if self._making is not None:
            self._making.join()
        remove(self._folder)


def _place(task: Task, folder: Path, input: tuple[bytes, int] | None) -> Task:
    """A task with its files in a folder of this node."""
    path = None if task.input is None else folder / Path(task.input).name
    if path is not None and input is not None:
        content, modified = input
        path.write_bytes(content)
        os.utime(path, ns=(modified, modified))  # which the report has
    return replace(task, input=None if path is None else str(path), folder=str(folder / task.id))
