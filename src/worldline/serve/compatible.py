"""Routes of other servers' forms: one picture of a world, and NIM's blocking request."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from worldline.errors import brief
from worldline.serve.answers import Json
from worldline.serve.content import first_frame
from worldline.serve.errors import ApiError
from worldline.serve.forms import Body
from worldline.serve.records import Job
from worldline.serve.routes import Videos
from worldline.serve.schema import OWN, flattened
from worldline.serve.values import convert

_COUNT = {"type": "integer", "minimum": 1, "maximum": 4}
_VIDEO_PARAMS = {
    "height": "height",
    "width": "width",
    "frames_count": "num_video_frames",
    "frames_per_sec": "fps",
}
# which name a picture's file and change nothing here
_IGNORED = ("response_format", "output_format", "background", "moderation", "style")


@dataclass
class Compatible:
    """Answers in the forms of NIM and of OpenAI's images."""

    videos: Videos

    async def infer(self, request: Request) -> Response:
        """NIM's /v1/infer: blocks, and answers the video in base64."""
        body = await self.videos.intake.read(request)
        try:
            values = body.values
            upsampling = values.pop("prompt_upsampling", None)
            if upsampling is not None:
                convert("prompt_upsampling", upsampling, {"type": "boolean"})
            _unfold(values)
            _take_media(body)
            job = await self.videos.intake.make(request, body)
        finally:
            body.discard()
        job = await self.videos.finished(request, job)
        path = self.videos.store.folder(job.id) / "video.mp4"
        data = await asyncio.to_thread(path.read_bytes)
        return Json(
            {
                "b64_video": base64.b64encode(data).decode(),
                "upsampled_prompt": job.request.get("prompt"),
                "seed": job.seed,
                "video_id": job.id,
            }
        )

    async def images(self, request: Request) -> Response:
        """OpenAI's /v1/images/generations: videos of one frame."""
        body = await self.videos.intake.read(request)
        try:
            body.values = values = flattened(body.values)
            if body.uploads or "input_reference" in values:
                message = "input_reference: a picture takes no input; make a video"
                raise ApiError("unknown_parameter", message, "input_reference")
            count = convert("n", values.pop("n", 1), _COUNT)
            shape = values.pop("response_format", "b64_json")
            if shape != "b64_json":
                message = f"response_format is {brief(shape)}; give b64_json"
                raise ApiError("invalid_value", message, "response_format")
            for name in _IGNORED:
                values.pop(name, None)
            frames = values.setdefault("num_video_frames", 1)
            if convert("num_video_frames", frames, OWN["num_video_frames"]) != 1:
                message = f"num_video_frames is {brief(frames)}; a picture is one frame"
                raise ApiError("invalid_value", message, "num_video_frames")
            if values.get("size") == "auto":
                del values["size"]
            if count > 1 and "seed" in values:
                convert("seed", values["seed"], OWN["seed"])
            data = await self._pictures(request, body, count)
        finally:
            body.discard()
        return Json({"created": int(time.time()), "data": data})

    async def _pictures(self, request: Request, body: Body, count: int) -> list[dict[str, Any]]:
        """Entries of the answer; where one cannot be made, none of those after it is."""
        jobs, pictures = list[Job](), list[dict[str, Any]]()
        try:
            for number in range(count):
                jobs.append(await self.videos.intake.make(request, body, number=number))
            for job in jobs:
                ended = await self.videos.finished(request, job)
                path = self.videos.store.folder(job.id) / "video.mp4"
                png = base64.b64encode(await asyncio.to_thread(first_frame, path)).decode()
                pictures.append({"b64_json": png, "seed": ended.seed, "video_id": ended.id})
        except BaseException:
            # the one that was waited for has ended, or goes on
            waited = len(jobs) == count
            for job in jobs[len(pictures) + waited :]:
                await self.videos.queue.cancel(job.id)
            raise
        return pictures


def _unfold(values: dict[str, Any]) -> None:
    """Put NIM's video_params beside the other fields."""
    name = "video_params"
    inner = values.pop(name, None)
    if inner is None:
        return
    if not isinstance(inner, Mapping):
        raise ApiError("invalid_value", f"{name} is {brief(inner)}; give an object", name)
    for key, value in inner.items():
        if key not in _VIDEO_PARAMS:
            known = ", ".join(_VIDEO_PARAMS)
            message = f"{name}.{brief(key)}: no such field; there are {known}"
            raise ApiError("unknown_parameter", message, f"{name}.{key[:60]}")
        field = _VIDEO_PARAMS[key]
        if values.setdefault(field, value) != value:
            message = f"{field} is in {name} and beside it; give it once"
            raise ApiError("conflicting_parameters", message, field)


def _take_media(body: Body) -> None:
    """Make `image` or `video`, a file, a data URL or base64, the input."""
    for name in ("image", "video"):
        value = body.values.get(name)
        if value is None:
            body.values.pop(name, None)
        elif not isinstance(value, str):
            raise ApiError("invalid_value", f"{name} is {brief(value)}; give base64", name)
        elif value[:5].lower() != "data:" and "://" not in value[:9]:
            body.values[name] = f"data:application/octet-stream;base64,{value}"
        body.rename(name, "input_reference")
