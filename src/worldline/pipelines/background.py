"""Work that reports by calling back, turned into a generator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any, TypeVar

Told = TypeVar("Told")
Result = TypeVar("Result")


class _Left(BaseException):
    """The generator was closed: unwinds the work, and is seen by nobody."""


def in_background(
    work: Callable[[Callable[[Told], None]], Result],
) -> Generator[Told, None, Result]:
    """Run `work(tell)` on a thread; yield what it tells, return what it returns.

    The work waits in `tell` until the generator is asked for more, so both never run at once. When
    the generator is closed, `tell` raises, and closing waits until the work has ended.

    Raises:
        BaseException: whatever the work raised.
    """
    outbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    wanted = threading.Semaphore(0)
    left = threading.Event()

    def tell(value: Told) -> None:
        outbox.put(("told", value))
        wanted.acquire()
        if left.is_set():
            raise _Left

    def run() -> None:
        try:
            outbox.put(("done", work(tell)))
        except BaseException as error:  # handed to the generator, which raises it
            outbox.put(("failed", error))

    thread = threading.Thread(target=run, name="worldline work", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = outbox.get()
            if kind == "failed":
                try:
                    raise value
                finally:  # this frame is in its traceback: a circle would keep the work's tensors
                    del value
            if kind == "done":
                return value
            yield value
            wanted.release()
    finally:
        left.set()
        wanted.release()
        thread.join()
