"""Metrics in Prometheus' text format; a registry of its own for each server.

No label holds an id, a prompt or a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worldline.serve.jobs import Queue
from worldline.serve.store import Store

SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)
SIZES = (1, 2, 4, 8, 16, 32, 64)
_STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")


class Metrics:
    """What a server counts and measures."""

    def __init__(self, queue: Queue, store: Store, version: str) -> None:
        disable_created_metrics()  # gauges of when each series began, as many as there are series
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"worldline_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: Any = SECONDS) -> Histogram:
            return Histogram(f"worldline_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("http_requests", "Answers.", "route", "method", "code")
        self.finished = counter("jobs_finished", "Jobs that ended.", "world", "status")
        self.failures = counter("job_failures", "Jobs that failed.", "world", "code")
        self.refusals = counter("guardrail_refusals", "Refusals by guardrails.", "stage")
        self.frames = counter("frames", "Frames of completed videos.", "world")
        self.restarts = counter("worker_restarts", "Workers that were replaced.", "worker")
        self.queue_seconds = histogram("queue_seconds", "From created to begun.", "world")
        self.job_seconds = histogram("job_seconds", "From begun to completed.", "world")
        self.stage_seconds = histogram("stage_seconds", "Stages of videos.", "world", "stage")
        self.step_seconds = histogram("step_seconds", "Between two steps.", "world", "stage")
        self.cancel_seconds = histogram("cancel_seconds", "From a cancel to the end of the job.")
        self.batch_size = histogram(
            "batch_size", "Videos that are made together.", "world", buckets=SIZES
        )
        self.load_seconds = Gauge(
            "worldline_world_load_seconds", "Last loading of a world.", ["world"], registry=registry
        )
        build = Gauge("worldline_build_info", "Release.", ["version"], registry=registry)
        build.labels(version).set(1)
        registry.register(_Present(queue, store))
        self._observers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "started": lambda f: self.queue_seconds.labels(f["world"]).observe(f["queue_seconds"]),
            "batch": lambda f: self.batch_size.labels(f["world"]).observe(f["size"]),
            "step": lambda f: self.step_seconds.labels(f["world"], f["stage"]).observe(
                f["seconds"]
            ),
            "stage": lambda f: self.stage_seconds.labels(f["world"], f["stage"]).observe(
                f["seconds"]
            ),
            "finished": self._finish,
            "cancel": lambda f: self.cancel_seconds.observe(f["seconds"]),
            "loaded": lambda f: self.load_seconds.labels(f["world"]).set(f["seconds"]),
            "restart": lambda f: self.restarts.labels(f["worker"]).inc(),
        }
        queue.observers.append(self.observe)

    def observe(self, name: str, facts: Mapping[str, Any]) -> None:
        """Count what happened in the queue."""
        if observer := self._observers.get(name):
            observer(facts)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answer; methods of a client's own making are one."""
        known = method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
        self.requests.labels(route, method if known else "other", status).inc()

    def _finish(self, facts: Mapping[str, Any]) -> None:
        world, status = facts["world"], facts["status"]
        self.finished.labels(world, status).inc()
        if status == "failed":
            code = facts.get("code") or "internal_error"
            self.failures.labels(world, code).inc()
            if code == "guardrail_refused":
                self.refusals.labels("video" if facts.get("param") != "prompt" else "prompt").inc()
        if status == "completed":
            self.frames.labels(world).inc(facts.get("frames") or 0)
            if (seconds := facts.get("job_seconds")) is not None:
                self.job_seconds.labels(world).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Present(Collector):
    """What is true when it is asked for: jobs, workers, the disk."""

    def __init__(self, queue: Queue, store: Store) -> None:
        self.queue, self.store = queue, store

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("worldline_jobs", "Jobs.", labels=["world", "status"])
        counts = self.store.counts()
        for world in self.queue.worlds:
            for status in _STATUSES:
                jobs.add_metric([world, status], counts.get((world, status), 0))
        yield jobs
        up = GaugeMetricFamily("worldline_worker_up", "Whether it answers.", labels=["worker"])
        peak = GaugeMetricFamily(
            "worldline_gpu_peak_memory_bytes", "Peak memory of its device.", labels=["worker"]
        )
        for slot in self.queue.pool.all():
            up.add_metric([slot.name], float(slot.is_alive))
            peak.add_metric([slot.name], slot.worker.peak_bytes)
        yield up
        yield peak
        used, free = self.store.used_bytes, self.store.free_bytes
        yield GaugeMetricFamily("worldline_storage_bytes", "Inputs and videos.", value=used)
        yield GaugeMetricFamily("worldline_storage_free_bytes", "Free disk.", value=free)

    def describe(self) -> Iterable[Metric]:
        return []
