"""Batches of jobs in a worker: steps, previews, cancelling, and the files of each video."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from worldline.errors import (
    Error,
    GuardrailRefusal,
    InputError,
    InsufficientMemoryError,
    NonFiniteError,
    is_out_of_memory,
)
from worldline.guards import check_frames
from worldline.parallel.job import share
from worldline.serve.checks import LOSSLESS, refusal, scrub
from worldline.serve.errors import NEUTRAL, unkept
from worldline.serve.records import INPUT, Task
from worldline.step import Step, Video
from worldline.video.read import Frames
from worldline.video.write import encoding_of, write_frames, writing_all
from worldline.world import Job, World

logger = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], None]

VIDEO, THUMBNAIL, REPORT = "video.mp4", "thumbnail.jpg", "report.json"
EXACT = "lossless.mkv"  # the same frames, bit for bit, where a client asked for them
PREVIEW = 320  # pixels of the longer side of a thumbnail, and of the width of a preview
_STEP_S, _PREVIEW_S = 0.1, 1.0  # least seconds between two events
_SHARED = frozenset({"text", "encode", "tokens"})  # steps that the videos of a batch have together
_COMMON = frozenset({"text", "encode", "tokens", "denoise"})  # steps that all processes have


class DeviceLost(Exception):
    """The device fails every call from now on: the process must be replaced."""


class Maker:
    """The world's jobs, one batch after another; files are written beside the next batch.

    Each of several processes of a world has one, and all run the same batches. The first knows and
    ends tasks, and decides for all where to go on; the others send nothing.

    Attributes:
        known: ids of tasks that have not ended.
        cancelled: ids of those that are to end.
        stopping: whether nothing more is to be made.
    """

    def __init__(self, world: World, send: Send) -> None:
        self.world, self.send = world, send
        self.known: set[str] = set()
        self.cancelled: set[str] = set()
        self.stopping = False
        self.batch = 0
        self._lock = Lock()
        self._files = ThreadPoolExecutor(1, "files")
        self._saves: list[Future[None]] = []
        self._handed: set[str] = set()  # ids whose files are being written
        self._sent: dict[str, tuple[str, float, float]] = {}  # kind, times of step and preview

    def add(self, tasks: Sequence[Task]) -> None:
        """Make ids known; before `cancel` may be called."""
        with self._lock:
            self.known |= {task.id for task in tasks}

    def cancel(self, id: str) -> None:
        """End a task at its next step; from any thread."""
        with self._lock:
            if id in self.known:
                self.cancelled.add(id)

    def run(self, batch: int, tasks: Sequence[Task]) -> None:
        """Make the videos of a batch, or of parts of it where memory is too small.

        Raises:
            DeviceLost: no more can be made.
        """
        self.batch, earlier, self._saves = batch, self._saves, []
        together = self.world.opened.family.generate_together is not None
        size = self.world.parts.compute.batch_size if together else 1
        groups = [[*tasks[at : at + size]] for at in range(0, len(tasks), size)]
        while groups:
            group = groups.pop(0)
            try:
                exhausted = self._make(group)
            except Exception as error:
                if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                    raise DeviceLost from error
                logger.exception("a batch of %d failed", len(group))
                exhausted = False
                for task in self._unmade(group):
                    self._fail(task, "internal_error", NEUTRAL)
            if exhausted:
                self._free_memory()
                rest = self._unmade(group)
                half = (len(rest) + 1) // 2
                logger.warning("out of memory in a batch of %d", len(group))
                if len(group) == 1:
                    self._fail(group[0], "out_of_memory", self._too_large())
                else:
                    groups[:0] = [part for part in (rest[:half], rest[half:]) if part]
        if not self.world.processes.first:
            self._sent.clear()  # it ends no tasks
        wait(earlier)  # the frames of two batches at most are held
        self._emit({"event": "free"})

    def finish(self) -> None:
        """Wait for files that are being written."""
        self._files.shutdown()

    def _too_large(self) -> str:
        return (
            f"{self.world.name}: the video needs more memory than the device has; make it shorter "
            "or smaller"
        )

    def _free_memory(self) -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _end(self, task: Task, event: Mapping[str, Any], batch: int | None = None) -> None:
        with self._lock:
            if task.id not in self.known:
                return
            self.known.discard(task.id)
            self.cancelled.discard(task.id)
            self._handed.discard(task.id)
        self._sent.pop(task.id, None)
        self._emit({**event, "id": task.id}, batch)

    def _fail(
        self,
        task: Task,
        code: str,
        message: str,
        param: str | None = None,
        batch: int | None = None,
    ) -> None:
        self._end(
            task, {"event": "failed", "code": code, "message": message, "param": param}, batch
        )

    def _emit(self, event: dict[str, Any], batch: int | None = None) -> None:
        self.send({**event, "batch": self.batch if batch is None else batch})

    def _make(self, group: Sequence[Task]) -> bool:
        """Make videos together; whether memory was too small, for those that have not ended."""
        tasks, jobs = list[Task](), list[Job]()
        for task in group:
            if not self._unmade([task]):
                continue
            if task.id not in self._sent:  # else memory was too small at first
                self._sent[task.id] = "", 0.0, 0.0
                self._emit({"event": "begun", "id": task.id})
            if (job := self._prepare(task)) is not None:
                tasks.append(task)
                jobs.append(job)
        if not jobs:
            return False
        begun, mesh = time.monotonic(), self.world.parts.compute.mesh
        several = self.world.processes.count > 1
        try:
            if len(jobs) > 1:
                check = partial(check_frames, self.world.opened, jobs[0].request, len(jobs))
                self.world.processes.together(check)
            # closed: networks leave the device
            with closing(cast(Generator[Any, None, None], self.world.run_batch(jobs))) as steps:
                for index, step in steps:
                    task = tasks[index]
                    if step.video is None:
                        self._report(tasks if step.kind in _SHARED else [task], step)
                    elif task.id in self.known and task.id not in self.cancelled:
                        self._handed.add(task.id)
                        seconds = time.monotonic() - begun
                        save = partial(self._save, self.batch, task, step.video, seconds)
                        self._saves.append(self._files.submit(save))
                    if several and step.kind not in _COMMON:
                        continue  # others may not come here
                    if not self._unmade(tasks):
                        return False
        except InsufficientMemoryError as error:
            if len(group) > 1:
                return True
            self._fail(tasks[0], "out_of_memory", scrub(self.world, str(error), tasks[0].input))
        except Error as error:
            share(mesh, error)
            failures = error.failures or {0: error}
            for index, failure in failures.items():
                if tasks[index].id not in self._handed:
                    self._fail_by(tasks[index], failure)
        except Exception as error:
            share(mesh, error)
            if not is_out_of_memory(error):
                raise
            return True
        for task in self._unmade(tasks):
            self._fail(task, "internal_error", NEUTRAL)
        return False

    def _unmade(self, tasks: Sequence[Task]) -> list[Task]:
        """Tasks whose video is still to be made; those that are cancelled end here."""

        def sort_out() -> set[str]:
            waiting = set[str]()
            for task in tasks if not self.stopping else ():
                if task.id not in self.known or task.id in self._handed:
                    continue
                if task.id in self.cancelled:
                    self._end(task, {"event": "cancelled"})
                else:
                    waiting.add(task.id)
            return waiting

        waiting = self.world.processes.once(sort_out)
        return [task for task in tasks if task.id in waiting]

    def _prepare(self, task: Task) -> Job | None:
        """The job of a task; None where it failed."""
        opened, family = self.world.opened, self.world.opened.family
        path = None if task.input is None else Path(task.input)
        try:
            stated = {name: v for name, v in task.request.items() if name != LOSSLESS}
            request = family.request.make(stated, opened.defaults, task.input_kind)
            request = family.check(opened, request)
        except InputError as error:
            answer = refusal(self.world, error, task.request, task.input_kind, path)
            self._fail(task, answer.code, answer.message, answer.param)
            return None
        try:
            return self.world.prepare(path, {}, input_type=task.input_kind, request=request)
        except InsufficientMemoryError as error:
            self._fail(task, "out_of_memory", scrub(self.world, str(error), path))
        except InputError as error:
            self._fail(task, "unreadable_media", scrub(self.world, str(error), path), INPUT)
        except Exception as error:
            logger.exception("a job cannot be prepared")
            memory = is_out_of_memory(error)
            self._fail(task, "out_of_memory" if memory else "internal_error", NEUTRAL)
        return None

    def _fail_by(self, task: Task, error: Error) -> None:
        """End a task by the error of its video."""
        message, param = scrub(self.world, str(error), task.input), None
        if isinstance(error, GuardrailRefusal):
            code, param = "guardrail_refused", "prompt" if error.stage == "prompt" else None
            message = f"A guardrail refused the {error.stage}."
        elif isinstance(error, NonFiniteError):
            code = "internal_error"
        elif isinstance(error, InputError):
            code = "invalid_value"
        else:
            logger.error("a video failed: %s", error)
            code, message = "internal_error", NEUTRAL
        self._fail(task, code, message, param)

    def _report(self, tasks: Sequence[Task], step: Step) -> None:
        """Send a step to those whom it concerns, at most as often as is of use."""
        now, whole = time.monotonic(), step.done == step.total
        for task in tasks:
            if task.id in self._handed or task.id not in self.known:
                continue
            kind, stepped, previewed = self._sent.get(task.id, ("", 0.0, 0.0))
            facts = {"id": task.id, "done": step.done, "total": step.total}
            if step.kind != kind or whole or now - stepped >= _STEP_S:
                self._emit({"event": "step", "kind": step.kind, **facts})
                kind, stepped = step.kind, now
            frames = step.preview if step.preview is not None else step.frames
            if frames is not None and len(frames) and now - previewed >= _PREVIEW_S:
                picture = b64encode(jpeg(frames[-1], PREVIEW)).decode()
                self._emit({"event": "preview", **facts, "jpeg_base64": picture})
                previewed = now
            self._sent[task.id] = kind, stepped, previewed

    def _save(self, batch: int, task: Task, video: Video, seconds: float) -> None:
        """Write the files of a video and end its task; in the thread of files."""
        started = time.monotonic()
        try:
            report, sha256 = write_files(
                Path(task.folder), video, lambda text: scrub(self.world, text, task.input), task
            )
        except Exception as error:
            self._fail(task, *unkept(error), batch=batch)
            return
        run = report["run"]
        stages = {stage["name"]: stage["seconds"] for stage in run["stages"]}
        result = {
            "inference_time_s": round(seconds, 4),
            "stage_durations": {**stages, "save": round(time.monotonic() - started, 4)},
            "peak_memory_mb": round(run["peak_gb"] * 1000, 1),
            "media_type": "video/mp4",
            "file_sha256": sha256,
        }
        self._end(task, {"event": "done", "result": result}, batch)


def jpeg(frame: Frames, width: int, *, longest: bool = False) -> bytes:
    """A frame (H, W, 3) as JPEG of a width, or of a longest side at most."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    side = max(picture.size) if longest else picture.width
    if side > width or not longest:
        size = [max(1, round(length * width / side)) for length in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return file.getvalue()


def write_files(
    folder: Path, video: Video, public: Callable[[str], str], task: Task
) -> tuple[dict[str, Any], str]:
    """Report and hash of a video whose files are written: all whole, or none.

    Args:
        folder: made if need be.
        video: frames and report.
        public: a text without paths of the server.
        task: whose request the report repeats.

    Raises:
        Error, OSError: a file cannot be written.
    """
    exact = (EXACT,) if task.request.get(LOSSLESS) else ()
    names = (REPORT, THUMBNAIL, *exact, VIDEO)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / VIDEO
    encoding = encoding_of(target)
    with writing_all([folder / name for name in names]) as (
        report_file,
        thumbnail,
        *exact_file,
        file,
    ):
        write_frames(video.frames, target, video.fps, file, encoding)
        with file.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        for path in exact_file:
            lossless = encoding_of(folder / EXACT, lossless=True)
            write_frames(video.frames, folder / EXACT, video.fps, path, lossless)
        middle = video.frames[len(video.frames) // 2]
        thumbnail.write_bytes(jpeg(middle, PREVIEW, longest=True))
        report = {**video.report, "encoding": encoding, "file_sha256": sha256}
        report = without_paths(report, public)
        report_file.write_text(json.dumps(report, indent=1) + "\n")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return report, sha256


def without_paths(report: dict[str, Any], public: Callable[[str], str]) -> dict[str, Any]:
    """A report for the client: files by their names alone; prompts are as they were."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: Path(each).name if name == "path" and isinstance(each, str) else cleaned(each)
                for name, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [cleaned(each) for each in value]
        return public(value) if isinstance(value, str) and "/" in value else value

    kept = {name: report[name] for name in ("prompt", "request") if name in report}
    return {**cleaned(report), **kept}
