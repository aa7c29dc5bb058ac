"""Metrics: they parse, count what was done, and hold nothing of a client."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from .fake_worker import FakeWorker, Script
from .running import Running, running

NAMES = {
    *("http_requests", "jobs", "jobs_finished", "job_failures", "guardrail_refusals"),
    *("queue_seconds", "job_seconds", "stage_seconds", "step_seconds", "batch_size", "frames"),
    *("cancel_seconds", "worker_up", "worker_restarts", "gpu_peak_memory_bytes"),
    *("world_load_seconds", "storage_bytes", "storage_free_bytes", "build_info"),
}


def samples(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = server.ask("GET", "/metrics").content.decode()
    assert "secret" not in text
    assert "video_" not in text
    assert "_created" not in text
    families = list(text_string_to_metric_families(text))
    assert {family.name for family in families} >= {f"worldline_{name}" for name in NAMES}
    return {
        (sample.name.removeprefix("worldline_"), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_equal_what_was_done(tmp_path: Path) -> None:
    script = Script(seconds=0.001)

    def make(world: str, name: str) -> FakeWorker:
        return FakeWorker(world, name, script)

    with running(tmp_path / "data", {"fake": [make("fake", "fake/0")]}, make) as server:
        for prompt in ("a secret ball", "another secret", "refuse the secret", "break the secret"):
            answer = server.ask("POST", "/v1/videos", {"prompt": prompt, "num_frames": 5})
            server.wait(answer.json()["id"])
        assert server.ask("GET", "/secret/path").status == 404
        assert server.ask("SECRET", "/v1/videos").status == 405
        found = samples(server)

        def value(name: str, **labels: str) -> float:
            return found[name, frozenset(labels.items())]

        world = {"world": "fake"}
        for status, number in (("completed", 2), ("failed", 2)):
            assert value("jobs", **world, status=status) == number
            assert value("jobs_finished_total", **world, status=status) == number
        assert value("job_failures_total", **world, code="guardrail_refused") == 1
        assert value("job_failures_total", **world, code="internal_error") == 1
        assert value("guardrail_refusals_total", stage="prompt") == 1
        assert value("frames_total", **world) == 10
        assert value("job_seconds_count", **world) == 2
        assert value("queue_seconds_count", **world) == 4
        assert value("batch_size_sum", **world) == 4
        assert value("worker_up", worker="fake/0") == 1
        assert value("http_requests_total", route="/v1/videos", method="POST", code="200") == 4
        assert value("http_requests_total", route="other", method="GET", code="404") == 1
