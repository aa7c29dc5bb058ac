"""Driver of a fleet: Ray Core actors, each with its GPUs, that make units of a queue.

The driver counts attempts, not Ray, whose repeats would make a line that kills its process kill
them for ever: no call is repeated by Ray, and each actor has one call in flight, so that a death
is charged to nobody else. Ray starts processes again, places them, and carries values.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from worldline.errors import Error, InputError, as_flags, one_line
from worldline.fleet.queue import Outcome, Queue, Unit, Work

logger = logging.getLogger(__name__)

_FAILED_STARTS = 3  # in a row, and a node is set aside
_LOOK_S = 10.0  # between looks at the cluster's nodes


class Worker:
    """The process of an actor: it loads once, and makes one unit after another."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, format="worldline: %(message)s")
        as_flags.set(True)
        self.make: Callable[[Sequence[int]], list[Outcome]] | None = None

    def where(self) -> tuple[str, str]:
        """Id and name of the node."""
        return ray.get_runtime_context().get_node_id(), os.uname().nodename

    def call(self, function: Callable[..., Any], *values: Any) -> Any:
        return function(*values)

    def load(self, work: Work) -> tuple[int, bool]:
        """Size of a unit, and whether the marks of begun calls are on a shared disk."""
        shared = work.marks.is_dir()
        if self.make is None:
            with suppress(OSError):
                os.chdir(work.folder)
            self.make, self.size = work.open(shared)
        return self.size, shared

    def run(self, lines: Sequence[int], mark: Path) -> list[Outcome]:
        """Outcomes of the lines of a unit."""
        assert self.make is not None
        with suppress(FileNotFoundError):
            mark.write_text(str(os.getpid()))
        outcomes = self.make(lines)
        mark.unlink(missing_ok=True)
        return outcomes


@dataclass(eq=False)
class Actor:
    """One actor, as the driver knows it.

    Attributes:
        handle: Ray's.
        node: id of the node where it runs; "" before it does.
        name: of that node.
        size: lines that it makes in step; 0 before it has loaded.
        shared: whether its disk is the driver's.
        doubt: unit, mark and message of a call in which the process ended.
    """

    handle: Any
    node: str = ""
    name: str = ""
    size: int = 0
    shared: bool = True
    doubt: tuple[Unit, Path, str] | None = None


def connect(address: str | None) -> bool:
    """Connect to a cluster, or make one of this machine; whether there was no connection before.

    Raises:
        Error: there is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    debug: Any = logger.isEnabledFor(logging.DEBUG)
    # else each death stands on standard output
    vars(sys.modules.get("ray._private.worker", ray))["_worker_logs_enabled"] = debug
    try:
        ray.init(address, log_to_driver=debug, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise Error(f"--address {address or 'auto'}: {one_line(error)}") from error
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM
            signal.signal(number, handler)
    return True


class Driver:
    """Actors of a cluster, and the calls in flight."""

    def __init__(
        self, address: str | None, gpus: int, min_actors: int, max_actors: int | None
    ) -> None:
        """Connect to a cluster, or make one of this machine.

        Raises:
            Error: there is no cluster at the address.
        """
        self.gpus, self.min_actors, self.max_actors = gpus, min_actors, max_actors
        self.actors: list[Actor] = []
        self.failed_starts: Counter[str] = Counter()  # node -> in a row
        self.failure: Error = Error("no actor has started")  # the last one to load
        # reference -> actor, and what was called: "where", "load", or a unit with its mark
        self.calls: dict[Any, tuple[Actor, Any]] = {}
        self.alive: set[str] = set()  # nodes
        self.looked, self.serial, self.work_reference = 0.0, count(), None
        self.connected = connect(address)

    def first(self, function: Callable[..., Any], *values: Any) -> Any:
        """Result of a function in the first actor, where the GPUs are."""
        actor = self.start()
        reference = actor.handle.call.remote(function, *values)
        while not ray.wait([reference], timeout=_LOOK_S)[0]:
            logger.info(self.state(), extra={"repeats": True})
        try:
            return ray.get(reference)
        except RayError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, Error) else Error(one_line(error)) from error

    def work(self, work: Work, queue: Queue) -> Iterator[tuple[Actor, Unit, Any] | None]:
        """Make all lines; each unit with its outcomes, or an `Error`; None once a second.

        It may be left and called again, for calls that are in flight.

        Raises:
            Error: no node can load the model.
        """
        if self.work_reference is None:
            self.work_reference = ray.put(work)
            for actor in self.actors:
                self.ask(actor)
        while queue.open and not (queue.stopped and not self.works()):
            self.fit(queue)
            busy = {id(actor) for actor, _ in self.calls.values()}
            for actor in self.actors:
                if actor.doubt and actor.node not in self.alive:  # it may wait for room for ever
                    yield from self.settle_doubt(actor, queue)
                if id(actor) not in busy and (unit := queue.take(actor.size)):
                    mark = work.marks / f"{next(self.serial)}"
                    reference = actor.handle.run.remote(unit.lines, mark)
                    self.calls[reference] = actor, (unit, mark)
            for reference in ray.wait([*self.calls], num_returns=1, timeout=1)[0]:
                yield from self.receive(reference, queue)
            yield None

    def works(self) -> bool:
        """Whether a unit is in flight."""
        return any(isinstance(called, tuple) for _, called in self.calls.values())

    def receive(self, reference: Any, queue: Queue) -> Iterator[tuple[Actor, Unit, Any]]:
        """What a call has brought, for the unit that it settles."""
        actor, called = self.calls.pop(reference)
        try:
            value = ray.get(reference)
        except RayError as error:
            if called == "load":
                self.fail_start(actor, getattr(error, "cause", error))
            elif called == "where":  # it will never be there again
                self.actors.remove(actor)
                yield from self.settle_doubt(actor, queue)
                self.looked = 0.0
            elif isinstance(error, RayTaskError):
                raise Error(one_line(error.cause)) from error
            else:
                actor.doubt = *called, f"its process ended ({type(error).__name__})"
                self.ask(actor)
            return
        if called == "where":
            actor.node, actor.name = value
            yield from self.settle_doubt(actor, queue)
            self.calls[actor.handle.load.remote(self.work_reference)] = actor, "load"
        elif called == "load":
            self.failed_starts[actor.node] = 0
            actor.size, actor.shared = value
        else:
            yield actor, called[0], value

    def settle_doubt(self, actor: Actor, queue: Queue) -> Iterator[tuple[Actor, Unit, Error]]:
        """The unit in which the process of an actor ended, once it is sure that it has.

        A unit that had not begun goes back.
        """
        if actor.doubt is not None:
            unit, mark, message = actor.doubt
            actor.doubt = None
            begun = mark.exists() or not actor.shared
            mark.unlink(missing_ok=True)
            if begun:
                yield actor, unit, Error(message)
            else:
                queue.give_back(unit)

    def restart(self, actor: Actor) -> None:
        """Let an actor begin afresh: a failed call may have left its device unusable."""
        ray.kill(actor.handle, no_restart=False)
        self.ask(actor)

    def ask(self, actor: Actor) -> None:
        """Ask where an actor runs: answered once the call before has ended, and it is there."""
        actor.size = 0
        where = actor.handle.where.options(max_task_retries=-1)  # until the process is there
        self.calls[where.remote()] = actor, "where"

    def fail_start(self, actor: Actor, error: BaseException) -> None:
        """Put another in the place of an actor that could not load; perhaps on another node."""
        self.failed_starts[actor.node] += 1
        kind = InputError if isinstance(error, InputError) else Error
        self.failure = kind(f"node {actor.name} cannot load the model: {one_line(error)}")
        logger.warning("%s", self.failure)
        ray.kill(actor.handle)
        self.actors.remove(actor)
        self.looked = 0.0

    def fit(self, queue: Queue) -> None:
        """Start actors where the cluster has room, as many as there are lines at most."""
        if time.monotonic() - self.looked < _LOOK_S:
            return
        self.looked = time.monotonic()
        room = self.room()
        if not room and any(failed >= _FAILED_STARTS for failed in self.failed_starts.values()):
            raise self.failure
        most = min(max(room, self.min_actors), self.max_actors or room + self.min_actors)
        while len(self.actors) < min(most, queue.open):
            self.ask(self.start())

    def start(self) -> Actor:
        """A new actor, on any node that is not set aside."""
        aside = ",".join(n for n, failed in self.failed_starts.items() if failed >= _FAILED_STARTS)
        options = {"label_selector": {"ray.io/node-id": f"!in({aside})"}} if aside else {}
        remote: Any = ray.remote(
            num_gpus=self.gpus, num_cpus=1, max_restarts=-1, max_task_retries=0
        )(Worker)
        self.actors.append(Actor(remote.options(**options).remote()))
        return self.actors[-1]

    def room(self) -> int:
        """Actors that the nodes have room for, but for nodes that are set aside."""
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self.alive = {*nodes}
        return sum(
            int(min(has.get("CPU", 0), has.get("GPU", 0) // self.gpus if self.gpus else math.inf))
            for node, has in nodes.items()
            if self.failed_starts[node] < _FAILED_STARTS
        )

    def state(self) -> str:
        """How many actors work, and what the others wait for."""
        ready = sum(bool(actor.size) for actor in self.actors)
        line = f"{ready} of {len(self.actors)} actors"
        if ready == 0 and self.room() < len(self.actors):
            has = ray.cluster_resources()
            gpus, cpus = (f"{has.get(name, 0):.0f}" for name in ("GPU", "CPU"))
            line += f": each needs {self.gpus} GPU and 1 CPU, the cluster has {gpus} and {cpus}"
            line += "; --gpus_per_actor 0 runs on CPUs" if gpus == "0" else ""
        return line

    def close(self) -> None:
        """End all actors; no file is written after."""
        for actor in self.actors:
            ray.kill(actor.handle)
        if self.calls:
            ray.wait([*self.calls], num_returns=len(self.calls), timeout=_LOOK_S)
        self.actors, self.calls = [], {}
        if self.connected:
            ray.shutdown()
