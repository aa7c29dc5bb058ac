"""The job that a process belongs to: how its processes start, meet, watch each other and end.

`torchrun` starts them and names them in the environment, on one machine or on many; or
`worldline … --num_gpus N` does, on this machine. Needs no torch before they meet.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from worldline.errors import Error, InputError, one_line, option

if TYPE_CHECKING:
    import torch

    from worldline.parallel.mesh import Axis

# a collective may wait so long for a process that loads or decodes; a dead one ends all sooner
COLLECTIVE_MINUTES = 30
BEAT_S = 1.0
SILENCE_S = 40.0  # without a beat, a process is dead
RENDEZVOUS_S = 300.0
GRACE_S = 8.0  # for files to be put in order, before a process ends in mid-call
_LAUNCHED = "WORLDLINE_LAUNCHED"  # in the environment of ranks that `launch` starts
LOST = 76  # exit status of a launched rank whose connections broke: it does not know why


@dataclass(frozen=True)
class Place:
    """This process among those of its job.

    Attributes:
        rank: from 0.
        count: processes of the job.
        local_rank: on this machine.
        local_count: processes on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def speaks(self) -> bool:
        """Whether this process prints for all."""
        return self.rank == 0


def place() -> Place:
    """This process by its environment, as torchrun sets it.

    Raises:
        InputError: it is set by halves.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return Place()
    try:
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        found = Place(rank, int(count), local, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is {count}, but {error} is no part of what torchrun sets; start with "
            "torchrun, or give --num_gpus without WORLD_SIZE"
        ) from None
    if not 0 <= rank < found.count:
        raise InputError(f"RANK is {rank} of WORLD_SIZE {count}; start with torchrun")
    return found


class Watch(threading.Thread):
    """Heartbeat of this process, and an eye on the next one's, through the rendezvous store.

    Where one has failed or fallen silent, this process ends: its main thread is interrupted, and
    ended in mid-call if that takes long. The process that speaks prints why.

    Attributes:
        failure: exit status and message of another process.
    """

    def __init__(self, store: Any, here: Place) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.here, self.parent = store, here, os.getppid()
        self.failure: tuple[int, str] | None = None
        self.stopped, self.lock = threading.Event(), threading.Lock()

    def run(self) -> None:
        following = f"alive/{(self.here.rank + 1) % self.here.count}"
        beats, heard, since = 0, b"", time.monotonic()
        while not self.stopped.wait(BEAT_S):
            beats += 1
            try:
                self.store.set(f"alive/{self.here.rank}", str(beats))
                beat = self.store.get(following) if self.store.check([following]) else b""
                if beat != heard:
                    heard, since = beat, time.monotonic()
                if time.monotonic() - since > SILENCE_S:
                    rank = following.removeprefix("alive/")
                    self.post(1, f"rank {rank} has not answered for {SILENCE_S:.0f} s")
                if os.getppid() != self.parent:
                    self.post(1, "the process that started the ranks has ended")
                failed = self.look()
            except Exception:  # of the store's connection
                failed = 1, "rank 0 has ended"
            if failed and not self.stopped.is_set():
                self.announce(*failed)
                os.kill(os.getpid(), signal.SIGTERM)
                if not self.stopped.wait(GRACE_S):
                    os._exit(failed[0])

    def look(self) -> tuple[int, str] | None:
        """Exit status and message of the process that failed first; None while all run."""
        if not self.store.check(["failed"]):
            return None
        status, message = json.loads(self.store.get("failed"))
        return status, message

    def post(self, status: int, message: str) -> None:
        """Make a failure known to all, unless another is."""
        self.store.compare_set("failed", "", json.dumps([status, message]))

    def announce(self, status: int, message: str) -> None:
        """Print another process's failure, once, in the process that speaks."""
        with self.lock:
            if self.failure is None and self.here.speaks:
                print(f"worldline: {message}", file=sys.stderr, flush=True)
                with suppress(Exception):
                    self.store.set("printed", "1")
            self.failure = status, message


_here = Place()
_store: Any = None
_watch: Watch | None = None
_world: Axis | None = None
_alone = False


def alone() -> bool:
    """Let the process that speaks do all the work; whether this is the one."""
    global _alone
    _alone = True
    return _here.speaks


def meet() -> Place:
    """This process, once all of its job have met at the rendezvous, and watch each other.

    Raises:
        InputError: they run different commands, or the environment is set by halves.
        Error: they do not meet.
    """
    global _here, _store, _watch
    here = place()
    if here.count == 1 or _watch is not None:
        return here
    # else torch's threads print stack traces where another process has ended
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch import distributed

    dist: Any = distributed  # which does not declare its stores
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    master = here.speaks and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    job = f"worldline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def connect(master: bool) -> Any:
        wait = timedelta(seconds=RENDEZVOUS_S)
        return dist.PrefixStore(job, dist.TCPStore(host, port, None, master, wait, False))

    try:
        _here, _store = here, connect(master)
        _watch = Watch(connect(False), here)  # a thread of its own needs a connection of its own
        words = json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        command = hashlib.sha256(words.encode()).hexdigest()
        if here.speaks:
            _store.set("command", command)
        elif _store.get("command").decode() != command:
            raise InputError(
                f"rank {here.rank} and rank 0 run different commands; start all with the same"
            )
    except (dist.DistError, RuntimeError) as error:
        reason = f"the {here.count} processes do not meet at {host}:{port}: {one_line(error)}"
        raise Error(reason) from error
    finally:
        if _watch is not None:
            _watch.start()
    return here


def own_device(name: str | None, here: Place | None = None) -> str | None:
    """Device of one of several processes, each of which has a GPU, or none has.

    Args:
        name: as it was chosen for all; None is the GPU, if there is one.
        here: the process; by default this one.

    Raises:
        InputError: there are more processes than GPUs, or the device is a single one.
    """
    here = here or (Place() if _alone else place())
    if here.count == 1:
        return name
    if name not in (None, "cuda", "cpu"):
        raise InputError(
            f"{option('device', name)}: {here.count} processes cannot share it; give cuda, for a "
            "GPU each, or cpu"
        )
    if name == "cpu":
        return name
    import torch

    gpus = torch.cuda.device_count()
    if not (name or gpus):
        return "cpu"
    if gpus < here.local_count:
        raise InputError(
            f"{here.local_count} processes on this machine need a GPU each, and it has {gpus}; "
            "start fewer, or give --device cpu"
        )
    return f"cuda:{here.local_rank}"


def neighbours() -> int:
    """Processes of the job that compute on this machine, this one included."""
    return 1 if _world is None else _here.local_count


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

    from worldline.parallel.mesh import Axis

    if meet().count == 1 or _alone:
        return Axis(device=device)
    if _world is not None:
        return _world
    here = _here
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backends = {"gloo": "cpu:gloo"} | ({"nccl": "cuda:nccl"} if device.type == "cuda" else {})
    for name in backends:
        if not getattr(dist, f"is_{name}_available")():
            raise InputError(f"this torch has no {name}, through which processes talk; install it")
    dist.init_process_group(
        ",".join(backends.values()),
        timeout=timedelta(minutes=COLLECTIVE_MINUTES),
        world_size=here.count,
        rank=here.rank,
        store=_store,
    )
    _world = Axis(here.rank, here.count, None, device)
    return _world


def settle(error: BaseException, status: int, message: str) -> tuple[int, str]:
    """Exit status of a process that an error ends, and what it prints: "" where another does.

    The others end, too. One that failed because another did takes that one's status.
    """
    if _watch is None:
        return status, message
    interrupted = isinstance(error, KeyboardInterrupt)
    if interrupted and launched():
        message = ""  # the launcher was interrupted, too
    expected = isinstance(error, Error) or status == 2
    # what broke a collective, or is raised by all, may be known in a moment
    until = time.monotonic() + (0 if interrupted or (expected and _here.speaks) else 3 * BEAT_S)
    failed: tuple[int, str] | None = None
    with suppress(Exception):
        while not (failed := _watch.failure or _watch.look()) and time.monotonic() < until:
            time.sleep(BEAT_S / 10)
        if failed:
            _watch.announce(*failed)
            status, message = failed[0], ""
        elif not interrupted and not expected and "onnection" in str(error):
            status, message = (LOST, "") if launched() else (status, f"ranks are lost: {message}")
        _watch.post(status, message if _here.speaks else f"rank {_here.rank}: {message}")
        until = time.monotonic() + 3 * BEAT_S
        while not failed and not _here.speaks and time.monotonic() < until:
            if _watch.store.check(["printed"]):
                break
            time.sleep(BEAT_S / 10)
    _watch.stopped.set()
    return status, message if _here.speaks else ""


def leave() -> None:
    """Part from the others, once all have come here."""
    global _alone, _watch, _world
    if _world is not None:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
    if _watch is not None:
        _store.set(f"left/{_here.rank}", "1")
        # all wait for the first, which may work alone, and the first for all: it may hold the store
        for rank in range(_here.count) if _here.speaks else (0,):
            while not _store.check([f"left/{rank}"]):
                time.sleep(BEAT_S / 10)
        _watch.stopped.set()
    _watch, _world, _alone = None, None, False


def launch(words: Sequence[str], count: int) -> int:
    """Run a command in `count` processes on this machine; the exit status of the first to fail.

    A process that is killed ends the others. None outlives this one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        _LAUNCHED: 1,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")
        or max(1, (os.cpu_count() or 1) // count),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            command = [sys.executable, "-m", "worldline", *words]
            ranks.append(subprocess.Popen(command, env=environment))
        while all(one.poll() is None for one in ranks):
            time.sleep(0.05)
        return _outcome(ranks)
    finally:
        _end(ranks)


def _outcome(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Exit status of ranks, of which one has ended.

    Raises:
        Error: one was killed.
    """
    until: float | None = None
    while any(one.poll() is None for one in ranks):
        if until is None and any(one.poll() for one in ranks):
            until = time.monotonic() + 2 * GRACE_S  # the others learn of it by the store
        if until and (time.monotonic() > until or any((one.poll() or 0) < 0 for one in ranks)):
            break
        time.sleep(0.05)
    statuses = [one.poll() for one in ranks]
    for rank, status in enumerate(statuses):
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            raise Error(f"rank {rank} was killed by {name}; --resume makes what is missing")
    if LOST in statuses:
        raise Error("the processes lost each other; --resume makes what is missing")
    return next((status for status in statuses if status), 0)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End ranks that still run."""
    for one in ranks:
        if one.poll() is None:
            one.terminate()
    until = time.monotonic() + 2 * GRACE_S
    for one in ranks:
        try:
            one.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def launched() -> bool:
    """Whether another process of worldline started this one, and prints that it was killed."""
    return _LAUNCHED in os.environ
