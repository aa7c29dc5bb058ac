"""Commands that run in several processes, and what is left of them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FAILING = Path(__file__).parent / "failing"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
WORLDLINE = ("-m", "worldline")
_LIMIT_S = 120.0  # two starts on busy cores


@dataclass
class Job:
    """A command that runs; `mark` is in the environment of all its processes."""

    process: subprocess.Popen[bytes]
    mark: str
    errors: Path

    @property
    def messages(self) -> list[str]:
        """Lines of worldline on standard error."""
        lines = self.errors.read_text().splitlines()
        return [line.partition(": ")[2] for line in lines if line.startswith("worldline: ")]

    def wait_for(self, text: str) -> None:
        """Wait until this is on standard error."""
        until = time.monotonic() + _LIMIT_S
        while text not in (errors := self.errors.read_text()):
            assert time.monotonic() < until, errors
            assert self.process.poll() is None, errors
            time.sleep(0.05)

    def processes(self, rank: int | None = None) -> list[int]:
        """Ids of the processes that run, or of one rank's."""
        marks = [f"{self.mark}\0", *([] if rank is None else [f"\0RANK={rank}\0"])]
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                environment = "\0" + (folder / "environ").read_text()
                if all(mark in environment for mark in marks):
                    found.append(int(folder.name))
        return found

    def end(self, limit: float = _LIMIT_S) -> int:
        """Exit status, once no process is left."""
        status = self.process.wait(limit)
        until = time.monotonic() + 20
        while left := self.processes():
            assert time.monotonic() < until, f"{left} are left: {self.errors.read_text()}"
            time.sleep(0.05)
        return status


def start(
    folder: Path, words: Sequence[object], program: Sequence[str] = WORLDLINE, **names: object
) -> Job:
    """Start Python in a folder, with more names in its environment."""
    mark = secrets.token_hex(8)
    path = os.pathsep.join([str(FAILING), os.environ.get("PYTHONPATH", "")])
    names |= {"PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": 1, "MARK": mark}
    with (folder / f"{mark}.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            cwd=folder,
            env=os.environ | {name: str(value) for name, value in names.items()},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    return Job(process, f"MARK={mark}", Path(errors.name))
