"""States of a run on disk, from which a killed one goes on: written whole or not at all.

A state is a folder of torch's distributed checkpoint, to which every process writes its own part,
and from which any number of processes can read. It gets its name once all of it is on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from worldline.errors import CheckpointError, Error, InputError, one_line, strerror
from worldline.files import readable_size, remove, remove_stale, temporary_name
from worldline.parallel.mesh import ALONE, Axis

log = logging.getLogger(__name__)

dcp: Any = checkpoint  # which does not declare what it exports
FACTS = "run.json"  # of a state: what is no tensor
_NAME = re.compile(r"iter_(\d{9})\.state")


@dataclass
class States:
    """States of one run, `iter_{step}.state`, of which the newest and some others are kept.

    Attributes:
        folder: of the states.
        ranks: processes that write together.
        keep_last: number of the newest ones that are kept.
        keep_every: those of steps that it divides are kept, too; 0 keeps none for that.
        written: called in the first process, with a step of which all is on the disk.
        removed: called there, too, with a step that is no longer kept.
    """

    folder: Path
    ranks: Axis = ALONE.world
    keep_last: int = 1
    keep_every: int = 0
    written: Callable[[int], None] = lambda step: None
    removed: Callable[[int], None] = lambda step: None
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "state"))
    _pending: Future[None] | None = None
    _written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ranks = self.ranks.apart()  # a thread must not talk between two words of another

    def path(self, step: int) -> Path:
        return self.folder / f"iter_{step:09}.state"

    def steps(self) -> list[int]:
        """Steps that have a whole state, rising."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def check_room(self, tensors: Mapping[str, Tensor], beside: int = 0) -> None:
        """Refuse to go on where the disk has no room for a state.

        Args:
            tensors: of a state; those of this process count.
            beside: bytes of other files that this process writes with it.

        Raises:
            InputError: in all processes; both sizes are named.
        """
        own = beside + sum(_local(tensor).nbytes for tensor in tensors.values())
        need = sum(self.ranks.every(own))
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if self.ranks.any(free < need):
            raise InputError(
                f"{self.folder}: a state takes {readable_size(need)}, and the disk has "
                f"{readable_size(free)}; free some, or set checkpoint.save_state=false"
            )

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor] | None,
        facts: Mapping[str, Any],
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a state in the background, once the one before is whole.

        Args:
            step: number of steps that are done.
            tensors: copied before this returns; None writes only what is beside them.
            facts: what a run needs beside tensors, as JSON.
            beside: writes other files of this step, before the state.

        Raises:
            Error: the one before could not be written.
        """
        self.wait()
        path = self.path(step)
        copies = None
        if tensors is not None:
            copies = {n: tensor.detach().to("cpu", copy=True) for n, tensor in tensors.items()}
        temporary = Path(self.ranks.once(lambda: str(temporary_name(path))))
        arguments = step, temporary, copies, json.dumps(dict(facts)), beside
        self._pending = self._writer.submit(self._write, *arguments)

    def wait(self) -> None:
        """Return once everything is on the disk.

        Raises:
            Error: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise `Error` if what was to be written by now could not be."""
        if self._pending is not None and self._pending.done():
            self.wait()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Wait for the last state at the end of a run, and at an error, which goes before its own.

        Raises:
            Error: it could not be written.
        """
        try:
            yield
        except Exception:
            try:
                self.wait()
            except Error as error:
                log.warning("%s", error)
            raise
        self.wait()

    def _write(
        self,
        step: int,
        temporary: Path,
        tensors: dict[str, Tensor] | None,
        facts: str,
        beside: Callable[[], None],
    ) -> None:
        try:
            if self._ranks.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(".iter_*.state.*"):  # by killed processes
                    remove_stale(left.with_name(left.name[1:].partition(".state")[0] + ".state"))
            self._ranks.together(beside)  # for a failure of one is that of all
            if tensors is not None:
                writer = dcp.FileSystemWriter(temporary, sync_files=True)
                with quiet():
                    dcp.save(tensors, storage_writer=writer, **_together(self._ranks))
                if self._ranks.first:
                    (temporary / FACTS).write_text(facts)
                    self._remove(step)  # of a run that went back
                    temporary.replace(self.path(step))
            if self._ranks.first:
                self.written(step)
            self._prune(step)
        except BaseException as error:  # torch's own is no Exception
            if self._ranks.first:
                remove(temporary)
            kept = [self.path(each).name for each in self.steps()[-1:]]
            reason = _reason(error) + (f"; {kept[0]} is whole, to go on from" if kept else "")
            raise Error(
                f"{self.folder}: the state of step {step} cannot be written: {reason}"
            ) from error

    def _prune(self, newest: int) -> None:
        self._written.append(newest)
        steps = sorted({*self._written, *self.steps()})
        for step in [step for step in steps if step <= newest][: -max(1, self.keep_last)]:
            if not (self.keep_every and step % self.keep_every == 0) and self._ranks.first:
                self.removed(step)  # first: a state is found again, by the next run too
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Remove a state, which has no name while that takes its time."""
        path = self.path(step)
        if path.exists():
            remove(path.replace(temporary_name(path)))

    def facts(self, step: int) -> dict[str, Any]:
        """What a state has beside tensors.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.path(step)
        try:
            facts: dict[str, Any] = json.loads((path / FACTS).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(self._damaged(path, error)) from error
        return facts

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a state into tensors, in place; its facts.

        Raises:
            CheckpointError: it is of another model or optimizer, or damaged.
        """
        path, facts = self.path(step), self.facts(step)
        try:
            reader = dcp.FileSystemReader(path)
            stored = {name: tuple(each.size) for name, each in _sizes(reader).items()}
        except (OSError, ValueError, EOFError, UnpicklingError) as error:
            raise CheckpointError(self._damaged(path, error)) from error
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if stored != wanted:
            different = sorted(
                name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name)
            )
            raise CheckpointError(
                f"{path} is the state of another model or optimizer (of {len(different)} tensors "
                f"the first is {different[0]}); choose another folder"
            )
        try:
            with quiet():
                dcp.load(dict(tensors), storage_reader=reader, **_together(self.ranks))
        except CheckpointException as error:  # which holds what each process met
            raise CheckpointError(self._damaged(path, error)) from error
        return facts

    def _damaged(self, path: Path, error: BaseException) -> str:
        before = [self.path(step).name for step in self.steps() if self.path(step) < path]
        start = f"from {before[-1]}" if before else "anew"
        return f"{path} is damaged ({_reason(error)}); remove it, and the run goes on {start}"


def _reason(error: BaseException) -> str:
    """The system's reason behind an error of torch, which names a position; else its own words."""
    behind = [error]
    for one in behind:  # which grows
        if isinstance(one, OSError):
            return strerror(one)
        behind += [failure for failure, _ in getattr(one, "failures", {}).values()]
        behind += [one.__context__] if one.__context__ else []
    return one_line(behind[1] if hasattr(error, "failures") else error)


def _together(ranks: Axis) -> dict[str, Any]:
    return {"process_group": ranks.group, "no_dist": ranks.count == 1}


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that a distributed checkpoint is one process's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is asked for
        yield


def _sizes(reader: Any) -> dict[str, Any]:
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if hasattr(entry, "size")}


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "to_local", lambda: tensor)()
