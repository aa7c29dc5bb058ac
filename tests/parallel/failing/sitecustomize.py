"""On the path of a process, lets it fail where $FAIL names: "denoise 1 2 kill".

That is in which stage, which rank (- is each), at which of its starts, and how.
"""

import ctypes
import os
import signal
import time
from typing import Any


def fail(how: str) -> None:
    """Fail, or take long."""
    os.write(2, b"FAILING\n")
    if how == "raise":
        raise RuntimeError("a bug")
    if how == "diverge":
        raise worldline.errors.NonFiniteError("not finite")
    if how == "memory":
        raise MemoryError("no room")
    if how.startswith("hold"):  # a C call that keeps the GIL
        ctypes.PyDLL(None).sleep(int(how[4:]))
    elif how.startswith("busy"):
        until = time.monotonic() + float(how[4:])
        while time.monotonic() < until:
            pass
    else:
        os.kill(os.getpid(), getattr(signal, how))


if "FAIL" in os.environ and "RANK" in os.environ:
    import worldline.errors
    import worldline.events
    from worldline.parallel import job

    stage, rank, number, how = os.environ["FAIL"].split()
    job.SILENCE = int(os.environ.get("SILENCE", job.SILENCE))
    plain, starts = worldline.events.report_event, 0

    def report_event(kind: str, message: str, **facts: Any) -> None:
        """Report, and fail at the right start."""
        global starts
        plain(kind, message, **facts)
        if (facts.get("stage"), facts.get("state")) == (stage, "started"):
            starts += 1
            if rank in (os.environ["RANK"], "-") and number == str(starts):
                fail(how)

    worldline.events.report_event = report_event
