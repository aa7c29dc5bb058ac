"""A worker without a world: its jobs do what their prompts ask for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from worldline.files import replacing
from worldline.serve.errors import ApiError
from worldline.serve.records import Checked, Facts, MediaKind, Task, WorkerDied

VIDEO = b"\0\0\0\x18ftypmp42 not a video"
JPEG = b"\xff\xd8\xff\xe0 not a picture"


@dataclass
class Script:
    """What fake workers of one world do; shared by them, and may change while they run.

    The word that a prompt begins with decides about its job:
    die: the process ends at its second step, each time; die_once: the first time alone ·
    hang: no step after the first, deaf to `cancel` · deaf: as any, but deaf to `cancel` ·
    refuse: guardrail_refused · break: internal_error · memory: out_of_memory, alone too ·
    unfinished: `done` though report.json is absent.

    Attributes:
        steps: of kind `kind`, after one of "text"; then one of "decode" while files are written.
        seconds: of each.
        load_seconds: until ready.
        load_failures: number of loads that fail before one works.
        largest_batch: more clips at once are out of memory.
        deaf_heart: whether heartbeats end.
        write: makes the files of a task; None: a few bytes each.
        log: what happened, in order: ("load", name), ("run", ids), ("check", name)….
    """

    steps: int = 4
    seconds: float = 0.01
    kind: str = "denoise"
    load_seconds: float = 0.0
    load_failures: int = 0
    max_batch_size: int = 1
    largest_batch: int = 1000
    guardrails: bool = False
    previews: bool = False
    inputs: Sequence[str] = ("none", "image", "video")
    deaf_heart: bool = False
    write: Any = None
    log: list[tuple[str, Any]] = field(default_factory=list)
    died: set[str] = field(default_factory=set)


class FakeWorker:
    """Implements `worldline.serve.records.Worker` inside of the test's own process."""

    def __init__(self, world: str, name: str, script: Script | None = None) -> None:
        self.world, self.name = world, name
        self.script = script or Script()
        self.state: Literal["loading", "ready", "busy", "dead"] = "loading"
        self.facts: Facts | None = None
        self._heartbeat = time.monotonic()
        self.peak_bytes = 1_000_000
        self._cancelled: set[str] = set()
        self._dead = asyncio.Event()

    @property
    def heartbeat(self) -> float:
        if not self.script.deaf_heart and self.state != "dead":
            self._heartbeat = time.monotonic()
        return self._heartbeat

    async def start(self) -> None:
        self.script.log.append(("load", self.name))
        await self._sleep(self.script.load_seconds)
        if self.script.load_failures > 0:
            self.script.load_failures -= 1
            self.state = "dead"
            raise WorkerDied(f"{self.world}: its weights are absent")
        self.facts = facts(self.world, self.script)
        self.state = "ready"

    async def check(
        self, stated: Mapping[str, Any], input: str | None, kind: MediaKind | None
    ) -> Checked:
        self.script.log.append(("check", self.name))
        if self.state == "dead":
            raise WorkerDied(self.name)
        await asyncio.sleep(0)
        known = facts(self.world, self.script).fields
        for name, value in stated.items():
            if name not in known:
                raise ApiError("unknown_parameter", f"{name}: there is no such field.", name)
            if known[name]["type"] == "integer" and not isinstance(value, int):
                raise ApiError("invalid_value", f"{name}: {value!r:.20} is not an integer.", name)
        request = {name: entry.get("default") for name, entry in known.items()} | dict(stated)
        if request["seed"] is None:
            request["seed"] = 1234
        shape = {name: request[name] for name in ("height", "width", "fps")}
        shape["num_frames"] = request["num_video_frames"]
        together = self.script.max_batch_size > 1
        return Checked(request, shape, f"{kind} {shape['num_frames']}" if together else None)

    async def run(self, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
        """Make videos in step; see `Script` for what prompts ask for."""
        self.script.log.append(("run", tuple(task.id for task in tasks)))
        self.state = "busy"
        started, open_ = time.monotonic(), list(tasks)
        for task in tasks:
            yield {"event": "begun", "id": task.id}
        kinds = [("text", 1), (self.script.kind, self.script.steps)]
        for kind, total in kinds:
            for done in range(total):
                for task in list(open_):
                    if event := await self._incident(task, kind, done, len(tasks)):
                        open_.remove(task)
                        yield event
                if not open_:
                    break
                await self._sleep(self.script.seconds)
                for task in open_:
                    yield {
                        "event": "step",
                        "id": task.id,
                        "kind": kind,
                        "done": done + 1,
                        "total": total,
                    }
                    if self.script.previews:
                        jpeg = b64encode(JPEG).decode()
                        preview = {"done": done + 1, "total": total, "jpeg_base64": jpeg}
                        yield {"event": "preview", "id": task.id, **preview}
        self.state = "ready"
        yield {"event": "free"}
        for task in open_:
            yield {"event": "step", "id": task.id, "kind": "decode", "done": 0, "total": 1}
            try:
                self._write(task)
            except OSError:
                words = {"code": "disk_full", "message": "The disk is full.", "param": None}
                yield {"event": "failed", "id": task.id, **words}
                continue
            await self._sleep(0)
            result = {
                "inference_time_s": time.monotonic() - started,
                "stage_durations": {"text": self.script.seconds},
                "peak_memory_mb": 1.0,
                "media_type": "video/mp4",
            }
            yield {"event": "done", "id": task.id, "result": result}

    def cancel(self, id: str) -> None:
        self._cancelled.add(id)

    async def stop(self, *, kill: bool = False) -> None:
        self.script.log.append(("kill" if kill else "stop", self.name))
        self.die()

    def die(self) -> None:
        """End the process, as kill -9 does."""
        self.state = "dead"
        self._dead.set()

    async def _incident(
        self, task: Task, kind: str, done: int, batch: int
    ) -> dict[str, Any] | None:
        """What ends a task before this step, if anything does."""
        word = str(task.request.get("prompt") or "").partition(" ")[0]
        if word == "hang" and kind != "text":
            await self._sleep(3600)
        if task.id in self._cancelled and word not in ("hang", "deaf"):
            return {"event": "cancelled", "id": task.id}
        if kind == "text":
            return None
        if done == 1 and (
            word == "die" or (word == "die_once" and task.id not in self.script.died)
        ):
            self.script.died.add(task.id)
            self.die()
            await self._sleep(0)
        failures = {
            "refuse": ("guardrail_refused", "A guardrail refused the prompt.", "prompt"),
            "break": ("internal_error", "The video could not be made.", None),
            "memory": ("out_of_memory", "The device has too little memory.", None),
        }
        if word not in failures and batch > self.script.largest_batch:
            word = "memory"
        if word not in failures:
            return None
        code, message, param = failures[word]
        return {"event": "failed", "id": task.id, "code": code, "message": message, "param": param}

    async def _sleep(self, seconds: float) -> None:
        """Wait, and end at once where the process does."""
        if not self._dead.is_set():
            try:
                await asyncio.wait_for(self._dead.wait(), max(seconds, 1e-4))
            except TimeoutError:
                return
        raise WorkerDied(f"{self.name} ended")

    def _write(self, task: Task) -> None:
        folder = Path(task.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.script.write is not None:
            self.script.write(task)
            return
        video = VIDEO + task.id.encode()
        report = {"file_sha256": hashlib.sha256(video).hexdigest(), "request": dict(task.request)}
        files = {
            "video.mp4": video,
            "thumbnail.jpg": JPEG,
            "report.json": json.dumps(report).encode(),
        }
        if str(task.request.get("prompt")).startswith("unfinished"):
            del files["report.json"]
        for name, data in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(data)


def facts(world: str, script: Script) -> Facts:
    """Facts of a fake world."""
    fields: dict[str, dict[str, Any]] = {
        "prompt": {"type": "string", "description": "What the video shows.", "default": None},
        "negative_prompt": {"type": "string", "description": "What to avoid.", "default": None},
        "num_video_frames": {"type": "integer", "minimum": 1, "maximum": 121, "default": 9},
        "num_steps": {"type": "integer", "minimum": 1, "maximum": 1000, "default": script.steps},
        "guidance": {"type": "number", "minimum": 0, "maximum": 100, "default": 7.0},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": None},
        "fps": {"type": "number", "minimum": 1, "maximum": 240, "default": 24.0},
        "height": {"type": "integer", "minimum": 16, "default": 64},
        "width": {"type": "integer", "minimum": 16, "default": 96},
        "num_input_frames": {"type": "integer", "minimum": 0, "default": 1},
        "preview_every": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 0},
    }
    defaults = {"num_frames": 9, "height": 64, "width": 96, "fps": 24.0, "num_steps": script.steps}
    return Facts(
        name=world,
        family="fake",
        inputs=script.inputs,
        fields=fields,
        limits={"max_frames": 121, "max_pixels": 1 << 20, "frames_multiple": 4},
        defaults=defaults,
        guardrails=script.guardrails,
        previews=script.previews,
        max_batch_size=script.max_batch_size,
        load_seconds=script.load_seconds,
    )
