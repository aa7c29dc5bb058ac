"""Recovery of a store after its server ended, however it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from worldline.serve.records import Job, Status
from worldline.serve.store import RESULTS, Store

logger = logging.getLogger(__name__)

INTERRUPTED = "The server ended while it made the video; post the request again."
_LOST = "Files of the video are gone from the server."


def recover(
    store: Store, worlds: Collection[str], attempts: int, keep_seconds: float | None = None
) -> list[Job]:
    """Make rows and files agree; jobs to make, in order: first those that were interrupted.

    A job whose files are whole is completed. One that was begun `attempts` times has failed, and
    one of a world that is not among `worlds`, for which no worker would ever ask. Those that end
    expire after `keep_seconds`; None: never.
    """
    interrupted, queued = [], []

    def end(job: Job, status: Status, at: float, **columns: Any) -> None:
        expires = None if keep_seconds is None else at + keep_seconds
        store.update(job.id, status=status, completed_at=at, expires_at=expires, **columns)

    def fail(job: Job, code: str, message: str, param: str | None = None) -> None:
        error = {"error_code": code, "error_message": message, "error_param": param}
        end(job, "failed", time.time(), **error)

    for job in store.live():
        path = store.input_path(job)
        if job.status == "in_progress" and (report := store.report(job)) is not None:
            ended = (store.folder(job.id) / "report.json").stat().st_mtime
            if store.seal(job):
                end(job, "completed", ended, progress=100, result=result_of(report))
                continue
        if path is not None and not path.is_file():
            logger.error("%s: its input is gone; it is failed", job.id)
            fail(job, "internal_error", _LOST)
        elif job.model not in worlds:
            logger.warning("%s: %s is not served any more; it is failed", job.id, job.model)
            fail(job, "model_not_found", absent(job.model), "model")
        elif job.status == "queued":
            queued.append(job)
        elif job.attempts >= attempts:
            fail(job, "interrupted", INTERRUPTED)
        else:
            interrupted.append(store.update(job.id, status="queued", started_at=None))
    for id in store.ids("completed"):
        folder = store.folder(id)
        if missing := [name for name in RESULTS if not (folder / name).is_file()]:
            logger.error("%s: %s is gone; it is failed", id, missing[0])
            fail(store.get(id, None), "internal_error", _LOST)
    return interrupted + queued


def absent(model: str) -> str:
    """Message of a job of a world that the server has no more."""
    return f"The server has no world {model!r:.80} any more; post the request with another model."


def result_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker would have reported of a video, by the report beside it."""
    run = report.get("run")
    stages = run.get("stages", []) if isinstance(run, Mapping) else []
    seconds = {stage["name"]: stage["seconds"] for stage in stages}
    result: dict[str, Any] = {"media_type": "video/mp4", "stage_durations": seconds}
    result["inference_time_s"] = sum(seconds.values()) if seconds else None
    peak = run.get("peak_gb") if isinstance(run, Mapping) else None
    return result | {"peak_memory_mb": None if peak is None else peak * 1000}
