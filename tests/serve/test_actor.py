"""An actor's process, without Ray and without a world: its events, files and folders."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worldline.serve.actor import Process
from worldline.serve.records import Task

MODIFIED = 1_700_000_000_123_456_789


class Maker:
    """A maker whose tasks write what they read."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.known: list[str] = []
        self.cancelled: list[str] = []
        self.folders: list[Path] = []

    def add(self, tasks: list[Task]) -> None:
        self.known += [task.id for task in tasks]

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    def run(self, batch: int, tasks: list[Task]) -> None:
        for task in tasks:
            self.process.send({"event": "begun", "id": task.id, "batch": batch})
        self.process.send({"event": "free", "batch": batch})
        for task in tasks:
            self.folders.append(Path(task.folder))
            if task.input is None or not Path(task.input).exists():
                event = {"event": "failed", "id": task.id, "code": "unreadable_media"}
            else:
                path = Path(task.input)
                assert path.stat().st_mtime_ns == MODIFIED
                Path(task.folder).mkdir()
                (Path(task.folder) / "video.mp4").write_bytes(path.read_bytes() + b"!")
                event = {"event": "done", "id": task.id, "result": {"name": path.name}}
            self.process.send({**event, "batch": batch})


class Worker:
    """A worker that makes its batches by a `Maker`."""

    def __init__(self, process: Process) -> None:
        self.maker = Maker(process)
        self.batches: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def make(self) -> None:
        while (batch := self.batches.get()) is not None:
            self.maker.run(*batch)

    def stop(self) -> None:
        self.batches.put(None)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    process = Process(tmp_path)
    process._worker = Worker(process)
    process._making = threading.Thread(target=process._make, daemon=True)
    process._making.start()
    yield process
    process.stop()
    assert [*(tmp_path / "temporary").iterdir()] == []


def task(id: str, input: str | None = None) -> Task:
    return Task(id, {}, input, "image" if input else None, f"/data/videos/{id}")


def test_events_and_files_of_batches(process: Process) -> None:
    inputs = {"a": (b"first", MODIFIED)}
    first = process.run(
        1, [task("a", "/data/inputs/a.png"), task("b", "/data/inputs/b.png")], inputs
    )
    second = process.run(2, [task("c", "/data/inputs/c.png")], {"c": (b"second", MODIFIED)})
    assert next(first) == {"event": "begun", "id": "a"}
    later, events = [*second], [*first]  # both are open at once
    assert [event["event"] for event in events] == ["begun", "free", "done", "failed"]
    done = events[2]
    assert (done["id"], done["result"]["name"]) == ("a", "a.png")
    assert done["files"] == {"video.mp4": b"first!"}
    assert "files" not in events[3]
    assert later[-1]["files"] == {"video.mp4": b"second!"}
    maker = process._worker.maker
    assert maker.known == ["a", "b", "c"]
    assert not any(folder.exists() for folder in maker.folders)
    process.cancel("c")
    assert maker.cancelled == ["c"]


def test_a_stop_ends_batches(process: Process) -> None:
    process._worker.maker.run = lambda batch, tasks: None  # makes nothing
    events: list[Any] = []
    reader = threading.Thread(target=lambda: events.extend(process.run(1, [task("a")], {})))
    reader.start()
    while not process._worker.maker.known:
        time.sleep(0.001)
    process.stop()
    reader.join(5)
    assert not reader.is_alive()
    assert events == []


def test_folders_of_dead_processes_are_removed(process: Process, tmp_path: Path) -> None:
    folder = process._folder
    assert folder.stat().st_mode & 0o777 == 0o700
    dead = folder.with_name(folder.name.replace(f".{os.getpid()}-", ".999999999-"))
    dead.mkdir()
    (dead / "video.mp4").write_bytes(b"video")
    other = Process(tmp_path)
    assert not dead.exists()
    assert folder.exists()
    other._worker = process._worker
    os.rmdir(other._folder)


def test_another_release_is_named(process: Process) -> None:
    answer = process.load("0.0.0", "tiny-Cosmos-Predict2.5-2B", {}, {})
    assert "0.0.0" in answer["message"]
    assert os.uname().nodename in answer["message"]


def test_a_port_is_free(process: Process) -> None:
    assert 1024 <= process.port() < 65536
