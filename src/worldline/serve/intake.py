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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request

from worldline.errors import brief
from worldline.serve import media
from worldline.serve.errors import ApiError
from worldline.serve.forms import Body, FormText, Upload, parse_json, read_body
from worldline.serve.jobs import Queue
from worldline.serve.records import Facts, Job, MediaKind, new_id
from worldline.serve.schema import as_written, choose_model, flattened, read_fields
from worldline.serve.settings import AppSettings
from worldline.serve.store import Store

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
        wanted = read_fields(values, model, facts)
        stated = {**(base or {}), **wanted.stated}
        reference: Any = body.uploads.get("input_reference", wanted.reference)
        source = await self.take(reference, owner)
        try:
            digest = _digest(request.url.path, body, source)
            if earlier := self.store.find(owner, key, digest):
                return earlier
            stated.setdefault("seed", secrets.randbelow(1 << 32))
            stated["seed"] = (stated["seed"] + number) % (1 << 32)
            with as_written(wanted, facts):
                job = await self._checked(model, stated, source)
            job = replace(
                job,
                owner=owner,
                parent_id=parent,
                idempotency_key=key,
                body_sha256=digest if key else None,
                metadata=wanted.metadata,
            )
            return await self.queue.submit(job, source.path if source else None)
        finally:
            self.discard(source)

    async def again(self, parent: Job, prompt: str, request: Request, digest: str) -> Job:
        """A job with the input, the settings and the seed of another, and another prompt."""
        owner, key = owner_of(request), _idempotency_key(request)
        if earlier := self.store.find(owner, key, digest):
            return earlier
        fields = {n: v for n, v in parent.request.items() if v is not None}
        if "prompt" not in self.facts(parent.model).fields:
            message = f"prompt: {parent.model} takes none; it cannot be remixed"
            raise ApiError("unknown_parameter", message, "prompt")
        reference = {"input_of": parent.id} if parent.input_kind else None
        source = await self.take(reference, owner)
        try:
            job = await self._checked(parent.model, {**fields, "prompt": prompt}, source)
            job = replace(
                job,
                owner=owner,
                parent_id=parent.id,
                idempotency_key=key,
                body_sha256=digest if key else None,
            )
            return await self.queue.submit(job, source.path if source else None)
        finally:
            self.discard(source)

    async def _checked(self, model: str, stated: Mapping[str, Any], source: Source | None) -> Job:
        """A job that the world can make, within the limits of this server."""
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
        return Job(
            id=new_id(),
            model=model,
            request=checked.request,
            shape=shape,
            batch_key=checked.batch_key,
            input_kind=kind,
            input_suffix=source.suffix if source else "",
            input_sha256=source.sha256 if source else None,
            created_at=time.time(),
        )

    # inputs

    def discard(self, source: Source | None) -> None:
        """Remove an input that no job has taken."""
        if source is not None:
            source.path.unlink(missing_ok=True)

    async def take(
        self, reference: Any, owner: str, param: str = "input_reference"
    ) -> Source | None:
        """The input that a client names, as a file that opens.

        Raises:
            ApiError: unreadable_media, url_refused, video_not_found, not_ready, invalid_value.
        """
        if isinstance(reference, FormText):
            text = reference.strip()
            reference = parse_json(text) if text.startswith("{") else text
        if reference is None or reference == "":
            return None
        if isinstance(reference, Upload):
            path, head, sha256 = reference.path, reference.head, reference.sha256
        elif isinstance(reference, str):
            path, head, sha256 = await self._from_url(reference, param)
        elif isinstance(reference, dict) and len(reference) == 1:
            [(name, value)] = reference.items()
            if name in ("image_url", "video_url"):
                if isinstance(value, dict):  # as chats write it
                    value = value.get("url")
                path, head, sha256 = await self._from_url(value, param)
            elif name in ("id", "input_of"):
                path, head, sha256 = await self._from_job(name, value, owner, param)
            else:
                message = f"{param} has {brief(name)}; give {_FORMS}"
                raise ApiError("unknown_parameter", message, param)
        else:
            message = f"{param} is {brief(reference)}; give {_FORMS}"
            raise ApiError("invalid_value", message, param)
        try:
            kind, suffix = media.sniff(head)
        except BaseException as error:
            path.unlink(missing_ok=True)
            raise _renamed(error, param) from None
        return Source(path, kind, suffix, sha256)

    async def _from_url(self, url: Any, param: str) -> tuple[Path, bytes, str]:
        if not isinstance(url, str) or not re.match(r"(?i)(data:|https?://)", url):
            message = f"{param} is {brief(url)}; give {_FORMS}"
            raise ApiError("invalid_value", message, param)
        if url[:5].lower() == "data:":
            limit = int(self.settings.max_field_mb * _MEGABYTE)
            try:
                data = await asyncio.to_thread(media.data_url, str(url), limit)
            except ApiError as error:
                raise _renamed(error, param) from None
            path = self.store.incoming()
            await asyncio.to_thread(path.write_bytes, data)
            return path, data[:4096], hashlib.sha256(data).hexdigest()
        if not self.settings.allow_url_inputs:
            message = f"{param}: this server fetches no URLs; send the file or a data URL"
            raise ApiError("url_refused", message, param)
        limit = int(self.settings.max_upload_mb * _MEGABYTE)
        hosts = self.settings.allow_url_inputs
        allowed = [] if "*" in hosts else hosts
        path = self.store.incoming()
        try:
            await asyncio.to_thread(media.fetch_url, str(url), allowed, path, limit=limit)
        except ApiError as error:
            raise _renamed(error, param) from None
        return path, *await asyncio.to_thread(_head_and_hash, path)

    async def _from_job(
        self, name: str, id: Any, owner: str, param: str
    ) -> tuple[Path, bytes, str]:
        """A finished video, or the input of a job, of the same owner."""
        job = find_job(self.store, id, owner, f"{param}.{name}")
        source: Path | None
        if name == "input_of":
            source = self.store.input_path(job)
            if source is None:
                message = f"{job.id} has no input; leave {param} out"
                raise ApiError("invalid_value", message, param)
        else:
            if job.status != "completed":
                raise ApiError("not_ready", f"{job.id} is {job.status}; wait for its end", param)
            source = self.store.folder(job.id) / "video.mp4"
        path = self.store.incoming()
        try:
            await asyncio.to_thread(_link, source, path)
        except FileNotFoundError:
            raise ApiError("video_not_found", f"there is no file of {job.id}", param) from None
        return path, *await asyncio.to_thread(_head_and_hash, path)


def _renamed(error: BaseException, param: str) -> BaseException:
    """An error of media under the name of its field here."""
    if isinstance(error, ApiError) and error.param == media.PARAM:
        error.message = error.message.replace(media.PARAM, param)
        error.param = param
    return error


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
        if error.code == "video_not_found":
            error.message = f"no video has the id {brief(id)}"
        error.param = param
        raise


def _link(source: Path, path: Path) -> None:
    """A second name of a file, which is replaced but never changed; or its copy."""
    try:
        os.link(source, path)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, path)


def _head_and_hash(path: Path) -> tuple[bytes, str]:
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(0)
        return head, hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_files(body: Body, values: Mapping[str, Any]) -> None:
    for name in body.uploads:
        if name != "input_reference":
            message = f"{brief(name)} is a file; give it as input_reference"
            raise ApiError("unknown_parameter", message, name[:80])
    if "input_reference" in values and "input_reference" in body.uploads:
        message = "input_reference is a file and a text; give one"
        raise ApiError("conflicting_parameters", message, "input_reference")


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
    values = {n: v for n, v in body.values.items() if n != "input_reference" or source is None}
    content = [path, values, source.sha256 if source else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
