"""From what a client posted to a job on the disk: inputs are fetched, everything is checked."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from worldline.errors import brief
from worldline.serve import media
from worldline.serve.errors import ApiError, unwritable
from worldline.serve.forms import Body, FormText, Upload, parse_json, read_body
from worldline.serve.jobs import Queue
from worldline.serve.records import INPUT, Facts, Job, MediaKind, new_id
from worldline.serve.schema import as_written, choose_model, flattened, read_fields
from worldline.serve.settings import AppSettings
from worldline.serve.store import Store
from worldline.serve.urls import data_url, fetch_url

VIDEO_ID = re.compile(r"video_[0-9a-f]{32}", re.ASCII)
_MEGABYTE = 1_000_000
_FORMS = "a file, a data URL, or one of image_url, video_url, id and input_of"


@dataclass(frozen=True)
class Source:
    """An input on its way to a job: a file of its own in incoming/."""

    path: Path
    kind: MediaKind
    suffix: str
    sha256: str


@dataclass
class Intake:
    """Maker of jobs from requests."""

    queue: Queue
    store: Store
    settings: AppSettings
    # others need threads, too, of which there are five and more; a slow host holds one for 20 s
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))

    async def read(self, request: Request) -> Body:
        """What a client posted; its files are the caller's to discard."""
        return await read_body(request, self.settings, self.store.incoming)

    async def create(self, request: Request) -> Job:
        """A job from the body of a request."""
        body = await self.read(request)
        try:
            return await self.make(request, body)
        finally:
            body.discard()

    def facts(self, model: str) -> Facts:
        """What a world takes.

        Raises:
            ApiError: loading, no_worker, shutting_down.
        """
        facts = self.queue.facts(model)
        if facts is None:
            raise self.queue.unavailable(model)
        return facts

    async def make(
        self,
        request: Request,
        body: Body,
        *,
        parent: str | None = None,
        base: Mapping[str, Any] | None = None,
        number: int = 0,
    ) -> Job:
        """A job from fields and files; everything is checked before.

        Args:
            request: its headers and owner count.
            body: fields and files.
            parent: id of the job that it continues.
            base: fields of the world's request that hold where the body states none.
            number: of several jobs of one request.
        """
        owner, key = owner_of(request), _idempotency_key(request)
        key = f"{key} {number}" if key and number else key
        values = flattened(body.values)
        model = choose_model(values.get("model"), self.queue.worlds)
        _refuse_files(body, values)
        facts = self.facts(model)
        wanted = read_fields(values, facts, base or ())
        stated = {**(base or {}), **wanted.stated}
        async with self._taken(body.uploads.get(INPUT, wanted.reference), owner) as source:
            digest = _digest(request.url.path, body, source)
            if earlier := self.store.find(owner, key, digest):
                return earlier
            stated.setdefault("seed", secrets.randbelow(1 << 32))
            stated["seed"] = (stated["seed"] + number) % (1 << 32)
            with as_written(wanted, facts):
                return await self._submit(
                    *(model, stated, source),
                    owner=owner,
                    parent_id=parent,
                    idempotency_key=key,
                    body_sha256=digest if key else None,
                    metadata=wanted.metadata,
                )

    async def again(self, parent: Job, prompt: str, request: Request) -> Job:
        """A job with the input, the settings and the seed of another, and another prompt."""
        owner, key = owner_of(request), _idempotency_key(request)
        digest = hashlib.sha256(json.dumps([parent.id, prompt]).encode()).hexdigest()
        if earlier := self.store.find(owner, key, digest):
            return earlier
        model = choose_model(parent.model, self.queue.worlds)
        if "prompt" not in self.facts(model).fields:
            message = f"prompt: {model} takes none; it cannot be remixed"
            raise ApiError("unknown_parameter", message, "prompt")
        fields = {n: v for n, v in parent.request.items() if v is not None}
        reference = {"input_of": parent.id} if parent.input_kind else None
        async with self._taken(reference, owner) as source:
            return await self._submit(
                *(model, {**fields, "prompt": prompt}, source),
                owner=owner,
                parent_id=parent.id,
                idempotency_key=key,
                body_sha256=digest if key else None,
            )

    async def _submit(
        self, model: str, stated: Mapping[str, Any], source: Source | None, **columns: Any
    ) -> Job:
        """A job that the world can make, within the limits of this server; it is on the disk."""
        path, kind = (source.path, source.kind) if source else (None, None)
        checked = await self.queue.check(model, stated, path, kind)
        shape, settings = checked.shape, self.settings
        frames, pixels = shape["num_frames"], shape["height"] * shape["width"]
        if settings.max_frames is not None and frames > settings.max_frames:
            message = f"{frames} frames; this server makes at most {settings.max_frames}"
            raise ApiError("invalid_value", message, "num_video_frames")
        if settings.max_pixels is not None and pixels > settings.max_pixels:
            message = f"{pixels:,} pixels; this server makes at most {settings.max_pixels:,}"
            raise ApiError("invalid_value", message, "size")
        job = Job(
            id=new_id(),
            model=model,
            request=checked.request,
            shape=shape,
            batch_key=checked.batch_key,
            input_kind=kind,
            input_suffix=source.suffix if source else "",
            input_sha256=source.sha256 if source else None,
            created_at=time.time(),
            **columns,
        )
        return await self.queue.submit(job, path)

    # inputs

    @asynccontextmanager
    async def _taken(self, reference: Any, owner: str) -> AsyncIterator[Source | None]:
        """The input that a client names, as a file of a known kind; removed unless a job has it.

        Raises:
            ApiError: unreadable_media, url_refused, video_not_found, not_ready, invalid_value.
        """
        if isinstance(reference, FormText):
            text = reference.strip()
            reference = parse_json(text) if text.startswith("{") else text
        if reference is None or reference == "":
            yield None
            return
        if isinstance(reference, Upload):
            path, head, sha256 = reference.path, reference.head, reference.sha256
        else:
            path = await self._copied(reference, owner)
            head, sha256 = await asyncio.to_thread(_head_and_hash, path)
        try:
            kind, suffix = media.sniff(head)
            yield Source(path, kind, suffix, sha256)
        finally:
            path.unlink(missing_ok=True)

    async def _copied(self, reference: Any, owner: str) -> Path:
        """A file of its own with what a client refers to."""
        if isinstance(reference, str):
            return await self._from_url(reference)
        if not isinstance(reference, dict) or len(reference) != 1:
            message = f"{INPUT} is {brief(reference)}; give {_FORMS}"
            raise ApiError("invalid_value", message, INPUT)
        [(name, value)] = reference.items()
        if name in ("image_url", "video_url"):
            # an object, as chats write it
            return await self._from_url(value.get("url") if isinstance(value, dict) else value)
        if name in ("id", "input_of"):
            return await self._from_job(name, value, owner)
        message = f"{INPUT} has {brief(name)}; give {_FORMS}"
        raise ApiError("unknown_parameter", message, INPUT)

    async def _from_url(self, url: Any) -> Path:
        if not isinstance(url, str) or not re.match(r"(?i)(data:|https?://)", url):
            raise ApiError("invalid_value", f"{INPUT} is {brief(url)}; give {_FORMS}", INPUT)
        path, settings, hosts = self.store.incoming(), self.settings, self.settings.allow_url_inputs
        with _whole(path):
            if url[:5].lower() == "data:":
                limit = int(settings.max_field_mb * _MEGABYTE)
                data = await asyncio.to_thread(data_url, str(url), limit)
                await asyncio.to_thread(path.write_bytes, data)
            elif hosts:
                limit, allowed = (
                    int(settings.max_upload_mb * _MEGABYTE),
                    () if "*" in hosts else hosts,
                )
                async with self.fetching:
                    await asyncio.to_thread(fetch_url, str(url), allowed, path, limit=limit)
            else:
                message = f"{INPUT}: this server fetches no URLs; send the file or a data URL"
                raise ApiError("url_refused", message, INPUT)
        return path

    async def _from_job(self, name: str, id: Any, owner: str) -> Path:
        """A finished video, or the input of a job, of the same owner."""
        job = find_job(self.store, id, owner, f"{INPUT}.{name}")
        source = self.store.input_path(job)
        if name == "id":
            if job.status != "completed":
                raise ApiError("not_ready", f"{job.id} is {job.status}; wait for its end", INPUT)
            source = self.store.folder(job.id) / "video.mp4"
        if source is None:
            raise ApiError("invalid_value", f"{job.id} has no input; leave {INPUT} out", INPUT)
        path = self.store.incoming()
        with _whole(path):
            try:
                await asyncio.to_thread(_link, source, path)
            except FileNotFoundError:
                raise ApiError("video_not_found", f"there is no file of {job.id}", INPUT) from None
        return path


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Remove a file that is not written to its end.

    Raises:
        ApiError: disk_full, internal_error.
    """
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(error) from error
        raise


def owner_of(request: Request) -> str:
    """Owner of the jobs of a request."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner


def find_job(store: Store, id: Any, owner: str, param: str = "video_id") -> Job:
    """An own job.

    Raises:
        ApiError: video_not_found; also where the id has no form of one.
    """
    if not isinstance(id, str) or not VIDEO_ID.fullmatch(id):
        raise ApiError("video_not_found", f"no video has the id {brief(id)}", param)
    try:
        return store.get(str(id), owner)
    except ApiError as error:
        error.param = param
        raise


def _link(source: Path, path: Path) -> None:
    """A second name of a file, which is replaced but never changed; or its copy."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _head_and_hash(path: Path) -> tuple[bytes, str]:
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(0)
        return head, hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_files(body: Body, values: Mapping[str, Any]) -> None:
    for name in body.uploads:
        if name != INPUT:
            message = f"{brief(name)} is a file; give it as {INPUT}"
            raise ApiError("unknown_parameter", message, name[:80])
    if INPUT in values and INPUT in body.uploads:
        message = f"{INPUT} is a file and a text; give one"
        raise ApiError("conflicting_parameters", message, INPUT)


def _idempotency_key(request: Request) -> str | None:
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    name = "Idempotency-Key"
    if len(keys) > 1 or not 0 < len(keys[0]) <= 255 or not keys[0].isprintable():
        raise ApiError("invalid_value", f"{name}: give one of 1 to 255 characters", name)
    return keys[0]


def _digest(path: str, body: Body, source: Source | None) -> str:
    """Hash of what was posted, whatever the boundary of its form."""
    values = {n: v for n, v in body.values.items() if n != INPUT or source is None}
    content = [path, values, source.sha256 if source else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
