"""Queue of a fleet: lines of a batch that wait, run, are made or given up; knows no Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.errors import Error

# of one line: what was printed of it, and its files where actors have another disk; or why not
Outcome = tuple[str, dict[Path, bytes]] | Error


@dataclass(frozen=True)
class Work:
    """What actors do.

    Attributes:
        open: loads what makes units, with whether their files are written to the driver's disk;
            that, and the size of a unit. What it raises ends the run.
        folder: working directory.
        marks: folder of the files that mark calls as begun; absent where the disk is another.
    """

    open: Callable[[bool], tuple[Callable[[Sequence[int]], list[Outcome]], int]]
    folder: Path
    marks: Path


@dataclass(eq=False)
class Unit:
    """Lines that one actor makes in one call.

    Attributes:
        lines: places in the batch; several are made in step.
        attempts: calls that began and failed.
        copies: calls in flight.
    """

    lines: tuple[int, ...]
    attempts: int = 0
    copies: int = 0


class Queue:
    """Lines of a batch, each until it is made or given up.

    Attributes:
        open: number of lines that are neither.
        running: units in flight, the oldest first.
        copied: lines of which two copies were in flight.
        stopped: whether no more units are taken.
    """

    def __init__(self, count: int, attempts: int) -> None:
        self.count, self.attempts, self.open = count, attempts, count
        self.running: list[Unit] = []
        self.copied: set[int] = set()
        self.stopped = False
        self._fresh = 0  # the first line that was never taken
        self._again: deque[Unit] = deque()

    def take(self, size: int) -> Unit | None:
        """The next unit; of the last 1 % a second copy of the oldest; None where there is none.

        Args:
            size: lines that the actor makes in step.
        """
        unit: Unit | None = None
        if self.stopped:
            return None
        if self._fresh < self.count:
            unit = Unit(tuple(range(self._fresh, min(self._fresh + size, self.count))))
            self._fresh += len(unit.lines)
        elif self._again:
            unit = self._again.popleft()
        elif self.open <= max(size, self.count // 100):
            # one, ever, and within its attempts: a line that kills processes must end
            fit = (u for u in self.running if u.attempts + u.copies < self.attempts)
            unit = next((u for u in fit if self.copied.isdisjoint(u.lines)), None)
        if unit is not None:
            self.copied.update(unit.lines if unit.copies else ())
            unit.copies += 1
            self.running += [unit] if unit.copies == 1 else []
        return unit

    def give_back(self, unit: Unit) -> None:
        """End a call that never began: nothing is charged."""
        unit.copies -= 1
        if unit in self.running and not unit.copies:
            self.running.remove(unit)
            self._again.appendleft(unit)

    def settle(
        self, unit: Unit, failed: Mapping[int, bool], charge: int = 1
    ) -> tuple[list[int], list[int]]:
        """End a call; lines that are made by it, and lines that are given up.

        Args:
            unit: what the call was of.
            failed: lines that were not made, and whether each would fail again.
            charge: attempts that count against a failed line; 0 of a batch in which one line has
                killed the process, which is tried again line by line.
        """
        unit.copies -= 1
        if unit not in self.running:  # another copy was faster
            return [], []
        unit.attempts += charge if failed else 0
        if failed and unit.copies:  # another copy may do better
            return [], []
        self.running.remove(unit)
        made, tried = [line for line in unit.lines if line not in failed], unit.attempts
        lost = [line for line, final in failed.items() if final or tried >= self.attempts]
        self._again += [Unit((line,), tried) for line in failed if line not in lost]
        self.open -= len(made) + len(lost)
        return made, lost
