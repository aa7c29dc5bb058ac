"""A world that runs on a server, with the interface of a loaded one."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import math
import numbers
import os
import secrets
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from worldline.client.wire import (
    Body,
    Events,
    RemoteError,
    Server,
    ServerEvent,
    error_of,
    form_body,
    json_body,
)
from worldline.errors import Error, InputError, UnknownOptionError, brief, did_you_mean, option
from worldline.family import FAMILIES, requests_of
from worldline.inputs import Form, Input, InputType, describe, joined, kind_of, read_clip
from worldline.step import Progress, Step, Video, finish
from worldline.video.read import Frames, read_image, read_video, to_rgb
from worldline.video.write import write_video

_VIDEOS = "/v1/videos"
_ENDS = ("completed", "failed", "cancelled")
_CANCEL_SECONDS = 10.0


def connect(
    url: str,
    api_key: str | None = None,
    *,
    model: str | None = None,
    timeout: float = 60.0,
    patience: float = 300.0,
    lossless: bool = True,
) -> RemoteWorld:
    """World on a server that `worldline serve` runs.

    Args:
        url: address such as "http://127.0.0.1:8000", perhaps with a prefix of a proxy.
        api_key: key of the server; by default the variable WORLDLINE_API_KEY.
        model: name of the world; needed where the server has several.
        timeout: seconds without a byte, after which a connection counts as broken.
        patience: seconds for which a busy or absent server is asked again.
        lossless: whether frames come as they were made, bit for bit, where the server can send
            that, at some megabytes a second; else they are those of its MP4.

    Raises:
        InputError: the address, the key or the name of the world is wrong.
        RemoteError: the server cannot be reached.
    """
    for name, value in (("timeout", timeout), ("patience", patience)):
        usable = isinstance(value, int | float) and 0 <= value < math.inf
        if not usable or (name == "timeout" and not value):
            raise InputError(f"{name} is {brief(value)}; give a number of seconds")
    server = Server(url, api_key or os.environ.get("WORLDLINE_API_KEY") or None, timeout, patience)
    listed = server.json("GET", "/v1/models", patience=0).get("data")
    entries = [entry for entry in listed or [] if isinstance(entry, dict) and "id" in entry]
    models = {str(entry["id"]): entry for entry in entries}
    if model is None and len(models) == 1:
        [model] = models
    if model not in models:
        reason = f"model is {brief(model)}" if model else f"it has {len(models)} worlds"
        near = did_you_mean(str(model), [*models], 0.6) or f"; give one of {', '.join(models)}"
        raise InputError(f"{server.url}: {reason}{near}")
    facts = models[model].get("worldline")
    return RemoteWorld(server, model, facts if isinstance(facts, dict) else {}, lossless)


class RemoteWorld:
    """A world on a server; made by `worldline.connect`.

    Attributes:
        name: of the world.
        url: of the server.
        facts: family, inputs, fields, defaults and limits, as `/v1/models` has them.
    """

    def __init__(
        self, server: Server, name: str, facts: Mapping[str, Any], lossless: bool = True
    ) -> None:
        self._server, self.name, self.facts, self.url = server, name, facts, server.url
        self._lossless = lossless

    def __repr__(self) -> str:
        return f"RemoteWorld({self.name!r}, {self.url!r})"

    def generate(
        self,
        input: Input | None = None,
        *,
        input_type: InputType | None = None,
        progress: Progress = False,
        **options: Any,
    ) -> Video:
        """Video of a prompt, or of what happens next in an image or a clip, as of `World.generate`.

        Ctrl-C, or an error of `progress`, cancels it on the server, too.
        """
        video = finish(partial(self.stream, input, input_type=input_type, **options), progress)
        assert video is not None, "a stream ends with its video"
        return video

    def stream(
        self, input: Input | None = None, *, input_type: InputType | None = None, **options: Any
    ) -> Generator[Step, None, None]:
        """Steps of the video that `generate` makes; the last carries it.

        The server has the request when this returns. Closing the generator cancels it there.

        Args:
            input: a file, a PIL image or a list of them, or frames uint8 (T, H, W, 3) as an array
                or a tensor; None starts from the prompt alone.
            input_type: "image" or "video"; by default what the input is.
            options: those of the world's family, listed by `World.stream`; files of embeddings
                aside.

        Raises:
            InputError: the input or an option is wrong; raised before the first step.
            GuardrailRefusal: the prompt or the video was refused.
            RemoteError: the server fails, or was absent for longer than `patience`.
        """
        steps = self._follow(input, input_type, options)
        next(steps)  # from here on it is on the server, and closing the generator cancels it
        return steps

    def _wait_until_loaded(self) -> None:
        """Wait for a world that the server still loads: what it takes is known only then."""
        begin = time.monotonic()
        while self.facts.get("state") == "loading":
            if time.monotonic() - begin > self._server.patience:
                raise RemoteError(f"{self.url}: {self.name} is still loading; try later", 503)
            time.sleep(0.5)
            entry = self._server.json("GET", f"/v1/models/{quote(self.name, safe='')}")
            self.facts = entry.get("worldline") or {}

    def _follow(
        self, input: Input | None, input_type: InputType | None, options: Mapping[str, Any]
    ) -> Generator[Step, None, None]:
        self._wait_until_loaded()
        exact = self._lossless and "lossless" in (self.facts.get("fields") or {})
        with self._request(input, input_type, options, exact) as body:
            # one key for all attempts, by which the server knows a second one
            headers = {"Idempotency-Key": secrets.token_hex(16)}
            record = self._server.json("POST", _VIDEOS, body, headers)
        identity, end = record.get("id"), ""
        if not isinstance(identity, str):
            raise RemoteError(f"{self.url}{_VIDEOS} does not answer as a worldline server does")
        place = f"{_VIDEOS}/{quote(identity, safe='')}"
        try:
            step = Step("queue", 0, 1)
            yield step
            for event in self._events(place):
                if event.name in _ENDS:
                    end, record = event.name, event.data
                    break
                if new := _step_of(event, step):
                    step = new
                    yield step
        finally:
            if not end:
                self._cancel(place)
        if end == "cancelled":
            raise RemoteError(f"{identity} was cancelled on {self.url}", code="video_cancelled")
        if end == "failed":
            raise error_of(record.get("error") or {})
        video = self._result(place, record, exact)
        yield Step("done", 1, 1, video.frames, video=video)

    @contextmanager
    def _request(
        self,
        input: Input | None,
        input_type: InputType | None,
        options: Mapping[str, Any],
        exact: bool,
    ) -> Iterator[Body]:
        """Body of the request; files that were made for it last as long."""
        if input_type not in ("image", "video", None):
            raise InputError(f"input_type is {input_type!r}; it must be 'image' or 'video'")
        stated = {name: _plain(name, value) for name, value in options.items()}
        fields = {name: value for name, value in stated.items() if value is not None}
        for name in fields:
            if not name.isidentifier() or name in ("model", "input_reference", "lossless"):
                raise UnknownOptionError(f"{brief(name)} is no option of a request; leave it out")
        fields |= {"model": self.name, **({"lossless": True} if exact else {})}
        if "seed" not in fields and (family := str(self.facts.get("family"))) in FAMILIES:
            # a server would draw one
            fields["seed"] = requests_of(family).REQUEST.model_fields["seed"].default
        form: Form | None = joined(input)
        if form is None:
            yield json_body(fields)
            return
        with TemporaryDirectory(prefix="worldline-") as folder:
            file, media_type = self._as_file(form, input_type, fields, Path(folder))
            yield form_body(fields, "input_reference", file, media_type)

    def _as_file(
        self, form: Form, input_type: InputType | None, fields: Mapping[str, Any], folder: Path
    ) -> tuple[Path, str]:
        """File to send, of which the server reads the pixels that a local world takes."""
        kind = kind_of(form)
        if isinstance(form, str | os.PathLike):
            if input_type not in (kind, None):
                raise InputError(
                    f"{describe(form)}: it is of type {kind}; give {option('input_type', kind)}"
                )
            return Path(form), "application/octet-stream"  # the server reads the first bytes
        # as of `read_clip` in a local world, whose messages these are
        if isinstance(form, Image.Image):
            if input_type == "video":
                read_clip(form, "video", 1)
            file = folder / "input.png"
            Image.fromarray(to_rgb(form, describe(form)).frames[0]).save(file, compress_level=1)
            return file, "image/png"
        frames = read_clip(form, input_type or "video", 1).frames
        last, file = fields.get("num_input_frames"), folder / "input.mkv"
        if isinstance(last, int) and 0 < last < len(frames):
            frames = frames[-last:]  # no others are read
        rate = fields.get("fps") or (self.facts.get("defaults") or {}).get("fps")
        usable = isinstance(rate, int | float) and 0.1 <= rate <= 1000
        write_video(frames, file, rate if usable and rate else 24, lossless=True)
        return file, "video/x-matroska"

    def _events(self, place: str) -> Iterator[ServerEvent]:
        """Events of a job to its end; where no stream can be had, by asking now and then."""
        events = Events()
        while True:
            headers = {"Accept": "text/event-stream"}
            if events.last_id:
                headers["Last-Event-ID"] = events.last_id
            with (
                suppress(RemoteError, OSError, http.client.HTTPException),
                closing(
                    self._server.open("GET", f"{place}/events", headers=headers, patience=0)
                ) as response,
            ):
                if response.headers.get_content_type() == "text/event-stream":
                    yield from _known(events.read(response))
            # after a break, a restart of the server, or where all of its streams are taken
            record = self._server.json("GET", place)
            yield _event_of(record)
            time.sleep(events.delay)

    def _cancel(self, place: str) -> None:
        with suppress(Error):  # it ended meanwhile, or the server is gone
            self._server.json("POST", f"{place}/cancel", patience=_CANCEL_SECONDS)

    def _result(self, place: str, record: Mapping[str, Any], exact: bool) -> Video:
        """Finished video, from the server's files."""
        with TemporaryDirectory(prefix="worldline-") as folder:
            file = Path(folder, "video")
            exact = exact and self._try("lossless", place, file)
            if not exact:
                self._server.download(f"{place}/content", file)
            try:
                clip = read_image(file) if kind_of(file) == "image" else read_video(file)
            except InputError as error:
                raise RemoteError(
                    f"{self.url}{place}: the server's file is no video: {error}"
                ) from None
        frames = clip.frames
        height, width = record.get("height"), record.get("width")
        if isinstance(height, int) and isinstance(width, int):
            frames = frames[:, :height, :width]  # H.264 stores even sides
        report: dict[str, Any] = {}
        with suppress(RemoteError):
            report = self._server.json("GET", f"{place}/content?variant=report")
        made = report.get("frames_sha256")
        if exact and made:
            frames = np.ascontiguousarray(frames)
            if hashlib.sha256(frames.data).hexdigest() != made:
                raise RemoteError(f"{self.url}{place}: the file has other frames than its report")
        report |= {"server": self.url, "video_id": record.get("id"), "lossless": exact}
        rate = record.get("fps")
        fps = float(rate) if isinstance(rate, int | float) and rate > 0 else clip.fps or 24.0
        prompt = report.get("prompt", record.get("prompt"))
        return Video(frames, fps, report, prompt if isinstance(prompt, str) else None)

    def _try(self, variant: str, place: str, file: Path) -> bool:
        """Whether a server has a variant, and so it was downloaded."""
        try:
            self._server.download(f"{place}/content?variant={variant}", file)
        except InputError:
            return False
        except RemoteError as error:
            if error.status != 404:
                raise
            return False
        return True


def _known(events: Iterator[ServerEvent]) -> Iterator[ServerEvent]:
    """Events whose data is an object, and comments; up to `shutdown`."""
    for event in events:
        if event.name == "shutdown":
            return
        if not event.name or isinstance(event.data, dict):
            yield event


def _event_of(record: dict[str, Any]) -> ServerEvent:
    """Event that has the state of a job."""
    status = record.get("status")
    if status in _ENDS:
        return ServerEvent(status, record)
    return ServerEvent("progress" if status == "in_progress" else "status", record)


def _step_of(event: ServerEvent, last: Step) -> Step | None:
    """Step that an event reports; None where it reports nothing new."""
    if not event.name:  # a caller that can be interrupted looks up while a job waits
        return last if last.kind == "queue" else None
    try:
        if event.name == "status" and event.data.get("status") == "queued":
            return Step("queue", 0, 1 + int(event.data.get("queue_position") or 0))
        if event.name == "progress":
            step = event.data["step"]
            new = Step(str(step["kind"]), int(step["done"]), int(step["total"]))
            # the last step of a local world carries the video
            return None if new.kind == "done" or new == replace(last, preview=None) else new
        if event.name == "preview":
            # its numbers may be of another kind than the last step's, which it does not name
            preview = _picture(event.data["jpeg_base64"])
            return Step(last.kind, last.done, last.total, preview=preview)
    except (KeyError, TypeError, ValueError, OSError):  # of a newer server: no reason to stop
        pass
    return None


def _picture(data: str) -> Frames:
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["JPEG"]) as picture:
        return to_rgb(picture, "preview").frames


def _plain(name: str, value: Any) -> Any:
    """Option as JSON holds it.

    Raises:
        InputError: it is an object of this machine, such as a tensor or a path.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):  # half of a pair of UTF-16
            value.encode()
            return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, each) for key, each in value.items()}
    raise InputError(f"{name} is {brief(value)}; a server takes texts, finite numbers and lists")
