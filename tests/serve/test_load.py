"""Many requests at once, to `worldline serve` itself."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.running import Served

pytestmark = pytest.mark.slow

WORLD = "tiny-Cosmos-Predict2.5-2B"
REQUESTS, TOGETHER = 10_000, 64


def resident(process: int) -> float:
    """Memory of a process, 1e6 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def ask_all(address: str, paths: Sequence[tuple[str, str, object]], count: int) -> Counter[int]:
    """Statuses of `count` requests, of TOGETHER clients that take the paths in turn."""
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def ask(first: int) -> None:
        connection = HTTPConnection(str(urlsplit(address).netloc), timeout=60)
        mine: Counter[int] = Counter()
        for number in range(first, count, TOGETHER):
            method, path, body = paths[number % len(paths)]
            data = None if body is None else json.dumps(body)
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            answer.read()
            mine[answer.status] += 1
        connection.close()
        with lock:
            statuses.update(mine)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(TOGETHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def test_ten_thousand_requests(tmp_path: Path) -> None:
    """None is answered by 5xx, all are answered, and memory stays."""
    server = Served(tmp_path, WORLD)
    try:
        while set(ask_all(server.url, [("GET", "/health", None)], TOGETHER)) != {200}:
            pass
        absent = f"/v1/videos/video_{'0' * 32}"
        paths = [
            ("GET", "/v1/videos?limit=20", None),
            ("GET", "/v1/models", None),
            ("GET", absent, None),
            ("POST", "/v1/videos", {"prompt": "a ball", "num_steps": -1}),
            ("POST", f"{absent}/cancel", None),
            ("GET", "/metrics", None),
            ("GET", "/", None),
        ]
        ask_all(server.url, paths, REQUESTS // 5)
        before = resident(server.process.pid)
        statuses = ask_all(server.url, paths, REQUESTS)
        assert sum(statuses.values()) == REQUESTS
        assert set(statuses) == {200, 400, 404}
        assert resident(server.process.pid) - before < 50
    finally:
        server.stop()
