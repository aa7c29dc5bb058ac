"""Measure `worldline serve` on bundled worlds: what it adds to a clip, and what it bears.

    python -m benchmarks.serving --output benchmarks/results/serving.json

Clips are made in turn by the server and by a world in this process, so that other work on the
machine slows both; the server's worker has the same options.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import click
import torch

import worldline
from tests.serve.served import Served, ask_all
from worldline.report import environment
from worldline.serve.records import Job, new_id
from worldline.serve.store import Store

WORLD = "tiny-Cosmos-Predict2.5-2B"
PROMPT = "A red ball rolls to the right along the floor, with a blue box."
STORED = 10_000


class Client:
    """One connection that is kept."""

    def __init__(self, server: Served) -> None:
        self.connection = HTTPConnection(urlsplit(server.url).netloc, timeout=120)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        self.connection.request(method, path, data, headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server whose world is ready."""
    server = Served(folder, WORLD, "--queue_size", "100000")
    try:
        server.until_ready()
        yield server
    finally:
        server.stop()


def made(client: Client, seed: int) -> dict[str, Any]:
    """A job that has ended."""
    status, job = client.ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": seed})
    assert status == 200, job
    while job["status"] in ("queued", "in_progress"):
        time.sleep(0.01)
        _, job = client.ask("GET", f"/v1/videos/{job['id']}")
    assert job["status"] == "completed", job
    return dict(job)


def first_step(server: Served, client: Client, seed: int) -> float:
    """Milliseconds from the answer to a request to the first event of a step; then cancelled."""
    events = HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    events.request("GET", "/v1/events")
    stream = events.getresponse()
    _, job = client.ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": seed})
    began = time.perf_counter()
    id = job["id"].encode()
    while not ((line := stream.readline()).startswith(b'data: {"id":"' + id) and b'"kind"' in line):
        pass
    seconds = time.perf_counter() - began
    events.close()
    client.ask("POST", f"/v1/videos/{job['id']}/cancel")
    while client.ask("GET", f"/v1/videos/{job['id']}")[1]["status"] == "in_progress":
        time.sleep(0.02)
    return seconds * 1e3


def load(server: Served, count: int, together: int, path: str) -> dict[str, Any]:
    """Requests a second, and statuses, of clients that ask at once."""
    began = time.perf_counter()
    statuses = ask_all(server.url, [("GET", path, None)], count, together)
    seconds = time.perf_counter() - began
    return {"requests_per_second": round(count / seconds), "statuses": statuses}


def fill(folder: Path, count: int) -> None:
    """Store jobs that have ended."""
    store = Store(folder)
    shape = {"num_frames": 33, "height": 128, "width": 192, "fps": 25.0}
    for number in range(count):
        job = Job(new_id(), WORLD, {"prompt": PROMPT, "seed": number}, shape, status="cancelled")
        store.add(job, None)
    store.close()


@click.command()
@click.option("--clips", default=20, show_default=True)
@click.option("--stored", default=STORED, show_default=True)
@click.option("--requests", default=10_000, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(clips: int, stored: int, requests: int, output: Path, commit: str) -> None:
    """Measure, and write a JSON file."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"commit": commit, **environment(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world = worldline.load(WORLD)
        with serving(folder) as server:
            client = Client(server)
            made(client, 0)
            world.generate(prompt=PROMPT, seed=0)
            served, local = [], []
            for seed in range(1, clips + 1):
                served.append(made(client, seed)["inference_time_s"])
                began = time.perf_counter()
                world.generate(prompt=PROMPT, seed=seed)
                local.append(time.perf_counter() - began)
            seconds = median(served), median(local)
            result["clip"] = {
                "seconds_served": round(seconds[0], 4),
                "seconds_local": round(seconds[1], 4),
                "overhead": round(seconds[0] / seconds[1] - 1, 4),
            }
            steps = [first_step(server, client, seed) for seed in range(10)]
            result["ms_to_the_first_step"] = round(median(steps), 1)
            before = server.resident()
            result["load"] = load(server, requests, 64, "/v1/videos?limit=20")
            result["load"]["growth_mb"] = round(server.resident() - before, 1)
        fill(folder / "data", stored)
        with serving(folder) as server:
            [job] = Client(server).ask("GET", "/v1/videos?limit=1&order=asc")[1]["data"]
            found = load(server, requests, 4, f"/v1/videos/{job['id']}")
            result["retrieve"] = {"stored": stored, **found}
    print(json.dumps(result, indent=1))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
