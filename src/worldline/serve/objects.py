"""Jobs and worlds as clients see them."""

from __future__ import annotations

from typing import Any

from worldline.serve.records import Facts, Job
from worldline.serve.settings import AppSettings

HIDDEN = "_embeddings"  # end of names of fields that name a file of the server


def video_object(job: Job, position: int | None = None, eta: float | None = None) -> dict[str, Any]:
    """A job as clients see it: OpenAI's fields, and ours."""
    shape, result, error = job.shape, job.result, None
    if job.error_code is not None:
        message = job.error_message or "The video failed."
        error = {"code": job.error_code, "message": message, "param": job.error_param}
    frames, fps = shape.get("num_frames", 0), shape.get("fps") or 0
    step = {"kind": job.step_kind, "done": job.step_done, "total": job.step_total}
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "error": error,
        "prompt": job.request.get("prompt"),
        "seconds": f"{frames / fps:.2f}".rstrip("0").rstrip(".") if fps else "0",
        "size": f"{shape.get('width', 0)}x{shape.get('height', 0)}",
        "remixed_from_video_id": job.parent_id,
        "seed": job.request.get("seed"),
        "num_frames": frames,
        "fps": fps,
        "width": shape.get("width"),
        "height": shape.get("height"),
        "started_at": _whole(job.started_at),
        "queue_position": position if job.status == "queued" else None,
        "step": step if job.step_kind else None,
        "eta_s": None if eta is None else round(eta, 1),
        "attempts": job.attempts,
        "inference_time_s": result.get("inference_time_s"),
        "stage_durations": result.get("stage_durations"),
        "peak_memory_mb": result.get("peak_memory_mb"),
        "request": request_of(job),
        "media_type": result.get("media_type", "video/mp4"),
        "metadata": job.metadata,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def request_of(job: Job) -> dict[str, Any]:
    """Fields that, posted again, make the same video."""
    fields = {name: v for name, v in job.request.items() if v is not None}
    request = {"model": job.model, **{n: v for n, v in fields.items() if not n.endswith(HIDDEN)}}
    if job.input_kind is not None:
        request["input_reference"] = {"input_of": job.id}
    return request


def model_object(
    name: str, facts: Facts | None, created: float, settings: AppSettings
) -> dict[str, Any]:
    """A world as clients see it; what it takes is known once it is loaded."""
    world: dict[str, Any] = {"state": "loading"}
    if facts is not None:
        limits = dict(facts.limits)
        for limit, value in (
            ("max_frames", settings.max_frames),
            ("max_pixels", settings.max_pixels),
        ):
            if value is not None:
                limits[limit] = min(value, limits.get(limit) or value)
        defaults = facts.defaults
        size = defaults.get("width"), defaults.get("height")
        world = {
            "state": "ready",
            "family": facts.family,
            "inputs": list(facts.inputs),
            "sizes": [f"{w}x{h}" for w, h in limits.get("sizes") or [size]],
            "size": {
                "default": f"{size[0]}x{size[1]}",
                "multiple": limits.get("size_multiple"),  # None: one of `sizes` alone
                "max_width": limits.get("max_width", size[0]),
                "max_height": limits.get("max_height", size[1]),
            },
            "frames": {
                "default": defaults.get("num_frames", defaults.get("num_video_frames")),
                "multiple": limits.get("frames_multiple", 1),
                "maximum": limits.get("max_frames"),
            },
            "fps": defaults.get("fps"),
            "fields": {n: s for n, s in facts.fields.items() if not n.endswith(HIDDEN)},
            "defaults": dict(defaults),
            "limits": limits,
            "guardrails": facts.guardrails,
            "previews": facts.previews,
            "max_batch_size": facts.max_batch_size,
        }
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "worldline",
        "worldline": world,
    }
