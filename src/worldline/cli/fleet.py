"""`worldline fleet`: a batch on a Ray cluster; what a line is, and the record of a run."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import Field

from worldline.cli.messages import results
from worldline.cli.options import parameters, parsed
from worldline.cli.run import (
    ANSWER,
    ASKED,
    Load,
    Run,
    attempt,
    companions,
    existing,
    is_finished,
    log_replaced,
    refuse_taken,
    report_tasks,
    take_shard,
)
from worldline.documents import read_json
from worldline.errors import Error, GuardrailRefusal, InputError, NonFiniteError, one_line
from worldline.family import FAMILIES
from worldline.files import remove, remove_stale, temporary_name
from worldline.fleet import needing_ray
from worldline.fleet.queue import Outcome, Queue, Work
from worldline.request import Options

if TYPE_CHECKING:
    from worldline.family import Compute
    from worldline.request import LoadOptions

logger = logging.getLogger(__name__)

_PROGRESS = "fleet.json"
_THREADS = 32  # that read reports, which may lie on a disk far away
_REPORT_S = 10.0
_FINAL = (InputError, GuardrailRefusal, NonFiniteError)  # another attempt would fail, too


class FleetFlags(Options):
    """Flags of `worldline fleet`."""

    words: tuple[str, ...] = Field(
        json_schema_extra={"argument": True, "metavar": "COMMAND [OPTIONS]..."}
    )
    address: str | None = Field(
        None,
        min_length=1,
        description="Ray cluster, HOST:PORT, or auto for the one that this machine is of.  "
        "[default: RAY_ADDRESS, else that of this machine, or one of it alone]",
    )
    gpus_per_actor: int = Field(
        1, ge=0, le=64, description="GPUs that make a video together; 0 runs on CPUs."
    )
    min_actors: int = Field(
        1, ge=1, description="Actors that are asked for even where no node has room yet."
    )
    max_actors: int | None = Field(
        None, ge=1, description="Most actors.  [default: as many as nodes have room for]"
    )
    attempts: int = Field(
        3, ge=1, le=100, description="Attempts at an input, before it is given up."
    )
    drain_s: float = Field(
        60.0, ge=0, description="Seconds for videos in the making, after Ctrl-C or SIGTERM."
    )
    verify: bool = Field(
        False, description="With --resume, read all videos again, also those in done.jsonl."
    )


@click.command(params=parameters(FleetFlags), context_settings={"ignore_unknown_options": True})
@click.pass_context
def fleet(context: click.Context, /, **_: object) -> None:
    """Make a batch on the GPUs of a Ray cluster.

    COMMAND is that of a batch on one GPU, with its options: `worldline fleet predict2.5 -i FILE -o
    DIR --resume`. Its files are the same. Actors, one a GPU, make the inputs in turn; an input that
    fails, or ends its process, is tried again, then given up and named in failures.jsonl beside the
    videos; fleet.json there is the progress. All nodes find the models at the same place.

    Whoever reaches the ports of a cluster runs code on it: keep them in a private network.
    """
    flags = parsed(context, FleetFlags)
    words, gpus, most = list(flags.words), flags.gpus_per_actor, flags.max_actors
    if words[0] not in {*FAMILIES, "tokenize"}:
        known = ", ".join((*FAMILIES, "tokenize"))
        raise InputError(f"fleet {words[0]}: it makes no batch; give one of {known}")
    if gpus > 1 and words[0] not in FAMILIES:
        raise InputError(f"--gpus_per_actor {gpus}: {words[0]} runs on 1")
    if most is not None and most < flags.min_actors:
        raise InputError(f"--max_actors {most} is below --min_actors {flags.min_actors}")
    running = Fleet(flags, import_driver())
    group = context.find_root().command
    assert isinstance(group, click.Group)
    name, command, rest = group.resolve_command(context, words)
    assert command is not None
    context.meta["fleet"] = running
    try:
        with command.make_context(name, rest, context) as inner:
            command.invoke(inner)
    finally:
        running.close()


def import_driver() -> Any:
    """The class of the driver; it alone imports Ray.

    Raises:
        Error: Ray is not installed.
    """
    with needing_ray("fleet"):
        from worldline.fleet.driver import Driver
    return Driver


@dataclass
class Fleet:
    """Runner of a command's tasks on a cluster, in place of `run_tasks` in this process."""

    flags: FleetFlags
    make_driver: Callable[..., Any]
    driver: Any = None

    def choose_compute(self, options: LoadOptions) -> Compute:
        """Device and precision of an actor; this process may have no GPU."""
        from worldline.opening import choose_compute

        flags = self.flags
        self.driver = self.make_driver(
            flags.address, flags.gpus_per_actor, flags.min_actors, flags.max_actors
        )
        compute: Compute = self.driver.first(choose_compute, options)
        return compute

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()

    def run_tasks(
        self,
        tasks: Sequence[Any],
        load: Load,
        fingerprint: Callable[[Any], str],
        flags: Any,
        things: str = "videos",
        mesh: object = None,
    ) -> None:
        """Run tasks as the function `run_tasks` does, by actors."""
        if getattr(flags, "dry_run", False):
            raise InputError("--dry_run: a fleet has no plan; give it to the command without fleet")
        places = {task.output: place for place, task in enumerate(tasks)}
        tasks = take_shard(tasks, flags, things)
        if not tasks:
            return
        total, folder = len(tasks), tasks[0].output.parent
        if any(folder / _PROGRESS in companions(task.output) for task in tasks):
            raise InputError(
                f"{folder / _PROGRESS}: progress has that name; rename the input of it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder, fingerprint, getattr(flags, "quality", {}), self.flags.verify)
        if getattr(flags, "resume", False):
            with ThreadPoolExecutor(_THREADS) as pool:
                finished = [*pool.map(record.is_finished, tasks)]
            tasks = [task for task, done in zip(tasks, finished, strict=True) if not done]
        refuse_taken(tasks, flags)
        record.begin(total, total - len(tasks))
        if self.flags.gpus_per_actor > 1:
            load = partial(spawn, self.flags.words, self.flags.gpus_per_actor, places)
        if tasks:
            self.make(tasks, load, record, getattr(flags, "keep_going", True))
        report_tasks(len(record.made), total, record.failures, flags, f"{things} are in {folder}")

    def make(self, tasks: Sequence[Any], load: Load, record: Record, keep_going: bool) -> None:
        """Make all tasks, or as many as an interrupt leaves time for."""
        remove_stale(record.folder / "begun")
        marks = temporary_name(record.folder.absolute() / "begun")
        marks.mkdir()
        work = Work(partial(open_tasks, load, tasks), Path.cwd(), marks)
        queue = Queue(len(tasks), self.flags.attempts)

        def follow(until: float) -> None:
            for event in self.driver.work(work, queue):
                if event is not None:
                    self.settle(queue, tasks, record, event, keep_going)
                record.report(self.driver.state())
                if time.monotonic() > until:
                    break

        try:
            follow(math.inf)
        except KeyboardInterrupt:
            queue.stopped = True
            count, seconds = len(queue.running), self.flags.drain_s
            logger.warning("finishing %d (--drain_s %g); no more are begun", count, seconds)
            follow(time.monotonic() + seconds)
            raise
        finally:
            self.driver.close()
            remove(marks)
            record.report("ended", now=True)
        for line in sorted(queue.copied & record.made):  # a slower copy may have been at renaming
            if not record.is_finished(tasks[line]):
                record.made.remove(line)
                record.fail(tasks[line], Error("two copies differ"), 1)

    def settle(
        self, queue: Queue, tasks: Sequence[Any], record: Record, event: Any, keep_going: bool
    ) -> None:
        """Count what has become of a unit."""
        actor, unit, reply = event
        if died := isinstance(reply, Error):
            reply = [("", {}) if record.is_finished(tasks[n]) else reply for n in unit.lines]
        outcomes: dict[int, Any] = dict(zip(unit.lines, reply, strict=True))
        failed = {n: isinstance(e, _FINAL) for n, e in outcomes.items() if isinstance(e, Error)}
        made, lost = queue.settle(unit, failed, int(not died or len(unit.lines) == 1))
        for line in made:
            record.add(line, tasks[line], *outcomes[line])
        for line in lost:
            record.fail(tasks[line], outcomes[line], unit.attempts, actor.name)
            if not keep_going:
                raise outcomes[line]
        if not died and not all(failed.values()):
            self.driver.restart(actor)


class Record:
    """What a run has made, in files beside it, and on the terminal.

    done.jsonl lists what is whole: a hint, which spares reading videos again. failures.jsonl lists
    what was given up, fleet.json is the progress.

    Attributes:
        made: lines that were made now.
        failures: number of those given up, by the stage that refused them; "" of errors.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Callable[[Any], str],
        quality: Mapping[str, Any],
        verify: bool,
    ) -> None:
        self.folder, self.fingerprint, self.quality = folder, fingerprint, quality
        self.made: set[int] = set()
        self.failures: Counter[str] = Counter()
        self.total = self.before = 0
        self.started = self.reported = time.monotonic()
        self.hints: dict[str, Any] = {}
        with suppress(OSError):
            for row in (folder / "done.jsonl").read_bytes().splitlines() if not verify else ():
                with suppress(ValueError, TypeError, KeyError):  # a line cut short
                    entry = json.loads(row)
                    self.hints[entry["output"]] = entry

    def begin(self, total: int, before: int) -> None:
        """Count from here: of all so many are there."""
        self.total, self.before, self.started = total, before, time.monotonic()
        remove(self.folder / "failures.jsonl")

    def is_finished(self, task: Any) -> bool:
        """Whether a task was done in the same way: by the hint where no file has changed."""
        name, fingerprint = str(task.output), self.fingerprint(task)
        with suppress(OSError):
            if self.hints.get(name, {}) == self.describe(task.output, fingerprint):
                return True
        finished = is_finished(task.output, fingerprint, self.quality)
        if finished:
            self.note(task.output, fingerprint)
        return finished

    def note(self, output: Path, fingerprint: str) -> None:
        """Add to done.jsonl."""
        entry = self.hints[str(output)] = self.describe(output, fingerprint)
        self.append("done.jsonl", entry)

    def describe(self, output: Path, fingerprint: str) -> dict[str, Any]:
        """Entry of done.jsonl: sizes and times of the files of a task, and how they were made."""
        status = [path.stat() for path in companions(output) if path.exists()]
        files = [[one.st_size, one.st_mtime_ns] for one in status]
        quality = dict(self.quality)
        return {"output": str(output), "made": fingerprint, "quality": quality, "files": files}

    def add(self, line: int, task: Any, text: str, files: Mapping[Path, bytes]) -> None:
        """Count a task that was done; its files are written where another disk has them."""
        from worldline.video.write import writing_all

        if files:
            with writing_all([*files]) as temporaries:
                for temporary, content in zip(temporaries, files.values(), strict=True):
                    temporary.write_bytes(content)
        self.made.add(line)
        results.add(text or f"{task.output} is there")
        with suppress(Error, OSError, KeyError):  # latents have none
            self.note(task.output, read_json(task.output.with_suffix(".json"))["fingerprint"])

    def fail(self, task: Any, error: Error, attempts: int, node: str = "") -> None:
        """Count a task that is given up."""
        self.failures[getattr(error, "stage", "")] += 1
        place, message = getattr(task, "place", "") or str(task), one_line(error)
        logger.error("%s: %s (attempt %d)", place, message, attempts)
        facts = {"attempts": attempts, "node": node, "code": error.exit_code, "message": message}
        self.append("failures.jsonl", {"line": place, "output": str(task.output), **facts})

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def report(self, state: str, *, now: bool = False) -> None:
        """Print and write the progress, each ten seconds."""
        from worldline.video.write import write_bytes

        if not now and time.monotonic() - self.reported < _REPORT_S:
            return
        self.reported = time.monotonic()
        made, failed = len(self.made), self.failures.total()
        rate = made / max(self.reported - self.started, 1e-3)  # a second
        rest = self.total - self.before - made - failed
        left = str(timedelta(seconds=round(rest / rate))) if rate else None
        facts = {
            "made": made,
            "failed": failed,
            "there_before": self.before,
            "total": self.total,
            "an_hour": round(3600 * rate, 1),
            "left": left,
            "actors": state,
        }
        write_bytes(self.folder / _PROGRESS, json.dumps(facts, indent=1).encode())
        line = f"{made} made, {failed} failed, {rest} to make, {facts['an_hour']:,} an hour"
        line += f", {left} left" if left else ""
        logger.info("%s; %s", line, state, extra={"repeats": True})


# --- in an actor


def open_tasks(
    load: Load, tasks: Sequence[Any], shared: bool
) -> tuple[Callable[[Sequence[int]], list[Outcome]], int]:
    """Load what makes tasks: a function of their places, and how many it makes in step.

    Args:
        load: of the command.
        tasks: all that are made.
        shared: whether they are written to the driver's disk.
    """
    make_task, size = load(tasks)

    def make_one(task: Any, group: Sequence[Any]) -> Outcome:
        replaced = existing(companions(task.output))
        line = attempt(make_task, task, str(task), group)
        if isinstance(line, Error):
            return line
        log_replaced(replaced)
        files: dict[Path, bytes] = {}
        if not shared:  # the report first, as `Video.save` has it
            paths = [path for path in reversed(companions(task.output)) if path.is_file()]
            files = {path: path.read_bytes() for path in paths}
            for path in paths:
                path.unlink()
        return line, files

    def make(lines: Sequence[int]) -> list[Outcome]:
        group = [tasks[line] for line in lines]
        return [make_one(task, group if task is group[0] else ()) for task in group]

    return make, size


def spawn(words: Sequence[str], gpus: int, places: Mapping[Path, int], tasks: Sequence[Any]) -> Run:
    """Runner of tasks for several GPUs: the command itself, which is asked for them one by one.

    Args:
        words: the command line.
        gpus: that it runs on.
        places: outputs of the whole batch -> lines.
        tasks: those that are made.
    """
    command = [sys.executable, "-m", "worldline", *words, "--num_gpus", str(gpus)]
    process: Any = subprocess.Popen(
        [*command, "--data_parallel", "1"],
        env={**os.environ, ASKED: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=end_with_parent,
    )

    def receive(*, loading: bool = False) -> str:
        """The next answer; an `Error` of the last line where the command has ended instead."""
        line = ""
        for row in process.stdout:
            _, _, answer = row.partition(ANSWER)
            if answer:
                made: str | Error = pickle.loads(bytes.fromhex(answer))
                if isinstance(made, Error):
                    raise made
                return made
            line = row.strip().removeprefix("worldline: ") or line
            sys.stderr.write(row)  # to the log of the actor
        with process:
            status = process.wait()
        line = line or f"the processes ended with status {status}"
        # else the actor begins afresh, and loads again
        raise (InputError if loading and status == InputError.exit_code else Error)(line)

    receive(loading=True)

    def run(task: Any, label: str, group: Sequence[Any]) -> str:
        process.stdin.write(f"{places[task.output]}\n")
        process.stdin.flush()
        return receive()

    return run, 1


def end_with_parent() -> None:
    """Ask Linux to end this process by SIGTERM when the actor ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
