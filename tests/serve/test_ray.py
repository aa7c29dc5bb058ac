"""Workers on a cluster of this machine: the files of a local worker, whatever dies in between.

`.ci/run fleet` runs them, in an environment with Ray.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from worldline.serve.errors import ApiError
from worldline.serve.jobs import Queue, Settings
from worldline.serve.records import Job, Task, WorkerDied, new_id
from worldline.serve.scaling import Autoscaler, RayOptions
from worldline.serve.store import Store
from worldline.serve.workers import LocalWorker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

WORLD = "tiny-Cosmos-Predict2.5-2B"
SHORT = {"prompt": "a ball rolls", "seed": 3, "num_video_frames": 5, "num_steps": 1}
LONG = {**SHORT, "num_steps": 1000}
FILES = {"video.mp4", "thumbnail.jpg", "report.json"}
# of a report, what differs from run to run
MEASURED = ("load", "run", "seconds_per_step", "seconds_of_steps")


class Server:
    """A queue with its workers on the cluster, as `worldline serve` holds it.

    Attributes:
        gpus: of a worker.
    """

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        self.folder, self.runner, self.gpus = folder, runner, 0

    def make_worker(self, world: str, name: str) -> Any:
        from worldline.serve.ray_workers import RayWorker

        return RayWorker(world, name, {"device": "cpu"}, gpus=self.gpus, place=WORLD)

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
        return self.runner.run(asyncio.wait_for(work, seconds))

    async def start(self) -> None:
        self.store = Store(self.folder)
        settings = Settings(watch_seconds=0.05, min_free_bytes=0.0)
        workers = [self.make_worker("w", "w/0")]
        self.queue = Queue(self.store, {"w": workers}, self.make_worker, settings)
        await self.queue.start()

    async def ready(self) -> None:
        await until(lambda: self.queue.health()[0] == "ready")

    async def end(self) -> None:
        await self.queue.drain(0)
        self.store.close()

    @property
    def worker(self) -> Any:
        return self.queue.pool.slots["w"][0].worker

    async def submit(self, stated: dict[str, Any], input: Path | None = None) -> str:
        """Id of a job, by the way of a request."""
        kind, suffix, copy = None, "", None
        if input is not None:
            kind, suffix, copy = "image", input.suffix, self.store.incoming()
            copy.write_bytes(input.read_bytes())
        checked = await self.queue.check("w", stated, copy, kind)  # type: ignore[arg-type]
        job = Job(
            new_id(),
            "w",
            checked.request,
            checked.shape,
            input_kind=kind,  # type: ignore[arg-type]
            input_suffix=suffix,
            created_at=time.time(),
        )
        return (await self.queue.submit(job, copy)).id

    def job(self, id: str) -> Job:
        return self.store.get(id, None)


async def until(condition: Callable[[], Any], seconds: float = 45) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine, with GPUs in name alone, and this process as its driver."""
    import ray

    from worldline.serve.ray_workers import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
        connection = Cluster("auto", 0)
        assert not connection.connected  # it was before, and is to stay
        connection.close()
        assert ray.is_initialized()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def server(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with asyncio.Runner() as runner:
        server = Server(tmp_path_factory.mktemp("server") / "data", runner)
        server.run(server.start())
        yield server
        server.run(server.end())


def test_files_are_those_of_a_local_worker(server: Server, tmp_path: Path) -> None:
    picture, local = tmp_path / "in.png", tmp_path / "local"
    Image.linear_gradient("L").resize((192, 128)).convert("RGB").save(picture)

    async def test() -> None:
        other = LocalWorker(WORLD, "local", {"device": "cpu"})
        await asyncio.gather(server.ready(), other.start())
        assert server.queue.facts("w") is not None
        assert other.facts is not None
        assert server.worker.facts.fields == other.facts.fields
        with pytest.raises(ApiError) as caught:
            await server.submit({**SHORT, "num_stepz": 3})
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", "num_stepz")
        with pytest.raises(ApiError) as caught:
            await server.submit(SHORT, Path(__file__))
        assert caught.value.code == "unreadable_media"
        id = await server.submit(SHORT, picture)
        job, input = await server.queue.wait(id), server.store.input_path(server.job(id))
        assert (job.status, job.attempts, job.progress) == ("completed", 1, 100), job
        assert job.result["media_type"] == "video/mp4"
        task = Task(id, job.request, str(input), "image", str(local))
        events = [event async for event in other.run([task])]
        await other.stop()
        assert events[-1]["event"] in ("done", "free")
        folder = server.store.folder(id)
        assert {path.name for path in folder.iterdir()} == FILES
        for name in ("video.mp4", "thumbnail.jpg"):
            assert (folder / name).read_bytes() == (local / name).read_bytes(), name
        reports = [json.loads((each / "report.json").read_text()) for each in (folder, local)]
        for report in reports:
            for name in MEASURED:
                report.pop(name)
        assert reports[0] == reports[1]
        assert server.worker.peak_bytes > 1e7

    server.run(test())


def test_cancel_stops_at_a_step_and_checks_are_answered_meanwhile(server: Server) -> None:
    async def test() -> None:
        await server.ready()
        id = await server.submit(LONG)
        await until(lambda: server.job(id).step_done > 3)
        begun = time.monotonic()
        await server.queue.check("w", SHORT, None, None)
        assert time.monotonic() - begun < 5
        assert server.job(id).status == "in_progress"
        done, next = server.job(id).step_done, await server.submit(SHORT)
        job = await server.queue.cancel(id)
        await until(lambda: server.job(id).status == "cancelled", 5)
        assert job.step_done - done < 20
        assert not server.store.folder(id).exists()
        assert (await server.queue.wait(next)).status == "completed"
        assert server.job(next).attempts == 1

    server.run(test())


def test_an_actor_killed_in_a_job(server: Server) -> None:
    async def test() -> None:
        import ray

        await server.ready()
        first, id = server.worker, await server.submit({**LONG, "num_steps": 60})
        await until(lambda: server.job(id).step_done > 3)
        pid = ray.get(first._actors[0].pid.remote())
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.worker is not first, 20)
        job = await server.queue.wait(id)
        assert (job.status, job.attempts) == ("completed", 2)
        assert {path.name for path in server.store.folder(id).iterdir()} == FILES
        assert first.state == "dead"

    server.run(test(), 90)


def test_a_burst_of_jobs(server: Server) -> None:
    async def test() -> None:
        await server.ready()
        options = {"max_workers": 2, "target_wait_s": 0.2, "idle_s": 0.5}
        scaler = Autoscaler(server.queue, RayOptions.parse(options), look_s=0.1, down_s=0.5)
        scaler.start()
        slots = server.queue.pool.slots["w"]
        ids = [await server.submit({**SHORT, "seed": seed}) for seed in range(20)]
        await until(lambda: len(slots) == 2)
        second = slots[1].worker
        await until(lambda: second.state == "ready" or second.state == "busy")
        for id in ids:
            assert (await server.queue.wait(id)).status == "completed"
        await until(lambda: len(slots) == 1)
        assert second.state == "dead"
        await scaler.close()

    server.run(test(), 90)


def test_a_restart_of_the_server(server: Server) -> None:
    async def test() -> None:
        await server.ready()
        ids = [await server.submit(LONG if place == 0 else SHORT) for place in range(3)]
        await until(lambda: server.job(ids[0]).step_done > 3)
        await server.end()
        await server.start()
        assert [server.queue.position(server.job(id)) for id in ids] == [0, 1, 2]
        assert {server.job(id).status for id in ids} == {"queued"}
        await server.ready()
        await until(lambda: server.job(ids[0]).step_done > 0)
        await server.queue.cancel(ids[0])
        for id in ids[1:]:
            job = await server.queue.wait(id)
            assert (job.status, job.attempts) == ("completed", 1)

    server.run(test(), 90)


def test_two_gpus_make_a_video_together(server: Server, tmp_path: Path) -> None:
    async def test() -> None:
        import ray

        server.gpus = 2
        worker = server.make_worker(WORLD, "two")
        server.gpus = 0
        await worker.start()
        assert ray.available_resources().get("GPU", 0) == 0
        made = []
        for name, stated in (("one", {**SHORT, "num_steps": 2}), ("two", LONG)):
            checked = await worker.check(stated, None, None)
            task = Task(name, checked.request, None, None, str(tmp_path / name))
            async for event in worker.run([task]):
                made.append((event["event"], event.get("id")))
                if name == "two" and event.get("kind") == "denoise":
                    worker.cancel(name)
        assert ("done", "one") in made
        assert ("cancelled", "two") in made
        assert json.loads((tmp_path / "one/report.json").read_text())["processes"]
        assert len(worker._actors) == 2
        task = Task("three", checked.request, None, None, str(tmp_path / "three"))
        with pytest.raises(WorkerDied, match="two"):  # noqa: PT012
            async for event in worker.run([task]):
                if event.get("kind") == "denoise":
                    ray.kill(worker._actors[1])
        assert worker.state == "dead"
        await until(lambda: ray.available_resources().get("GPU", 0) == 2)

    server.run(test())


def test_the_command(server: Server, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    words = ("--workers", "ray", "--address", address, "--gpus_per_worker", "0", "--port", "0")
    command = [sys.executable, "-m", "worldline", "serve", WORLD, *words, "--drain_s", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = re.findall(r"http://\S+", process.stdout.readline())[0] + "/v1/videos"
            first, second = (ask(url, {**SHORT, "num_steps": steps}) for steps in (1, 1000))
            while (made := ask(f"{url}/{first['id']}"))["status"] in ("queued", "in_progress"):
                time.sleep(0.1)
            assert made["status"] == "completed"
            while ask(f"{url}/{second['id']}")["step"]["done"] < 3:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()
    [folder] = (tmp_path / "outputs/serve/videos").rglob(first["id"])
    assert {path.name for path in folder.iterdir()} == FILES
    server.run(until(lambda: ray.available_resources().get("CPU", 0) == 3, 10))


def ask(url: str, body: Any = None) -> Any:
    """Answer of a server, once it has loaded."""
    headers = {"Content-Type": "application/json"}
    content = None if body is None else json.dumps(body).encode()
    while True:
        try:
            with urlopen(Request(url, content, headers), timeout=20) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                if error.code != 503:
                    raise
            time.sleep(0.2)


def test_workers_that_cannot_start(server: Server) -> None:
    async def test() -> None:
        import ray

        from worldline.serve.ray_workers import RayWorker

        absent = RayWorker("w", "w/8", {}, gpus=0, place="no-such-world")
        with pytest.raises(WorkerDied, match=r"w/8.*no-such-world"):
            await absent.start()
        wrong = RayWorker("w", "w/8", {"dtype": "float7"}, gpus=0, place=WORLD)
        with pytest.raises(WorkerDied, match=r"w/8.*float7"):
            await wrong.start()
        for gpus in (1, 3):  # of which a node has 2
            here = [RayWorker("w", f"w/{i}", {}, gpus=gpus, place=WORLD) for i in range(3)]
            starts = [asyncio.create_task(worker.start()) for worker in here]
            await asyncio.sleep(0.5)
            assert [worker.state for worker in here] == ["loading"] * 3
            for worker in here:
                await worker.stop(kill=True)
            for start in starts:
                with pytest.raises(WorkerDied):
                    await asyncio.wait_for(start, 20)
            await until(lambda: ray.available_resources().get("GPU", 0) == 2)
        assert {worker.state for worker in (absent, wrong, *here)} == {"dead"}
        task = Task("four", SHORT, None, None, "four")
        with pytest.raises(WorkerDied):
            await anext(aiter(absent.run([task])))
        with pytest.raises(WorkerDied):
            await absent.check(SHORT, None, None)

    server.run(test())


def test_files_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldline.serve import ray_workers

    done = {"event": "done", "id": "video_1", "result": {}}
    files = {"video.mp4": b"video", "report.json": b"{}", "../escape": b"x"}
    assert ray_workers.keep(tmp_path / "a", files, done) == done
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "video.mp4",
        "report.json",
        "escape",
    }
    for number, code in ((errno.ENOSPC, "disk_full"), (errno.EACCES, "internal_error")):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path))

        with monkeypatch.context() as patch:
            patch.setattr(ray_workers, "synchronise", fail)
            event = ray_workers.keep(tmp_path / code, files, done)
        assert (event["event"], event["id"], event["code"]) == ("failed", "video_1", code)
        assert str(tmp_path) not in event["message"]
