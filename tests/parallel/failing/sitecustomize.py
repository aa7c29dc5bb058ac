"""On the path of a process, lets it fail where $FAIL names: "kill denoise 1 2".

That is how, in which stage, which rank, and at which of its starts.
"""

import ctypes
import os
import signal
import time
from typing import Any


def busy(seconds: float) -> None:
    """Compute in Python."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def fail(how: str) -> None:
    """Fail, or take long."""
    name, _, seconds = how.partition(":")
    if name == "raise":
        raise RuntimeError("a bug")
    if name == "memory":
        raise MemoryError("no room")
    if name == "hold":  # a C call that keeps the GIL
        ctypes.PyDLL(None).sleep(int(seconds))
    elif name == "busy":
        busy(float(seconds))
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{name.upper()}"))


if "FAIL" in os.environ and "RANK" in os.environ:
    how, stage, rank, number = os.environ["FAIL"].split()
    if rank == os.environ["RANK"]:
        import worldline.events

        plain, starts = worldline.events.report_event, 0

        def report_event(kind: str, message: str, **facts: Any) -> None:
            """Report, and fail at the right start."""
            global starts
            plain(kind, message, **facts)
            if (facts.get("stage"), facts.get("state")) == (stage, "started"):
                starts += 1
                if starts == int(number):
                    fail(how)

        worldline.events.report_event = report_event
