"""A small server with the routes of `worldline serve`, for tests of its clients.

It keeps jobs in memory and makes each in a thread of its own, by a function that a test gives.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from worldline.errors import Error, GuardrailRefusal
from worldline.serve.errors import CODES
from worldline.serve.records import new_id
from worldline.step import Step, Video
from worldline.video.write import write_video

Make = Callable[[dict[str, Any], Path | None], Iterator[Step]]
MODEL = "tiny-Cosmos-Predict1-4B"
FACTS = {
    "family": "autoregressive",
    "inputs": ["image", "video"],
    "fields": {"seed": {"type": "integer"}, "lossless": {"type": "boolean", "default": False}},
    "defaults": {"num_video_frames": 33, "height": 128, "width": 192, "fps": 25},
}


class Stub:
    """The server, from `with` on.

    Attributes:
        requests: method, path, headers and fields of what came.
        jobs: records by id, as the video object has them.
        failures: answers for the next requests of a method and a path's end: status, body, headers.
        preview: JPEG in base64 that is sent with every event.
        cut: events after which a stream breaks, each number once.
        cancelled: ids for which the cancel route was called.
    """

    def __init__(
        self,
        folder: Path,
        make: Make,
        *,
        key: str | None = None,
        prefix: str = "",
        tls: ssl.SSLContext | None = None,
        **facts: Any,
    ) -> None:
        self.folder, self.make, self.key, self.prefix = folder, make, key, prefix
        self.models: dict[str, Any] = {MODEL: {**FACTS, **facts}}
        self.requests: list[tuple[str, str, dict[str, str], dict[str, Any]]] = []
        self.inputs: list[bytes | None] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.videos: dict[str, Video] = {}
        self.keys: dict[str, str] = {}
        self.failures: dict[tuple[str, str], list[tuple[int, Any, dict[str, str]]]] = {}
        self.cut: list[int] = []
        self.preview = ""
        self.cancelled: list[str] = []
        self.changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False  # joined at the end
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self._server.server_port}{prefix}"
        self._threads = [threading.Thread(target=self._server.serve_forever, args=(0.01,))]

    def __enter__(self) -> Stub:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.changed:
            for job in self.jobs.values():
                if job["status"] in ("queued", "in_progress"):
                    job["status"] = "cancelled"
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def paths(self, method: str) -> list[str]:
        return [path for each, path, *_ in self.requests if each == method]

    def create(self, fields: dict[str, Any], data: bytes | None, key: str) -> dict[str, Any]:
        if key in self.keys:
            return self.jobs[self.keys[key]]
        job = {"id": new_id(), "object": "video", "model": fields.get("model"), "status": "queued"}
        job |= {"progress": 0, "queue_position": 0, "prompt": fields.get("prompt"), "error": None}
        self.jobs[job["id"]], self.keys[key or job["id"]] = job, job["id"]
        self.inputs.append(data)
        path = None
        if data is not None:
            path = self.folder / f"{job['id']}.input"
            path.write_bytes(data)
        self._threads.append(threading.Thread(target=self._run, args=(job, fields, path)))
        self._threads[-1].start()
        return job

    def _run(self, job: dict[str, Any], fields: dict[str, Any], path: Path | None) -> None:
        lossless = fields.pop("lossless", False)
        try:
            for step in self.make(fields, path):
                with self.changed:
                    if job["status"] == "cancelled":
                        return
                    numbers = {"kind": step.kind, "done": step.done, "total": step.total}
                    job |= {"status": "in_progress", "step": numbers}
                    self.changed.notify_all()
                if step.video is not None:
                    self._finish(job, step.video, lossless)
        except Error as error:
            code = "guardrail_refused" if isinstance(error, GuardrailRefusal) else "internal_error"
            param = getattr(error, "stage", None)
            with self.changed:
                job["status"] = "failed"
                job["error"] = {"code": code, "message": str(error), "param": param}
                self.changed.notify_all()

    def _finish(self, job: dict[str, Any], video: Video, lossless: bool) -> None:
        folder = self.folder / job["id"]
        write_video(video.frames, folder / "video.mp4", video.fps)
        if lossless:
            write_video(video.frames, folder / "lossless.mkv", video.fps, lossless=True)
        (folder / "report.json").write_text(json.dumps(video.report))
        count, height, width, _ = video.frames.shape
        shape = {"num_frames": count, "height": height, "width": width, "fps": video.fps}
        with self.changed:
            job |= {"status": "completed", "progress": 100, "queue_position": None, **shape}
            self.changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.handle_one({}, None)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                self.handle_one(*parse(self.headers["Content-Type"] or "", data))

            def handle_one(self, fields: dict[str, Any], data: bytes | None) -> None:
                path, _, query = self.path.removeprefix(stub.prefix).partition("?")
                stub.requests.append((self.command, self.path, dict(self.headers), fields))
                for (method, end), answers in stub.failures.items():
                    if method == self.command and path.endswith(end) and answers:
                        return self.answer(*answers.pop(0))
                if stub.key and self.headers["Authorization"] != f"Bearer {stub.key}":
                    return self.fail("invalid_api_key", "the key is wrong")
                if path == "/v1/models":
                    data_ = [{"id": name, "worldline": w} for name, w in stub.models.items()]
                    return self.answer(200, {"object": "list", "data": data_})
                if path.startswith("/v1/models/"):
                    name = unquote(path.removeprefix("/v1/models/"))
                    return self.answer(200, {"id": name, "worldline": stub.models[name]})
                if (self.command, path) == ("POST", "/v1/videos"):
                    key = self.headers["Idempotency-Key"] or ""
                    return self.answer(200, stub.create(fields, data, key))
                _, _, rest = path.partition("/v1/videos/")
                id, _, what = rest.partition("/")
                job = stub.jobs.get(id)
                if job is None:
                    return self.fail("video_not_found", f"{id} does not exist")
                if what == "events":
                    return self.events(job)
                if what == "cancel":
                    stub.cancelled.append(id)
                    with stub.changed:
                        if job["status"] in ("queued", "in_progress"):
                            job["status"] = "cancelled"
                        stub.changed.notify_all()
                if what == "content":
                    variant = query.removeprefix("variant=") or "video"
                    names = {"video": "video.mp4", "lossless": "lossless.mkv"}
                    file = stub.folder / id / names.get(variant, f"{variant}.json")
                    if not file.exists():
                        return self.fail("not_ready", f"{variant} does not exist")
                    return self.answer(200, file.read_bytes())
                return self.answer(200, job)

            def fail(self, code: str, message: str, param: str | None = None) -> None:
                status, kind = CODES[code]
                record = {"message": message, "type": kind, "code": code, "param": param}
                self.answer(status, {"error": record})

            def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def events(self, job: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                limit = stub.cut.pop(0) if stub.cut else None
                last, number = None, int(self.headers["Last-Event-ID"] or 0)
                self.wfile.write(b"retry: 20\n\n: alive\n\n")
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and limit != 0:
                    with stub.changed:
                        state = dict(job)
                        if state == last:
                            stub.changed.wait(0.05)
                            continue
                    last, status = state, state["status"]
                    names = {"queued": "status", "in_progress": "progress"}
                    number, limit = number + 1, None if limit is None else limit - 1
                    text = json.dumps(state)
                    event = f"id: {number}\nevent: {names.get(status, status)}\ndata: {text}\n\n"
                    if preview := stub.preview:
                        picture = {"id": job["id"], "done": 7, "total": 9, "jpeg_base64": preview}
                        event += f"event: preview\ndata: {json.dumps(picture)}\n\n"
                    try:
                        self.wfile.write(event.encode())
                    except OSError:  # the client has gone
                        return
                    if status not in names:
                        return

        return Handler


def parse(kind: str, data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Fields and file of a body."""
    if not kind.startswith("multipart/"):
        return json.loads(data or b"{}"), None
    head = f"Content-Type: {kind}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + data)
    fields: dict[str, Any] = {}
    file = None
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if part.get_filename():
            file = content
        elif name == "extra_params":
            fields |= json.loads(content)
        else:
            fields[name] = content.decode()
    return fields, file
