"""Jobs through `worldline serve` itself: batches, cancels, and workers that are killed."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs worldline[serve]")

from prometheus_client.parser import text_string_to_metric_families

import worldline
from tests.serve.served import Served

pytestmark = pytest.mark.slow

FLOW, AR = "tiny-Cosmos-Predict2.5-2B", "tiny-Cosmos-Predict1-4B"
CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"
ENDED = ("completed", "failed", "cancelled")


class Server(Served):
    """Two worlds behind one address, whose autoregressive clips are made four at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FLOW, AR, "--batch_size", "4", "--batch_window_ms", "10000")
        self.until_ready()

    def job(self, id: str) -> Any:
        return self.ask(f"/v1/videos/{id}")

    def ended(self, id: str) -> Any:
        return self.until(lambda: (job := self.job(id))["status"] in ENDED and job)

    def running(self, id: str) -> Any:
        """A job that has done a step."""
        return self.until(lambda: (job := self.job(id))["step"] and job)

    def workers(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    def metric(self, name: str, **labels: str) -> float:
        text = self.open("/metrics")[1].decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def long(prompt: str = "a red ball") -> dict[str, Any]:
    return {"model": FLOW, "prompt": prompt, "num_steps": 1000, "num_video_frames": 9, "seed": 1}


def test_a_batch_is_made_as_each_clip_alone(server: Server) -> None:
    clip = "data:video/mp4;base64," + base64.b64encode(CLIP.read_bytes()).decode()
    body = {"model": AR, "input_reference": {"video_url": clip}, "num_input_frames": 9}
    count, total = (f"worldline_batch_size_{end}" for end in ("count", "sum"))
    before = server.metric(count, world=AR), server.metric(total, world=AR)
    jobs = [server.ask("/v1/videos", {**body, "seed": seed})["id"] for seed in range(4)]
    assert {server.ended(id)["status"] for id in jobs} == {"completed"}
    assert server.metric(count, world=AR) == before[0] + 1
    assert server.metric(total, world=AR) == before[1] + 4
    again = server.ask("/v1/videos", server.job(jobs[2])["request"])["id"]
    assert server.ended(again)["status"] == "completed"
    contents = [server.open(f"/v1/videos/{id}/content")[1] for id in (jobs[2], again)]
    assert contents[0] == contents[1]


def test_places_in_the_queue_are_true(server: Server) -> None:
    ids = [server.ask("/v1/videos", long())["id"] for _ in range(3)]
    server.running(ids[0])
    for place, id in enumerate(ids):
        while True:
            states = [(job["status"], job["queue_position"]) for job in map(server.job, ids)]
            if states[place][0] == "in_progress":
                break
        assert states[place:] == [
            ("in_progress", None),
            *(("queued", number) for number in range(len(ids) - place - 1)),
        ]
        began = time.monotonic()
        server.open(f"/v1/videos/{id}/cancel", {})
        assert server.ended(id)["status"] == "cancelled"
        if place < 2:  # the next begins within a step and a second
            server.running(ids[place + 1])
            assert time.monotonic() - began < 2.5


def test_a_worker_that_is_killed(server: Server) -> None:
    """Its job runs again; one whose worker dies twice fails, and the next is made."""
    short = {**long(), "num_steps": 40}
    id = server.ask("/v1/videos", short)["id"]
    server.running(id)
    kill(server, FLOW)
    job = server.ended(id)
    assert (job["status"], job["attempts"]) == ("completed", 2)
    id, following = (server.ask("/v1/videos", body)["id"] for body in (long(), short))
    for attempt in (1, 2):
        server.until(lambda n=attempt: (j := server.job(id))["attempts"] == n and j["step"])
        kill(server, FLOW)
    job = server.ended(id)
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_died")
    assert server.ended(following)["status"] == "completed"
    assert server.metric("worldline_worker_restarts_total", worker=f"{FLOW}/0") == 3


def kill(server: Server, world: str) -> None:
    """End the worker of a world, as the system does where memory is short."""
    for process in server.workers():
        if world in Path(f"/proc/{process}/cmdline").read_text():
            os.kill(process, signal.SIGKILL)
            return
    raise AssertionError([Path(f"/proc/{p}/cmdline").read_text() for p in server.workers()])


def test_no_prompt_leaves_its_owner(server: Server) -> None:
    """No word of a prompt is in the log or the metrics."""
    id = server.ask("/v1/videos", {**long("a xylophonic quokka"), "num_steps": 1})["id"]
    assert server.ended(id)["status"] == "completed"
    assert server.job(id)["prompt"] == "a xylophonic quokka"
    texts = server.log.read_text(), server.open("/metrics")[1].decode()
    assert not any("quokka" in text for text in texts)
