"""Many requests at once, to `worldline serve` itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from .served import Served, ask_all

pytestmark = pytest.mark.slow

REQUESTS, TOGETHER = 10_000, 64


def test_ten_thousand_requests(tmp_path: Path) -> None:
    """None is answered by 5xx, all are answered, and memory stays."""
    server = Served(tmp_path, "tiny-Cosmos-Predict2.5-2B")
    try:
        server.until_ready()
        absent = f"/v1/videos/video_{'0' * 32}"
        asked = [
            ("GET", "/v1/videos?limit=20", None),
            ("GET", "/v1/models", None),
            ("GET", absent, None),
            ("POST", "/v1/videos", {"prompt": "a ball", "num_steps": -1}),
            ("POST", f"{absent}/cancel", None),
            ("GET", "/metrics", None),
            ("GET", "/", None),
        ]
        ask_all(server.url, asked, REQUESTS // 5, TOGETHER)
        before = server.resident()
        statuses = ask_all(server.url, asked, REQUESTS, TOGETHER)
        assert sum(statuses.values()) == REQUESTS
        assert set(statuses) == {200, 400, 404}
        assert server.resident() - before < 50
    finally:
        server.stop()
