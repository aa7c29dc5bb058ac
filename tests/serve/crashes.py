"""Servers that are killed: `python -m tests.serve.crashes FOLDER POINT…`.

Before and after each durable operation (fsync, rename, unlink, commit) there is a point. A server
in FOLDER/POINT is killed at the point of this number, counted from 1; at 0 it is not killed, and
prints the number of points. What it answered is in FOLDER/POINT.answers, a line each.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldline.serve.jobs import Queue, Settings
from worldline.serve.records import Job, Worker, new_id
from worldline.serve.rows import Rows
from worldline.serve.store import Store

from .fake_worker import FakeWorker, Script

SETTINGS = Settings(watch_seconds=0.01, min_free_bytes=0, load_backoff=0.01, flush_seconds=0.02)
KEYS = ("a", "b", "cancel", "delete", "die_once", "c")


class Points:
    """Counter of points; kills this process at one of them."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            try:
                return function(*args, **kwargs)
            finally:
                self()

        return counted


def job(key: str) -> Job:
    request = {"prompt": key, "seed": 1}
    shape = {"num_frames": 9, "height": 64, "width": 96, "fps": 24.0}
    media = {"input_kind": "image", "input_suffix": ".png"}
    key_of = {"idempotency_key": key, "body_sha256": key}
    return Job(new_id(), "w", request, shape, batch_key="k", **media, **key_of)  # type: ignore


async def submit(queue: Queue, key: str) -> Job:
    path = queue.store.incoming()
    path.write_bytes(key.encode() * 100)
    return await queue.submit(job(key), path)


def make_queue(store: Store) -> Queue:
    script = Script(seconds=0.001, steps=3, max_batch_size=2)
    workers: list[Worker] = [FakeWorker("w", f"w/{i}", script) for i in range(2)]
    return Queue(store, {"w": workers}, lambda w, name: FakeWorker(w, name, script), SETTINGS)


async def serve(folder: Path, answers: int) -> None:
    store = Store(folder)
    queue = make_queue(store)
    await queue.start()

    def answer(*words: str) -> None:
        os.write(answers, (" ".join(words) + "\n").encode())

    async def ended(id: str) -> None:
        answer((await queue.wait(id)).status, id)

    jobs = {}
    for key in KEYS:
        jobs[key] = (await submit(queue, key)).id
        answer("accepted", jobs[key], key)
        if key == "cancel":
            answer("status", (await queue.cancel(jobs[key])).status)
        if key == "delete":
            await queue.delete(jobs[key])
            answer("deleted", jobs[key])
    await asyncio.gather(*(ended(jobs[key]) for key in KEYS if key != "delete"))
    await queue.delete(jobs["c"])
    answer("deleted", jobs["c"])
    await queue.drain(1)
    store.close()


def main(folder: Path, last: int) -> None:
    points = Points(last)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, points.around(getattr(os, name)))
    Rows._commit = points.around(Rows._commit)  # type: ignore[method-assign]
    answers = os.open(folder / f"{last}.answers", os.O_WRONLY | os.O_CREAT)
    asyncio.run(serve(folder / str(last), answers))
    print(points.count)


if __name__ == "__main__":
    for word in sys.argv[2:]:
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            main(Path(sys.argv[1]), int(word))
            sys.exit()
