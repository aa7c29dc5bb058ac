"""Measure `worldline serve` on bundled worlds: what it adds to a clip, and what it bears.

    python benchmarks/serving.py --output benchmarks/results/serving.json

Clips are made in turn by the server and by a world in this process, so that other work on the
machine slows both; the server's worker has the same options.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

import worldline
from worldline.report import environment
from worldline.serve.records import Job, new_id
from worldline.serve.store import Store

WORLD = "tiny-Cosmos-Predict2.5-2B"
PROMPT = "A red ball rolls to the right along the floor, with a blue box."
STORED = 10_000


class Client:
    """One connection that is kept."""

    def __init__(self, port: int) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        self.connection.request(method, path, data, headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int]]:
    """Port and process of a server whose world is ready."""
    words = ["serve", WORLD, "--port", "0", "--data_dir", str(folder), "--queue_size", "100000"]
    log = folder.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "worldline", *words], stdout=stream, stderr=stream
        )
        try:
            while not (match := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            port = int(match[1])
            while Client(port).ask("GET", "/health")[0] != 200:
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


def resident(process: int) -> float:
    """Memory of a process, 1e6 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def made(client: Client, seed: int) -> dict[str, Any]:
    """A job that has ended."""
    status, job = client.ask("POST", "/v1/videos", {"prompt": PROMPT, "seed": seed})
    assert status == 200, job
    while job["status"] in ("queued", "in_progress"):
        time.sleep(0.01)
        _, job = client.ask("GET", f"/v1/videos/{job['id']}")
    assert job["status"] == "completed", job
    return dict(job)


def first_step(client: Client, port: int, seed: int) -> float:
    """Milliseconds from the answer to a request to the first event of a step; then cancelled."""
    events = HTTPConnection("127.0.0.1", port, timeout=60)
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


def load(port: int, requests: int, together: int, path: str) -> dict[str, Any]:
    """Requests a second, and statuses, of clients that ask at once."""
    statuses: Counter[int] = Counter()

    def ask() -> None:
        client = Client(port)
        mine = Counter(client.ask("GET", path)[0] for _ in range(requests // together))
        statuses.update(mine)

    threads = [threading.Thread(target=ask) for _ in range(together)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return {"requests_per_second": round(sum(statuses.values()) / seconds), "statuses": statuses}


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
        folder = Path(temporary, "data")
        world = worldline.load(WORLD)
        with serving(folder) as (port, process):
            client = Client(port)
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
            steps = [first_step(client, port, seed) for seed in range(10)]
            result["ms_to_the_first_step"] = round(median(steps), 1)
            before = resident(process)
            result["load"] = load(port, requests, 64, "/v1/videos?limit=20")
            result["load"]["growth_mb"] = round(resident(process) - before, 1)
        fill(folder, stored)
        with serving(folder) as (port, process):
            [job] = Client(port).ask("GET", "/v1/videos?limit=1&order=asc")[1]["data"]
            found = load(port, requests, 4, f"/v1/videos/{job['id']}")
            result["retrieve"] = {"stored": stored, **found}
    print(json.dumps(result, indent=1))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
