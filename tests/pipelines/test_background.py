"""A callback turned into a generator: in step with it, and gone when it is left."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress

import pytest

from worldline.pipelines.background import in_background


def counting(log: list[str], last: int = 3) -> Generator[int, None, str]:
    def work(tell: Callable[[int], None]) -> str:
        try:
            for number in range(last):
                log.append(f"made {number}")
                tell(number)
            return "result"
        finally:
            log.append("ended")

    return in_background(work)


def test_values_and_result() -> None:
    def outer() -> Generator[int, None, None]:
        results.append((yield from counting([])))

    results: list[str] = []
    assert list(outer()) == [0, 1, 2]
    assert results == ["result"]


def working() -> bool:
    return any(thread.name == "worldline work" for thread in threading.enumerate())


def test_the_work_waits() -> None:
    log: list[str] = []
    steps = counting(log)
    assert log == []
    next(steps)
    assert log == ["made 0"]
    next(steps)
    assert log == ["made 0", "made 1"]
    steps.close()
    assert log[-1] == "ended"
    assert "made 2" not in log
    assert not working()


def test_an_error_comes_through() -> None:
    def work(tell: Callable[[int], None]) -> None:
        tell(1)
        raise KeyError("gone")

    steps = in_background(work)
    assert next(steps) == 1
    with pytest.raises(KeyError, match="gone"):
        next(steps)
    assert not working()


def test_an_error_keeps_nothing() -> None:
    """A failed work's tensors go with the error, not with the next collection of garbage."""

    class Tensor:
        pass

    def work(tell: Callable[[int], None]) -> None:
        large = Tensor()
        held.append(weakref.ref(large))
        raise KeyError("gone")

    held: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        with suppress(KeyError):
            next(in_background(work))
        assert held[0]() is None
    finally:
        gc.enable()


def test_ctrl_c_ends_both() -> None:
    script = (
        "import os, signal, threading, time\n"
        "from worldline.pipelines.background import in_background\n"
        "def work(tell):\n"
        "    for number in range(100):\n"
        "        time.sleep(0.2)\n"
        "        tell(number)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    for _ in in_background(work): pass\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', threading.active_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "interrupted 1\n"
