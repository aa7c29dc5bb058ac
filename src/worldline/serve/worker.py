"""Program of a worker process: `python -m worldline.serve.worker FD`, one world of one server.

Lines of JSON come and go over the socket FD. The first line that comes is {"world", "options",
"parent"}; then {"check", "call", …}, {"run", "tasks"}, {"cancel"}, {"stop"}. What goes has "event":
ready, unloadable, heartbeat, checked and refused (with "call"), free and the events of a batch
(with "batch"), as of `records.Worker`. The process ends with its parent, or with the socket.

Several that share a world have a socket each, and the environment names them as torchrun would. The
first alone is asked for anything, and the others follow it through the process group.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from worldline.parallel import job

BEAT_S = 2.0
_PATIENCE_S = 60.0  # of processes that wait for the first; a collective may not wait for ever
_SET_PDEATHSIG = 1  # of prctl(2)

logger = logging.getLogger(__name__)


class Line:
    """The socket to the parent: whole lines from any thread."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self.socket = socket.socket(fileno=descriptor)
        self.lines = self.socket.makefile("r", encoding="utf-8", newline="\n")
        self._lock = threading.Lock()

    def send(self, event: dict[str, Any]) -> None:
        data = json.dumps(event).encode() + b"\n"
        try:
            with self._lock:
                self.socket.sendall(data)
        except OSError:  # the parent has gone
            os._exit(1)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        try:
            line = self.lines.readline()
        except (OSError, ValueError):
            return None
        message: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return message


def main() -> None:
    line = Line(int(sys.argv[1]))
    keep_to_parent(hello := line.receive())
    assert hello is not None
    # what all of a world log, the first does
    level = logging.INFO if job.place().speaks else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    Worker(line, hello["world"], hello["options"]).serve()


def keep_to_parent(hello: dict[str, Any] | None) -> None:
    """End with the parent, and not by a terminal's Ctrl-C, about which the parent decides."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if hello is None or os.getppid() != hello["parent"]:
        sys.exit(1)

    def ignore(number: int, frame: FrameType | None) -> None:
        logger.info("signal %d is left to the server", number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ignore)  # a handler: programs that are started keep none


class Worker:
    """A world behind a socket: the main thread makes videos, another answers meanwhile.

    Attributes:
        line: the socket; all that goes to the parent is sent by it.
        batches: to make, in order; None ends the worker.
        maker: of the videos, once the world is loaded.
        peak: bytes of memory.
    """

    def __init__(self, line: Any, world: str, options: dict[str, Any]) -> None:
        self.line, self.name, self.options = line, world, options
        self.batches: queue.SimpleQueue[tuple[int, list[Any]] | None] = queue.SimpleQueue()
        self.maker: Any = None
        self.peak = 0

    def serve(self) -> None:
        """Load the world and make videos until the socket closes or the parent stops this."""
        threading.Thread(target=self.beat, name="heartbeat", daemon=True).start()
        reader = threading.Thread(target=self.read, name="control", daemon=True)
        started = time.monotonic()
        try:
            self.load(started)
        except Exception as error:
            from worldline.errors import Error, one_line

            if not isinstance(error, Error):
                logger.exception("%s cannot load", self.name)
            reason = str(error) if isinstance(error, Error) else one_line(error)
            self.line.send({"event": "unloadable", "message": reason})
            self.end(1)
        reader.start()
        self.make()
        self.end(0)

    def make(self) -> None:
        """Make one batch after another, until the worker is to end, or cannot go on."""
        try:
            while (batch := self.next_batch()) is not None:
                self.maker.run(*batch)
            self.maker.finish()
            job.leave()
        except BaseException:  # the device is lost; or other processes are, or wait for this one
            logger.exception("the world cannot go on")
            self.end(1)

    def next_batch(self) -> tuple[int, list[Any]] | None:
        """What to make next, which the first of several processes gets for all."""
        processes = self.maker.world.processes

        def take() -> tuple[int, list[Any]] | None:
            try:
                return self.batches.get(timeout=_PATIENCE_S if processes.count > 1 else None)
            except queue.Empty:
                return 0, []

        while True:
            batch: tuple[int, list[Any]] | None = processes.once(take)
            if batch is None or batch[1]:
                return batch

    def load(self, started: float) -> None:
        from worldline.serve.checks import facts
        from worldline.serve.making import Maker
        from worldline.world import load

        job.remedy = "the server starts all processes of the world again"
        world = load(self.name, **self.options)
        self.maker = Maker(world, self.line.send)
        described = facts(world, time.monotonic() - started)
        self.line.send({"event": "ready", "facts": asdict(described)})

    def end(self, status: int) -> None:
        """End at once: nothing is left to write, and other threads may wait for ever."""
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)

    def read(self) -> None:
        """Answer the parent until it goes."""
        try:
            self.answer()
        except Exception:  # else nobody would hear the parent any more
            logger.exception("a message of the server cannot be understood")
            self.end(1)
        self.end(0)

    def answer(self) -> None:
        from worldline.serve.records import Task

        while (message := self.line.receive()) is not None:
            if "check" in message:
                self.line.send(self.check(message))
            elif "run" in message:
                tasks = [Task(**task) for task in message["tasks"]]
                self.maker.add(tasks)
                self.batches.put((message["run"], tasks))
            elif "cancel" in message:
                self.maker.cancel(message["cancel"])
            elif "stop" in message:
                self.stop()

    def stop(self) -> None:
        """Have `make` return after the current step, and files that are being written."""
        self.maker.stopping = True
        self.batches.put(None)

    def check(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that is to be checked."""
        from worldline.serve.checks import check
        from worldline.serve.errors import ApiError

        input = None if message["input"] is None else Path(message["input"])
        answer: dict[str, Any] = {"call": message["call"]}
        try:
            world = self.maker.world
            checked = check(world, message["check"], message["kind"], input, message["info"])
            answer |= {"event": "checked", "checked": asdict(checked)}
        except ApiError as error:
            refused = {"code": error.code, "message": error.message, "param": error.param}
            answer |= {"event": "refused", **refused}
        except Exception:
            logger.exception("a request cannot be checked")
            words = "The server failed to check this request; its log has the reason."
            answer |= {"event": "refused", "code": "internal_error", "message": words}
        return answer

    def beat(self) -> None:
        """Send signs of life, and the peak of memory so far."""
        while True:
            self.line.send({"event": "heartbeat", "peak_bytes": self.measure()})
            time.sleep(BEAT_S)

    def measure(self) -> int:
        """Peak bytes of the GPU, or of the process, so far."""
        torch = sys.modules.get("torch")
        cuda = getattr(torch, "cuda", None)  # while it is imported, it has none
        if self.maker is not None and cuda is not None and cuda.is_initialized():
            self.peak = max(self.peak, cuda.memory_reserved(self.maker.world.device))
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self.peak


if __name__ == "__main__":
    main()
