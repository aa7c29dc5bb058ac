"""Workers whose videos several processes of this machine share: they work, and end, as one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from worldline.serve.records import Task, WorkerDied
from worldline.serve.worker import BEAT_S
from worldline.serve.workers import LocalWorker
from worldline.video.read import read_video
from worldline.world import load

from .served import Served
from .test_worker import DRAWING, alive, gone

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

WORLD = "tiny-Cosmos-Predict2.5-2B"
SHORT = {"prompt": "a ball rolls", "seed": 3, "num_video_frames": 9, "num_steps": 2}
LONG = {**SHORT, "num_steps": 1000}
DRAWN = {"batch_size": 2, "disable_diffusion_decoder": True}

Use = Callable[[LocalWorker], Awaitable[None]]


def use(test: Use, world: str = WORLD, **options: Any) -> list[str]:
    """Run a test with a worker of two processes, none of which outlives it; their log."""
    log: list[str] = []
    options["device"] = "cpu"
    worker = LocalWorker(world, f"{world}/0", options, processes=2, log=log.append)

    async def run() -> None:
        try:
            await test(worker)
        finally:
            await worker.stop(kill=True)

    asyncio.run(asyncio.wait_for(run(), 200))
    assert len(worker.ranks) == 2
    assert not any(map(alive, pids_of(worker)))
    return log


def pids_of(worker: LocalWorker) -> list[int]:
    return [rank.process.pid for rank in worker.ranks]


async def task(worker: LocalWorker, folder: Path, input: Path | None = None, **stated: Any) -> Task:
    kind = None if input is None else "image"
    path = None if input is None else str(input)
    checked = await worker.check({**stated, "lossless": True}, path, kind)  # type: ignore[arg-type]
    return Task(folder.name, checked.request, path, kind, str(folder))  # type: ignore[arg-type]


def difference(folder: Path, frames: Any) -> int:
    """Largest difference of a lossless file from frames of one process."""
    made = read_video(folder / "lossless.mkv").frames
    assert made.shape == frames.shape
    return int(np.abs(made.astype(int) - frames.astype(int)).max())


def test_frames_are_those_of_one_process(tmp_path: Path) -> None:
    async def test(worker: LocalWorker) -> None:
        await worker.start()
        assert worker.state == "ready"
        short = await task(worker, tmp_path / "short", **SHORT)
        names = [event["event"] async for event in worker.run([short])]
        assert names[0] == "begun"
        assert {"done", "free"} == {*names[-2:]}
        assert names.count("begun") == names.count("free") == names.count("done") == 1
        assert worker.peak_bytes == max(rank.peak_bytes for rank in worker.ranks) > 1e7
        assert time.monotonic() - worker.heartbeat < 5
        await worker.stop()
        assert [rank.process.returncode for rank in worker.ranks] == [0, 0]
        assert worker.state == "dead"

    log = use(test)
    assert any("2 processes" in line for line in log)
    assert not any(line.startswith("rank 1: INFO") for line in log)
    report = json.loads((tmp_path / "short/report.json").read_text())
    assert report["processes"]
    video = load(WORLD, device="cpu").generate(**SHORT)
    assert difference(tmp_path / "short", video.frames) <= 1  # sums are rounded in another order


def test_a_batch_of_which_one_is_cancelled(tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.linear_gradient("L").resize((192, 128)).convert("RGB").save(picture)

    async def test(worker: LocalWorker) -> None:
        await worker.start()
        assert worker.facts is not None
        assert worker.facts.max_batch_size == 2
        tasks = [await task(worker, tmp_path / name, picture, seed=3) for name in "ab"]
        ends = {}
        async for event in worker.run(tasks):
            if event["event"] == "step" and event["kind"] == "tokens" and event["done"] > 1:
                worker.cancel("b")
            if "id" in event:
                ends[event["id"]] = event["event"]
        assert ends == {"a": "done", "b": "cancelled"}

    use(test, DRAWING, **DRAWN)
    video = load(DRAWING, device="cpu", **DRAWN).generate(picture, seed=3)
    assert difference(tmp_path / "a", video.frames) <= 1
    assert not (tmp_path / "b").exists()


def test_a_cancel_stops_all_at_a_step(tmp_path: Path) -> None:
    async def test(worker: LocalWorker) -> None:
        await worker.start()
        long = await task(worker, tmp_path / "long", **LONG)
        short = await task(worker, tmp_path / "short", **SHORT)
        steps, again = [], ""
        async for event in worker.run([long]):
            if event.get("kind") == "denoise":
                steps.append(event["done"])
                if len(steps) == 2:
                    again = (await task(worker, tmp_path / "x", **SHORT)).id  # checks go on
                    worker.cancel("long")
            last = event["event"]
        assert (last, again) == ("free", "x")
        assert steps[-1] < 100
        for _ in range(2):
            assert "done" in [event["event"] async for event in worker.run([short])]
        events = worker.run([long])
        async for event in events:
            if event.get("kind") == "denoise":
                await worker.stop()  # after a step
                break
        with pytest.raises(WorkerDied, match="exit status 0"):
            async for _ in events:
                pass
        assert [rank.process.returncode for rank in worker.ranks] == [0, 0]

    use(test)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_the_other(rank: int, tmp_path: Path) -> None:
    async def test(worker: LocalWorker) -> None:
        for _ in range(2):  # it can be started again
            await worker.start()
            long = await task(worker, tmp_path / "long", **LONG)
            with pytest.raises(WorkerDied, match="signal 9") as died:
                await killed(worker, long)
            assert ("rank 1" in str(died.value)) == (rank == 1)
            assert worker.state == "dead"
            assert all(gone(pid, 5) for pid in pids_of(worker))

    async def killed(worker: LocalWorker, long: Task) -> None:
        async for event in worker.run([long]):
            if event.get("kind") == "denoise" and alive(pids_of(worker)[rank]):
                os.kill(pids_of(worker)[rank], signal.SIGKILL)

    use(test)


def test_one_that_is_killed_while_nothing_runs(tmp_path: Path) -> None:
    async def test(worker: LocalWorker) -> None:
        start = asyncio.create_task(worker.start())
        while len(worker.ranks) < 2:
            await asyncio.sleep(0.01)
        os.kill(pids_of(worker)[1], signal.SIGKILL)  # while it loads
        with pytest.raises(WorkerDied, match="rank 1"):
            await start
        await worker.start()
        os.kill(pids_of(worker)[1], signal.SIGSTOP)  # the other lives, but the worker is silent
        await asyncio.sleep(2 * BEAT_S)
        assert time.monotonic() - worker.ranks[0].heartbeat < 2 * BEAT_S
        assert time.monotonic() - worker.heartbeat > 1.5 * BEAT_S
        os.kill(pids_of(worker)[1], signal.SIGKILL)
        assert all(gone(pid, 5) for pid in pids_of(worker)[1:])
        for _ in range(500):
            if worker.state == "dead" and not alive(pids_of(worker)[0]):
                break
            await asyncio.sleep(0.01)
        assert worker.state == "dead"

    use(test)


def test_a_world_that_they_cannot_load() -> None:
    async def test(worker: LocalWorker) -> None:
        with pytest.raises(WorkerDied, match=r"cannot load.*devise"):
            await worker.start()

    use(test, devise="cpu")


PARENT = """
import asyncio, sys
from worldline.serve.workers import LocalWorker
async def main():
    one = LocalWorker(sys.argv[1], "a/0", {"device": "cpu"}, processes=2, log=lambda line: None)
    task = asyncio.create_task(one.start())
    while len(one.ranks) < 2:
        await asyncio.sleep(0.01)
    if sys.argv[2] == "ready":
        await task
    print(*[rank.process.pid for rank in one.ranks], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["ready", "loading"])
def test_they_end_with_their_parent(when: str) -> None:
    words = [sys.executable, "-c", PARENT, WORLD, when]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [*map(int, parent.stdout.readline().split())]
        assert [*map(alive, pids)] == [True, True]
        parent.kill()
    assert all(gone(pid, 5) for pid in pids)


def ask(url: str, body: Any = None) -> Any:
    """Answer of a server, once it has loaded."""
    content = None if body is None else json.dumps(body).encode()
    while True:
        try:
            request = Request(url, content, {"Content-Type": "application/json"})
            with urlopen(request, timeout=20) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                if error.code != 503:
                    raise
            time.sleep(0.2)


def wait_for_steps(url: str) -> None:
    while (ask(url)["step"] or {"done": 0})["done"] < 3:
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def test_the_server(tmp_path: Path) -> None:
    """A job whose second process is killed is made again; no process outlives SIGTERM."""
    served = Served(tmp_path, WORLD, "--gpus_per_worker", "2", "--device", "cpu", "--drain_s", "0")
    try:
        url = f"{served.url}/v1/videos"
        first = ask(url, {**SHORT, "num_steps": 60})["id"]
        wait_for_steps(f"{url}/{first}")
        before = children(served.process.pid)
        assert len(before) == 2
        os.kill(before[1], signal.SIGKILL)
        assert all(gone(pid, 5) for pid in before)
        while (made := ask(f"{url}/{first}"))["status"] in ("queued", "in_progress"):
            time.sleep(0.1)
        assert (made["status"], made["attempts"]) == ("completed", 2)
        after = children(served.process.pid)
        assert len(after) == 2
        second = ask(url, LONG)["id"]
        wait_for_steps(f"{url}/{second}")
        begun = time.monotonic()
        served.stop()
        assert served.process.returncode == 0
        assert time.monotonic() - begun < 15
        assert not any(map(alive, after))
        assert "rank 1" in served.log.read_text()
    finally:
        served.process.kill()
        served.process.wait()
