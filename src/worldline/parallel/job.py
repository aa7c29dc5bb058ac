"""The job that a process belongs to: how its processes start, meet, watch each other and end.

`torchrun` starts them and names them in the environment, on one machine or on many; or
`worldline … --num_gpus N` does, on this machine. Needs no torch before they meet.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NoReturn

from worldline.errors import Error, InputError, is_out_of_memory, one_line, option
from worldline.events import report_event

if TYPE_CHECKING:
    import torch

    from worldline.parallel.mesh import Axis, Mesh

logger = logging.getLogger(__name__)

BEAT_S = 1.0
SILENCE = 45  # beats without which a process is dead: a C call that holds the GIL may miss 40
RENDEZVOUS_S = 300.0
PATIENCE_S = 10.0
GRACE_S = 4.0  # to remove temporary files, before a process ends in mid-call
EVIDENCE = 4  # beats in which the failure of another process becomes known
LOST = 76  # exit status of a launched process that lost the others: the launcher knows why
_LAUNCHED = "WORLDLINE_LAUNCHED"  # in the environment: process id of `launch`
LISTENER = "WORLDLINE_LISTENER"  # there, too, of rank 0: the socket of the store, if it is open
_ELASTIC = "TORCHELASTIC_"  # begins the names in the environment that only torchrun sets
_LEFT = b"left"
_INTERRUPTED = (129, 130, 143)
remedy = "--resume makes what is missing"  # another command may have another


@dataclass(frozen=True)
class Place:
    """This process among those of its job.

    Attributes:
        rank: from 0.
        count: processes of the job.
        near: ranks on this machine, in their order, once they have met.
    """

    rank: int = 0
    count: int = 1
    near: tuple[int, ...] = (0,)

    @property
    def speaks(self) -> bool:
        """Whether this process prints for all."""
        return self.rank == 0

    @property
    def deputises(self) -> bool:
        """Whether this process prints for its machine where the store is lost, and rank 0 with it.

        `launch` prints for those that it started; of rank 0's torchrun, rank 0 outlives the store.
        """
        if 0 not in self.near:
            return self.rank == self.near[0]
        return self.near[1:2] == (self.rank,) and not (launched() or _of_agent())


def place() -> Place:
    """This process by its environment, as torchrun sets it.

    Raises:
        InputError: it is set by halves.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return Place()
    try:
        total, rank = int(count), int(os.environ["RANK"])
        found = Place(rank, total, (rank,))
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        word = error.args[0].rpartition(": ")[2]  # as Python quotes it
        reason = f"{word} is {'not set' if isinstance(error, KeyError) else 'no number'}"
        raise InputError(
            f"WORLD_SIZE is {count}, but {reason}; start with torchrun, or unset WORLD_SIZE"
        ) from None
    if not 0 <= rank < found.count:
        raise InputError(f"RANK is {rank} of WORLD_SIZE {count}; start with torchrun")
    return found


def started() -> bool:
    """Whether torchrun, or another process of worldline, started this one."""
    return place().count > 1 or _parent() > 0


def launched() -> bool:
    """Whether another process of worldline started this one, and reports how it ended."""
    return _LAUNCHED in os.environ


def _parent() -> int:
    """Process id of torchrun, or of `launch`, without which this one ends; 0 without either."""
    below_torchrun = f"{_ELASTIC}RUN_ID" in os.environ
    return int(os.environ.get(_LAUNCHED) or (os.getppid() if below_torchrun else 0))


def label() -> str:
    """Name of this process before its lines, where it is one of several."""
    return f"rank {_here.rank}: " if _here.count > 1 else ""


def _of_agent() -> bool:
    """Whether torchrun holds the store; else rank 0 does."""
    return os.environ.get(f"{_ELASTIC}USE_AGENT_STORE") == "True"


class Watch:
    """Heartbeats of this process and of others, through the rendezvous store.

    Rank 0 watches all, and all watch rank 0. Where one has failed or fallen silent, this process
    ends: its main thread is interrupted, and ended in mid-call if that takes long. One thread talks
    to the store, which may hang; the other judges.

    Attributes:
        interrupt: ends the main thread, which calls `settle`; None in a program of its own.
        failure: exit status and message of the process that failed first.
        silence: beats that others have missed, by key.
    """

    def __init__(self, here: Place, interrupt: Callable[[], None] | None) -> None:
        self.here, self.interrupt, self.parent = here, interrupt, _parent()
        self.failure: tuple[int, str] | None = None
        self.silence: dict[str, int] = {}
        self.parting, self.stopped = Event(), Event()
        self.store: Any = None
        self.talker = Thread(target=self._talk, name="heartbeat", daemon=True)
        Thread(target=self._judge, name="watch", daemon=True).start()

    def begin(self, here: Place) -> None:
        """Watch the others, all of which have met."""
        self.here = here
        others = range(1, here.count) if here.speaks else (0,)
        self.silence = {f"alive/{rank}": 0 for rank in others}
        self.talker.start()

    def look(self) -> tuple[int, str] | None:
        """The failure, as soon as it is known."""
        if self.failure is None and self.store.check(["failed"]):
            status, message = json.loads(self.store.get("failed"))
            self.failure = status, message
        return self.failure

    def post(self, status: int, message: str) -> None:
        """Make a failure known to all, unless another is."""
        self.store.compare_set("failed", "", json.dumps([status, message]))

    def report(self) -> tuple[int, str]:
        """Exit status of this process after the failure, and what it prints."""
        assert self.failure is not None
        status, message = self.failure
        speaks = self.here.speaks or (status == LOST and self.here.deputises)
        return status if status != LOST or launched() else 1, message if speaks else ""

    def part(self) -> None:
        """Beat no more, in peace."""
        self.parting.set()
        self.talker.join(2 * BEAT_S)
        self.store.set(f"alive/{self.here.rank}", _LEFT)

    def alone(self) -> bool:
        """Whether all that this process watches have parted."""
        return {*self.store.multi_get([*self.silence])} == {_LEFT}

    def orphaned(self) -> bool:
        """Whether torchrun, or `launch`, which started this process has ended."""
        return self.parent not in (0, os.getppid())

    def _talk(self) -> None:
        beats, heard = 0, dict.fromkeys(self.silence, b"")
        try:
            while not (self.parting.wait(BEAT_S) or self.look()):
                beats += 1
                self.store.set(f"alive/{self.here.rank}", str(beats))
                for key, beat in zip([*heard], self.store.multi_get([*heard]), strict=True):
                    if beat == _LEFT or beat != heard[key]:
                        heard[key], self.silence[key] = beat, 0
            if self.failure and (self.here.speaks or self.orphaned()):
                self.post(1, self.failure[1])  # perhaps it is the judge's
        except Exception:  # of the connection
            holder = "the torchrun of rank 0" if _of_agent() else "rank 0"
            self.failure = LOST, f"{holder} has ended; {remedy}"

    def _judge(self) -> None:
        while not self.stopped.wait(BEAT_S):
            for key in self.silence:
                self.silence[key] += 1
                if self.silence[key] > SILENCE and not self.failure:
                    rank = key.removeprefix("alive/")
                    self.failure = LOST, f"rank {rank} has not answered for {SILENCE} s; {remedy}"
            if self.orphaned() and not self.failure:
                starter = f"the process that started rank {self.here.rank}"
                self.failure = LOST, f"{starter} has ended; {remedy}"
            if self.failure:
                status, message = self.report()
                if self.interrupt:
                    self.interrupt()
                    if self.stopped.wait(GRACE_S):
                        return
                if not message and not self.interrupt:  # torchrun would end the one that prints
                    time.sleep(EVIDENCE * BEAT_S)
                if message:
                    print(f"worldline: {message}", file=sys.__stderr__, flush=True)
                    report_event("error", message)
                os._exit(status)


_here = Place()
_store: Any = None
_watch: Watch | None = None
_world: Axis | None = None
_alone = False
_events = 0  # about which the processes of a video have asked each other
_meetings = itertools.count()  # of this process, as of each


def alone() -> bool:
    """Let the process that speaks do all the work; whether this is the one."""
    global _alone
    _alone = True
    return _here.speaks


def meet(command: Sequence[str] = (), interrupt: Callable[[], None] | None = None) -> Place:
    """This process, once all of its job have met at the rendezvous, and watch each other.

    Args:
        command: words that must be the same in all.
        interrupt: ends the main thread, which calls `settle`.

    Raises:
        InputError: they run different commands, or the environment is set by halves.
        Error: they do not meet.
    """
    global _here, _store, _watch
    if _store is not None:
        return _here
    here = place()
    if here.count == 1:
        return here
    _here, _watch = here, Watch(here, interrupt)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no traces of lost connections
    from torch import distributed

    dist: Any = distributed  # which does not declare its stores
    _require("gloo")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    names = (f"{_ELASTIC}RUN_ID", f"{_ELASTIC}RESTART_COUNT", _LAUNCHED, "WORLD_SIZE")  # of all
    job = "/".join(["worldline", *(os.environ.get(n, "") for n in names), str(next(_meetings))])

    def connect(master: bool) -> Any:
        listener = os.environ.pop(LISTENER, None) if master else None
        more = {} if listener is None else {"master_listen_fd": int(listener)}
        wait = timedelta(seconds=RENDEZVOUS_S)
        return dist.PrefixStore(job, dist.TCPStore(host, port, None, master, wait, False, **more))

    same = hashlib.sha256(json.dumps([version("worldline"), *command]).encode()).hexdigest()
    try:
        master = here.speaks and not _of_agent()
        if not master:
            _await(lambda: _answers(host, port))
        store = connect(master)
        store.set(f"alive/{here.rank}", "0")
        _watch.store = connect(False)  # a thread of its own needs a connection of its own
        commands, machines = zip(*_every(store, "start", [same, _machine()]), strict=True)
    except (dist.DistError, RuntimeError) as error:
        reason = f"the {here.count} processes do not meet at {host}:{port}: {one_line(error)}"
        raise Error(reason) from error
    near = (rank for rank, machine in enumerate(machines) if machine == machines[here.rank])
    _store, _here = store, replace(here, near=tuple(near))
    _watch.begin(_here)
    if interrupt is None:  # in a program of its own
        atexit.register(_at_exit)
    if commands[0] != same:
        raise InputError(
            "this process runs another command, or version, than rank 0; start all with the same"
        )
    return _here


def _every(store: Any, name: str, value: Any) -> list[Any]:
    """A value of each process, which JSON can hold, in their order; no collective is needed."""
    keys = [f"{name}/{rank}" for rank in range(_here.count)]
    store.set(keys[_here.rank], json.dumps(value))
    _await(lambda: store.check(keys))
    return [json.loads(each) for each in store.multi_get(keys)]


def _machine() -> str:
    """Name of this machine, which others have, too, and of its start."""
    with suppress(OSError):  # macOS has no such file
        return socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
    return socket.gethostname()


def _await(ready: Callable[[], bool]) -> None:
    """Wait in Python, which signals interrupt, and log that if it takes long.

    Raises:
        RuntimeError: it takes too long to meet.
    """
    since, logged = time.monotonic(), False
    while not ready():
        waited = time.monotonic() - since
        if waited > RENDEZVOUS_S and _store is None:
            raise RuntimeError(f"waited for {RENDEZVOUS_S:.0f} s")
        if waited > PATIENCE_S and not logged:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            logger.info("waiting for all %d processes at %s", _here.count, where)
            logged = True
        time.sleep(BEAT_S / 20)


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), BEAT_S):
        return True
    return False


def _require(backend: str) -> None:
    import torch.distributed as dist

    if not getattr(dist, f"is_{backend}_available", bool)():
        raise InputError(f"this torch has no {backend}, through which processes talk; install it")


def own_device(name: str | None, count: int = 0) -> str | None:
    """Device of one of several processes, each of which has a GPU, or none has.

    Args:
        name: as it was chosen for all; None is the GPU, if there is one.
        count: processes that are to start on this machine; 0 asks for those of the job.

    Raises:
        InputError: there are more processes than GPUs, or too many to start for the CPU, or the
            device is a single one.
    """
    total = count or (1 if _alone else meet().count)
    if total == 1:
        return name
    if name not in (None, "cuda", "cpu"):
        raise InputError(
            f"{option('device', name)}: {total} processes cannot share it; give cuda, for a "
            "GPU each, or cpu"
        )
    gpus: list[Any] = []
    if name != "cpu":
        import torch

        gpus += range(torch.cuda.device_count())
        if not count:
            gpus = [str(torch.cuda.get_device_properties(index).uuid) for index in gpus]
    visible = [gpus] * count or _every(_store, "gpus", gpus)
    if name == "cpu" or not (name or any(visible)):
        if count > (most := max(8, os.cpu_count() or 1)):
            raise InputError(f"{count} processes are too many for this CPU; give at most {most}")
        return "cpu"
    return f"cuda:{gpus.index(deal_gpus(visible)[_here.rank])}"


def deal_gpus(visible: Sequence[Sequence[Any]]) -> list[Any]:
    """GPU of each process: the first that it sees and no process before it has.

    Args:
        visible: GPUs that each process sees, by names that no two in the world share.

    Raises:
        InputError: there is none for some.
    """
    dealt: list[Any] = []
    for gpus in visible:
        free = [gpu for gpu in gpus if gpu not in dealt]
        if not free:
            sharing = sum(gpus == other or not {*gpus}.isdisjoint(other) for other in visible)
            raise InputError(
                f"{sharing} of {len(visible)} processes need a GPU each, and see {len(gpus)}; "
                "start fewer, or give --device cpu"
            )
        dealt.append(free[0])
    return dealt


def neighbours() -> int:
    """Processes of the job that compute on this machine, this one included."""
    return 1 if _world is None else len(_here.near)


def store() -> Any:
    """Rendezvous store of the processes that have met."""
    return _store


def join(device: torch.device) -> Axis:
    """All processes of the job, each on its own device; of one alone, itself.

    Args:
        device: of this process.

    Raises:
        InputError: there is no way for them to talk.
        Error: they do not meet.
    """
    global _world
    import torch
    import torch.distributed as dist

    from worldline.parallel.mesh import COLLECTIVE_TIMEOUT, Axis

    if _world is not None:
        return _world
    if place().count == 1 or _alone:
        return Axis(device=device)
    meet()
    name, backend = "CPU", "cpu:gloo"
    if device.type == "cuda":
        _require("nccl")
        torch.cuda.set_device(device)
        name, backend = torch.cuda.get_device_name(device), "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        timeout=COLLECTIVE_TIMEOUT,
        world_size=_here.count,
        rank=_here.rank,
        store=_store,
    )
    _world = Axis(_here.rank, _here.count, None, device)
    compare_devices(_world.every(name))
    return _world


def compare_devices(names: Sequence[str]) -> None:
    """Log GPUs that differ."""
    if len({*names}) > 1:
        found = ", ".join(f"{number} x {name}" for name, number in Counter(names).items())
        logger.info("the GPUs differ, and the slowest sets the pace: %s", found)


class Lone(BaseException):
    """Failure of one process alone, its only argument: the others wait for it in a collective.

    It is no `Exception`, after which a batch would go on.
    """


def share(mesh: Mesh, error: Exception) -> None:
    """Return if all processes of a video failed alike, and can go on together.

    Raises:
        Lone: this one failed alone, or elsewhere; so the job ends.
    """
    if mesh.video.count == 1:
        return
    # of memory: perhaps amid collectives, of which others have begun more
    known = isinstance(error, Error) and not is_out_of_memory(error.__cause__ or error)
    if not (known and _agree(mesh, one_line(error))):
        raise Lone(error) from error


def stop(mesh: Mesh, step: str, reason: BaseException | None) -> None:
    """Return if all processes of a video read its steps to the same one, else end the job."""
    if mesh.video.count == 1 or _watch is None or _agree(mesh, step):
        return
    why = f" ({one_line(reason)})" if reason else ""
    where = f"{label()}it stopped reading a video at {step}{why}"
    _watch.post(1, f"{where}; read the same steps in each process")
    while True:  # the watch ends this process
        time.sleep(BEAT_S)


def _agree(mesh: Mesh, words: str) -> bool:
    """Whether all processes of a video come here with the same words."""
    global _events
    _events += 1
    key = hashlib.sha256(words.encode()).hexdigest()
    key, until = f"events/{mesh.dp.rank}/{_events}/{key}", time.monotonic() + 2 * GRACE_S
    _store.add(key, 1)
    while _store.add(key, 0) < mesh.video.count:
        if time.monotonic() > until:
            return False
        time.sleep(BEAT_S / 10)
    return True


def settle(error: BaseException, status: int, message: str) -> tuple[int, str]:
    """Exit status of a process that an error ends, and what it prints: "" where another does.

    The others end, too. One that failed because another did takes that one's status.
    """
    watch, speaks = _watch, _here.speaks
    interrupted, known = status in _INTERRUPTED, isinstance(error, Error)
    if watch is None or not watch.silence:  # they have not met; a signal came to each
        return status, message if (speaks and not launched()) or not interrupted else ""
    # perhaps since another process was killed; `launch` and torchrun end the others by a signal
    lost = interrupted or "gloo/" in str(error) or type(error).__name__.startswith("Dist")
    if lost and launched():
        status, message = status if interrupted else LOST, ""
    hurries = speaks and (launched() if lost else known or status == 2)  # all raise what is known
    until = time.monotonic() + (0 if hurries else EVIDENCE if speaks else EVIDENCE + 2) * BEAT_S
    with suppress(Exception):  # of the connection
        if not speaks:
            watch.part()
        while not watch.look() and time.monotonic() < until:
            if interrupted and speaks and watch.alone():
                break
            time.sleep(BEAT_S / 10)
        if not watch.failure:
            dead = [key for key, missed in watch.silence.items() if missed >= EVIDENCE - 1]
            if speaks and lost and dead and message:
                status, message = 1, f"{dead[0].replace('alive/', 'rank ')} has ended; {remedy}"
            watch.post(status, f"{'' if speaks else label()}{message}" if message else "")
            watch.look()
        until = time.monotonic() + EVIDENCE * BEAT_S
        while speaks and not (_of_agent() or watch.alone()) and time.monotonic() < until:
            time.sleep(BEAT_S / 10)  # the store ends with this process
    status, message = watch.report() if watch.failure else (status, message if speaks else "")
    watch.stopped.set()
    return status, message


def end(status: int) -> NoReturn:
    """Exit; one of several that failed at once, since its collectives may never finish."""
    if status and _watch is not None:
        os._exit(status)
    sys.exit(status)


def leave(*, together: bool = True) -> None:
    """Part from the others, once all have come here; rank 0, if it holds the store, as the last."""
    global _alone, _store, _watch, _world
    if _world is not None:
        import torch.distributed as dist

        from worldline.parallel.mesh import kept

        if together:
            _world.every(None)
        dist.destroy_process_group()
        kept.clear()
    if _watch is not None:
        while _here.speaks and not (_of_agent() or _watch.alone()):
            time.sleep(BEAT_S / 10)
        _watch.stopped.set()
        _watch.part()
    _store, _watch, _world, _alone = None, None, None, False


def _at_exit() -> None:
    """End of a program of its own, which may have failed."""
    error = getattr(sys, "last_value", None)
    if _watch is not None and error is not None:  # its trace is printed
        message = settle(error, 1, one_line(error))[1]
        if message not in ("", one_line(error)):  # why others failed before
            print(f"worldline: {message}", file=sys.stderr, flush=True)
        end(1)
    leave(together=False)  # others may have more to do


def variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What names a process among those of its job in the environment, as torchrun on one machine.

    Args:
        rank: from 0.
        count: processes of the job.
        port: where they meet.
    """
    place = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in place.items()}}


def environments(count: int, port: int) -> list[dict[str, str]]:
    """Environment of each of `count` processes that are to start on this machine.

    Several share its cores; none is of the job that this process is of.
    """
    names = variables(0, 1, 0)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((_ELASTIC, _LAUNCHED)) and name not in names
    }
    if count == 1:
        return [inherited]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    inherited["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or threads
    return [inherited | variables(rank, count, port) for rank in range(count)]


def launch(words: Sequence[str], count: int, patience_s: float = GRACE_S + 2 * BEAT_S) -> int:
    """Run a command in `count` processes on this machine; the exit status of the first to fail.

    A process that is killed ends the others. None outlives this one. After a signal, which is
    passed on, they have `patience_s` to end.

    Raises:
        Error: a process was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # as this process found the package: from the working directory, or not
    safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments(count, port):
            environment[_LAUNCHED] = str(os.getpid())
            command = [sys.executable, *safe, "-m", "worldline", *words]
            # of a session of its own: Ctrl-C comes here alone, and is passed on once
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        while all(one.poll() is None for one in ranks):
            time.sleep(0.05)
        return _outcome(ranks)
    except KeyboardInterrupt:
        _end(ranks, patience_s)
        raise
    finally:
        _end(ranks)


def _outcome(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Exit status of ranks, of which one has ended.

    Raises:
        Error: one was killed.
    """
    since = time.monotonic()
    while any(one.poll() is None for one in ranks):
        statuses = [one.poll() or 0 for one in ranks]
        if not any(statuses):
            since = time.monotonic()
        # others learn of a failure by the store, if it is there, and may have their grace
        wait = 2 * BEAT_S if LOST in statuses else 2 * GRACE_S + 2 * BEAT_S
        if min(statuses) < 0 or time.monotonic() - since > wait:
            break
        time.sleep(0.05)
    statuses = [one.poll() or 0 for one in ranks]
    for rank, status in enumerate(statuses):
        number = -status if status < 0 else status - 128 if status in _INTERRUPTED else 0
        if number:
            raise Error(f"rank {rank} was ended by {signal.Signals(number).name}; {remedy}")
    status = next((status for status in statuses if status not in (0, LOST)), 0)
    if not status and LOST in statuses:
        raise Error(f"the processes lost each other; {remedy}")
    return status


def _end(
    ranks: Sequence[subprocess.Popen[bytes]], patience_s: float = GRACE_S + 2 * BEAT_S
) -> None:
    """End ranks that still run, and all that they started."""
    until = time.monotonic() + patience_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        for one in (one for one in ranks if one.poll() is None):
            with suppress(ProcessLookupError):
                os.killpg(one.pid, number)
        for one in ranks:
            with suppress(subprocess.TimeoutExpired):
                one.wait(max(0.1, until - time.monotonic()))
