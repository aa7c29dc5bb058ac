"""What the parts of the server exchange: jobs, a world's facts, the interface of a worker."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})
ENDS = ("done", "failed", "cancelled")  # events after which a task has ended
MediaKind = Literal["image", "video"]
INPUT = "input_reference"  # what a client calls the input


def new_id() -> str:
    """`video_` and a UUID of version 7 in hex: ids of one server sort by time.

    Of RFC 9562, section 6.2, method 3: 12 bits hold the fraction of the millisecond.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    version, variant, fraction = 0x7, 0x2, (nanoseconds << 12) // 1_000_000
    value = milliseconds << 80 | version << 76 | fraction << 64 | variant << 62
    return f"video_{value | secrets.randbits(62):032x}"


@dataclass(frozen=True)
class Job:
    """One video to make, as the store keeps it.

    Attributes:
        owner: 16 hex digits of the key's SHA-256; "" without keys.
        model: name of the world.
        request: every resolved field of the family's request, by name, as JSON; no input.
        shape: num_frames, height, width and fps of the video.
        batch_key: jobs of one key can be made in one batch; None: alone.
        input_kind: of the input file; None without.
        input_suffix: such as ".mp4", by the first bytes.
        created_at, started_at, completed_at, expires_at: Unix time, seconds.
        progress: 0 to 99, 100 when completed.
        step_kind, step_done, step_total: of the last step, as of `worldline.step.Step`.
        attempts: times that a worker began it.
        result: of a completed one: inference_time_s, stage_durations, peak_memory_mb, media_type.
        parent_id: of the job that it remixes or continues.
        body_sha256: hash of what was posted, for its idempotency key.
        metadata: strings of the client.
    """

    id: str
    model: str
    request: Mapping[str, Any]
    shape: Mapping[str, Any]
    owner: str = ""
    status: Status = "queued"
    batch_key: str | None = None
    input_kind: MediaKind | None = None
    input_suffix: str = ""
    input_sha256: str | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    progress: int = 0
    step_kind: str = ""
    step_done: int = 0
    step_total: int = 0
    attempts: int = 0
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    parent_id: str | None = None
    idempotency_key: str | None = None
    body_sha256: str | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def seed(self) -> int:
        seed: int = self.request["seed"]
        return seed


@dataclass(frozen=True)
class Facts:
    """A loaded world, as its worker describes it: what `/v1/models` shows and forms are made of.

    Attributes:
        name: of the world.
        family: name of its family.
        inputs: of "none", "image" and "video" those that it takes.
        fields: JSON schema of each field of its requests, by name, defaults of the model included.
        limits: numbers that bound requests: max_frames, max_pixels, frames_multiple and the like.
        defaults: num_frames, height, width, fps, num_steps, guidance… of a request that states
            nothing.
        guardrails: whether prompts and videos are checked.
        previews: whether steps carry previews.
        max_batch_size: clips that are made in one batch.
        load_seconds: from start to ready.
    """

    name: str
    family: str
    inputs: Sequence[str]
    fields: Mapping[str, Mapping[str, Any]]
    limits: Mapping[str, Any]
    defaults: Mapping[str, Any]
    guardrails: bool
    previews: bool
    max_batch_size: int
    load_seconds: float


@dataclass(frozen=True)
class Checked:
    """A request that a world can make.

    Attributes:
        request, shape, batch_key: as of `Job`.
    """

    request: Mapping[str, Any]
    shape: Mapping[str, Any]
    batch_key: str | None


@dataclass(frozen=True)
class Task:
    """A job on its way to a worker.

    Attributes:
        input: path of the input file; None without.
        folder: where video.mp4, thumbnail.jpg and report.json go, each whole or absent.
    """

    id: str
    request: Mapping[str, Any]
    input: str | None
    input_kind: MediaKind | None
    folder: str


class WorkerDied(Exception):
    """A worker process ended, or was killed, before its jobs did."""


class Worker(Protocol):
    """A process that owns a world, or several, seen from the API process; local or Ray actors.

    Attributes:
        name: such as "tiny-Cosmos-Predict1-4B/0".
        state: loading, ready (a job may begin), busy, dead.
        facts: None until it was ready once.
        heartbeat: `time.monotonic()` of the last sign of life.
        peak_bytes: peak memory of its GPU, or of the process; of several, the largest.
    """

    name: str
    world: str
    state: Literal["loading", "ready", "busy", "dead"]
    facts: Facts | None
    heartbeat: float
    peak_bytes: int

    async def start(self) -> None:
        """Start the process and wait until its world is loaded.

        Raises:
            WorkerDied: it cannot load; the message holds the reason.
        """

    async def check(
        self, stated: Mapping[str, Any], input: str | None, kind: MediaKind | None
    ) -> Checked:
        """Check what a client stated, also while a job runs.

        Raises:
            ApiError: invalid_value, unknown_parameter, unreadable_media….
            WorkerDied: it ended meanwhile.
        """

    def run(self, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
        """Make the videos of one batch; events, each with "event" and "id" of its task.

        begun · step (kind, done, total) · preview (done, total, jpeg_base64) · done (result: as of
        `Job`) · failed (code, message, param) · cancelled · {"event": "free"} once the next batch
        may begin, while files of this one may still be written. Ends when all tasks have ended.

        Raises:
            WorkerDied: it ended meanwhile.
        """

    def cancel(self, id: str) -> None:
        """Stop a task at its next step; its last event is cancelled, or done if it was quicker."""

    async def stop(self, *, kill: bool = False) -> None:
        """End the process: after the current step, or at once."""
