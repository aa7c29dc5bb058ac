"""Routes of videos: create, look, wait, follow, cancel, delete."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from worldline.errors import brief
from worldline.serve.answers import Json, to_json
from worldline.serve.content import file_response, refuse_unless_completed, spritesheet
from worldline.serve.errors import ApiError
from worldline.serve.intake import Intake, find_job, owner_of
from worldline.serve.jobs import Queue
from worldline.serve.objects import model_object, video_object
from worldline.serve.records import Job
from worldline.serve.schema import check_prompt, choose_model, flattened
from worldline.serve.settings import EVENT_COMMENT_S, RETRY_MS, AppSettings
from worldline.serve.store import Store
from worldline.serve.streams import Event, Subscription

_LISTED = 100
_FILES = {  # by variant of the content
    "video": "video.mp4",
    "lossless": "lossless.mkv",
    "thumbnail": "thumbnail.jpg",
    "spritesheet": "spritesheet.jpg",
    "report": "report.json",
}


@dataclass
class Videos:
    """Answers about videos."""

    queue: Queue
    store: Store
    settings: AppSettings
    intake: Intake
    comment_s: float = EVENT_COMMENT_S
    started: float = field(default_factory=time.time)

    def render(self, job: Job) -> dict[str, Any]:
        return video_object(job, self.queue.position(job), self.queue.eta(job))

    def _job(self, request: Request) -> Job:
        return find_job(self.store, request.path_params["id"], owner_of(request))

    def _answer(self, job: Job, *, located: bool = False) -> Json:
        headers = {"openai-poll-after-ms": str(self.queue.poll_milliseconds(job))}
        if located:
            headers["Location"] = f"/v1/videos/{job.id}"
        return Json(self.render(job), headers=headers)

    async def create(self, request: Request) -> Response:
        return self._answer(await self.intake.create(request), located=True)

    async def page(self, request: Request) -> Response:
        query = request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        after = query.get("after")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= _LISTED):
            message = f"limit is {brief(limit)}; give 1 to {_LISTED}"
            raise ApiError("invalid_value", message, "limit")
        if order not in ("asc", "desc"):
            raise ApiError("invalid_value", f"order is {brief(order)}; give asc or desc", "order")
        if after is not None and not after.startswith("video_"):
            raise ApiError(
                "invalid_value", f"after is {brief(after)}; give the id of a video", "after"
            )
        owner = owner_of(request)
        jobs, more = self.store.page(owner, after, int(limit), order == "desc")
        return Json(
            {
                "object": "list",
                "data": [self.render(job) for job in jobs],
                "first_id": jobs[0].id if jobs else None,
                "last_id": jobs[-1].id if jobs else None,
                "has_more": more,
            }
        )

    async def retrieve(self, request: Request) -> Response:
        return self._answer(self._job(request))

    async def cancel(self, request: Request) -> Response:
        return self._answer(await self.queue.cancel(self._job(request).id))

    async def delete(self, request: Request) -> Response:
        job = self._job(request)
        await self.queue.delete(job.id)
        return Json({"id": job.id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        job = self._job(request)
        variant = request.query_params.get("variant", "video")
        if variant not in (*_FILES, "input"):
            message = f"variant is {brief(variant)}; give one of {', '.join(_FILES)} and input"
            raise ApiError("invalid_value", message, "variant")
        if variant == "input":
            path = self.store.input_path(job)
            if path is None:
                raise ApiError("video_not_found", "the video was made without an input", "variant")
            return file_response(request, path, f"{job.id}-input{job.input_suffix}")
        if job.expires_at is not None and job.expires_at < time.time():
            raise ApiError("expired", "the video has expired; make it again", "video_id")
        refuse_unless_completed(job)
        folder = self.store.folder(job.id)
        if variant == "lossless" and not job.request.get("lossless"):
            message = "the video was made without lossless=true; make it again with that"
            raise ApiError("video_not_found", message, "variant")
        if variant == "spritesheet":
            with suppress(FileNotFoundError):
                await asyncio.to_thread(spritesheet, folder)
        path = folder / _FILES[variant]
        label = job.id if variant in ("video", "report") else f"{job.id}-{variant}"
        return file_response(request, path, f"{label}{path.suffix}")

    async def remix(self, request: Request) -> Response:
        parent = self._job(request)
        body = await self.intake.read(request)
        try:
            values = flattened(body.values)
            for name in (*values, *body.uploads):
                if name != "prompt":
                    message = f"{brief(name)}: a remix takes a prompt alone"
                    raise ApiError("unknown_parameter", message, name[:80])
            prompt = check_prompt(values.get("prompt"))
        finally:
            body.discard()
        return self._answer(await self.intake.again(parent, prompt, request), located=True)

    async def extend(self, request: Request) -> Response:
        """A video that continues the last frames of another."""
        body = await self.intake.read(request)
        try:
            base: dict[str, Any] = {}
            values, parent = body.values, None
            video = values.get("video")
            if video is None and "video" not in body.uploads:
                raise ApiError("missing_parameter", "video is missing; give a file or id", "video")
            body.rename("video", "input_reference")
            if isinstance(video, dict) and "id" in video:
                job = find_job(self.store, video["id"], owner_of(request), "video.id")
                parent = job.id
                values.setdefault("model", job.model)
                if values["model"] == job.model:
                    base = _continued(job, values)
            choose_model(values.get("model"), self.queue.worlds)
            job = await self.intake.make(request, body, parent=parent, base=base)
        finally:
            body.discard()
        return self._answer(job, located=True)

    # waiting

    async def finished(self, request: Request, job: Job) -> Job:
        """The job once it is completed; cancelled when the client goes away.

        Raises:
            ApiError: timeout, or the job's own error.
        """
        wait = asyncio.ensure_future(self.queue.wait(job.id))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {wait, gone},
                timeout=self.settings.sync_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if wait.done():
                job = wait.result()
            elif gone.done():
                await self.queue.cancel(job.id)
                raise ConnectionResetError
            else:
                message = f"{job.id} is not made yet; the job goes on"
                raise ApiError("timeout", message, extra={"video_id": job.id})
        except asyncio.CancelledError:  # the server closes the connection
            await asyncio.shield(self.queue.cancel(job.id))
            raise
        finally:
            for task in (wait, gone):
                task.cancel()
        if job.status == "failed" and job.error_code in ("guardrail_refused", "unreadable_media"):
            message, extra = job.error_message or "it failed", {"video_id": job.id}
            raise ApiError(job.error_code, message, job.error_param, extra=extra)
        try:
            refuse_unless_completed(job)
        except ApiError as error:
            error.extra["video_id"] = job.id
            raise
        return job

    async def sync(self, request: Request) -> Response:
        job = await self.finished(request, await self.intake.create(request))
        result = job.result
        stages: Mapping[str, float] = result.get("stage_durations") or {}
        headers = {
            "X-Video-Id": job.id,
            "X-Model": job.model.encode("ascii", "backslashreplace").decode(),
            "X-Seed": str(job.seed),
            "X-Inference-Time-S": json.dumps(result.get("inference_time_s")),
            "X-Stage-Durations": json.dumps(stages),
            "X-Peak-Memory-MB": json.dumps(result.get("peak_memory_mb")),
            "Server-Timing": ", ".join(f"{n};dur={1000 * s:.1f}" for n, s in stages.items()),
        }
        path = self.store.folder(job.id) / "video.mp4"
        return file_response(request, path, f"{job.id}.mp4", headers)

    # events

    async def events(self, request: Request) -> Response:
        """A stream of events, of one job or of all."""
        if request.method == "HEAD":
            raise ApiError("method_not_allowed", "HEAD: a stream has no end; use GET")
        id = self._job(request).id if "id" in request.path_params else None
        if (count := self.queue.num_listeners) >= self.settings.streams:
            message = f"{count} event streams are open; close one, or poll"
            raise ApiError("too_many_streams", message, retry_after=10)
        # Last-Event-ID needs no look: the stream begins with the present state
        subscription = self.queue.subscribe(owner_of(request), id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        lines = self._lines(subscription)
        return StreamingResponse(lines, headers=headers, media_type="text/event-stream")

    async def _lines(self, subscription: Subscription) -> AsyncIterator[str]:
        following: asyncio.Future[Event] | None = None
        try:
            yield f"retry: {RETRY_MS}\n\n"
            while True:
                following = following or asyncio.ensure_future(anext(subscription))
                done, _ = await asyncio.wait({following}, timeout=self.comment_s)
                if not done:
                    yield ": still here\n\n"
                    continue
                try:
                    event = following.result()
                except StopAsyncIteration:
                    return
                following = None
                data = self.render(event.data) if isinstance(event.data, Job) else event.data
                yield f"event: {event.name}\nid: {event.id}\ndata: {to_json(data)}\n\n"
        finally:
            if following:
                following.cancel()
            subscription.close()

    # worlds

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model(name) for name in self.queue.worlds]})

    async def model(self, request: Request) -> Response:
        name = choose_model(request.path_params["name"], self.queue.worlds)
        return Json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return model_object(name, self.queue.facts(name), self.started, self.settings)


def _continued(job: Job, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a job that its continuation keeps: the prompt, the size and the rate of frames."""
    names = {"prompt", "fps", "width", "height"}
    if values.keys() & {"size", "width", "height"}:
        names -= {"width", "height"}
    return {name: job.request[name] for name in names if job.request.get(name) is not None}


async def _disconnected(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
