"""Stand-in for `worldline serve`: its routes and objects, drawn videos, one job after another.

For tests of the page alone; jobs live in memory. `python -m tests.serve.stub_server` serves it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import tempfile
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image, ImageDraw
from pydantic import ValidationError

import worldline.serve
from worldline.families.autoregressive.request import ARRequest
from worldline.families.predict2_5.request import FlowRequest
from worldline.serve.errors import ApiError
from worldline.serve.records import ENDED, new_id
from worldline.video.write import write_video

FILES = Path(worldline.serve.__path__[0], "page")
CSP = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; " + (
    "frame-ancestors 'none'"
)
FLOW, BASE = "tiny-Cosmos-Predict2.5-2B", "tiny-Cosmos-Predict1-4B"
_TEXT = {"prompt", "prompt_embeddings", "negative_prompt_embeddings"}


@dataclass(frozen=True)
class World:
    request: Any
    inputs: tuple[str, ...]
    defaults: Mapping[str, Any]
    sizes: tuple[str, ...] = ()
    multiple: int = 4

    def entry(self, name: str) -> dict[str, Any]:
        fields = self.request.model_json_schema()["properties"]
        for each in _TEXT - {"prompt"} if "none" in self.inputs else _TEXT:
            fields.pop(each, None)
        for each in set(fields) & set(self.defaults):
            fields[each]["default"] = self.defaults[each]
        facts = {
            "family": "world",
            "inputs": self.inputs,
            "sizes": self.sizes,
            "fields": fields,
            "defaults": self.defaults,
            "limits": {"frames_multiple": self.multiple, "max_frames": 1000},
            "guardrails": False,
            "previews": "none" in self.inputs,
        }
        names = {"id": name, "object": "model", "created": 0, "owned_by": "worldline"}
        return {**names, "worldline": facts}


WORLDS = {
    FLOW: World(
        FlowRequest,
        ("none", "image", "video"),
        {
            "num_frames": 33,
            "num_video_frames": 33,
            "height": 192,
            "width": 320,
            "fps": 16.0,
            "num_steps": 20,
            "guidance": 7.0,
        },
        ("320x192", "192x320"),
    ),
    BASE: World(
        ARRequest, ("image", "video"), {"num_frames": 33, "height": 192, "width": 320, "fps": 25.0}
    ),
}


@dataclass
class Run:
    video: dict[str, Any]
    folder: Path
    owner: str
    input: Path | None = None
    input_type: str = ""
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


@dataclass
class Stub:
    """The state behind the routes.

    Attributes:
        keys: API keys; none are asked for if it is empty.
        step_s: seconds of a step.
        streams: whether events can be had.
    """

    folder: Path
    keys: tuple[str, ...] = ()
    step_s: float = 0.06
    streams: bool = True
    runs: dict[str, Run] = field(default_factory=dict)
    keyed: dict[str, str] = field(default_factory=dict)  # idempotency key -> id
    listeners: list[asyncio.Queue[tuple[str, str, Any] | None]] = field(default_factory=list)
    device: asyncio.Lock = field(default_factory=asyncio.Lock)

    def send(self, name: str, run: Run, **data: Any) -> None:
        body = data or run.video
        for listener in self.listeners:
            listener.put_nowait((name, run.owner, {"id": run.video["id"], **body}))

    def find(self, id: str, owner: str) -> Run:
        run = self.runs.get(id)
        if run is None or run.owner != owner:
            raise ApiError("video_not_found", f"there is no video {id}")
        return run

    def place(self) -> None:
        """Places in the queue, the oldest first."""
        waiting = [r for r in self.runs.values() if r.video["status"] == "queued"]
        for place, run in enumerate(sorted(waiting, key=lambda run: run.video["id"])):
            run.video["queue_position"] = place

    def submit(self, stated: dict[str, Any], owner: str, origin: Run | None) -> Run:
        name = stated.pop("model", FLOW)
        if name not in WORLDS:
            raise ApiError(
                "model_not_found", f"model: there is no {name}; there are: {FLOW}", "model"
            )
        world = WORLDS[name]
        request = checked(world, stated)
        run = Run({}, Path(tempfile.mkdtemp(dir=self.folder)), owner)
        defaults = world.defaults
        frames = request.get("num_video_frames") or defaults["num_frames"]
        width = request.get("width", defaults["width"])
        height = request.get("height", defaults["height"])
        fps = request.get("fps") or defaults["fps"]
        run.video = {
            "id": new_id(),
            "object": "video",
            "model": name,
            "status": "queued",
            "progress": 0,
            "created_at": int(time.time()),
            "completed_at": None,
            "expires_at": None,
            "error": None,
            "prompt": request.get("prompt"),
            "seconds": f"{frames / fps:.4g}",
            "size": f"{width}x{height}",
            "remixed_from_video_id": None,
            "seed": request["seed"],
            "num_frames": frames,
            "fps": fps,
            "width": width,
            "height": height,
            "started_at": None,
            "queue_position": 0,
            "step": None,
            "eta_s": None,
            "attempts": 0,
            "inference_time_s": None,
            "stage_durations": {},
            "peak_memory_mb": None,
            "request": request,
            "media_type": "video/mp4",
            "metadata": None,
        }
        if origin is not None:
            run.input, run.input_type = origin.input, origin.input_type
        self.runs[run.video["id"]] = run
        self.place()
        run.task = asyncio.create_task(self.work(run))
        self.send("status", run, status="queued", queue_position=run.video["queue_position"])
        return run

    async def work(self, run: Run) -> None:
        video = run.video
        async with self.device:
            if run.cancelled:
                return
            video.update(status="in_progress", queue_position=None, started_at=time.time())
            self.place()
            self.send("status", run, status="in_progress", queue_position=None)
            steps = video["request"].get("num_steps", 20)
            for kind, total in (("text", 1), ("encode", 1), ("denoise", steps), ("decode", 4)):
                for done in range(1, total + 1):
                    await asyncio.sleep(self.step_s)
                    if run.cancelled:
                        return
                    before = {"text": 0, "encode": 3, "denoise": 4, "decode": 94}[kind]
                    share = {"text": 3, "encode": 1, "denoise": 90, "decode": 5}[kind]
                    left = (steps - done if kind == "denoise" else 0) * self.step_s
                    video.update(
                        progress=int(before + share * done / total),
                        step={"kind": kind, "done": done, "total": total},
                        eta_s=left + 4 * self.step_s,
                    )
                    names = ("progress", "step", "eta_s")
                    self.send("progress", run, **{each: video[each] for each in names})
                    if kind == "denoise" and video["request"].get("preview_every") and done % 2:
                        self.send(
                            "preview",
                            run,
                            done=done,
                            total=total,
                            jpeg_base64=preview(video, done / total),
                        )
            if "FAIL" in (video["prompt"] or ""):
                error = {
                    "code": "out_of_memory",
                    "message": "the GPU has 8 GB, the video needs 12 GB; ask for fewer frames",
                    "param": None,
                }
                video.update(status="failed", error=error, completed_at=time.time())
                self.send("failed", run)
                return
            await asyncio.to_thread(self.finish, run)
        self.send("completed", run)

    def finish(self, run: Run) -> None:
        video = run.video
        frames = list(drawn(video))
        write_video(np.stack(frames), run.folder / "video.mp4", video["fps"])
        Image.fromarray(frames[-1]).save(run.folder / "thumbnail.jpg")
        versions = {"worldline": "0.1.0", "torch": "2.11.0", "python": "3.11.7"}
        report = {"model": video["model"], "seed": video["seed"], "versions": versions}
        (run.folder / "report.json").write_text(json.dumps(report))
        took = time.time() - video["started_at"]
        video.update(
            status="completed",
            progress=100,
            completed_at=int(time.time()),
            step=None,
            eta_s=None,
            inference_time_s=took,
            peak_memory_mb=812.4,
            stage_durations={"text": took * 0.04, "denoise": took * 0.85, "decode": took * 0.11},
        )

    def cancel(self, run: Run) -> None:
        if run.video["status"] not in ENDED:
            run.cancelled = True
            run.video.update(status="cancelled", queue_position=None, completed_at=time.time())
            self.place()
            self.send("cancelled", run)


def checked(world: World, stated: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request, resolved."""
    known = set(world.request.model_fields) - (set() if "none" in world.inputs else _TEXT)
    values = {}
    for name, value in stated.items():
        if name not in known:
            raise ApiError("unknown_parameter", f"{name}: this world has no such field", name)
        if isinstance(value, str) and name not in ("prompt", "negative_prompt"):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        values[name] = value
    if "none" in world.inputs and not values.get("prompt"):
        raise ApiError(
            "missing_parameter", "prompt: it is missing; say what the video shows", "prompt"
        )
    try:
        usual = {n: v for n, v in world.defaults.items() if n in known}
        request = world.request.model_validate({**usual, **values})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        advice = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
        raise ApiError("invalid_value", f"{name} is {first['input']}; {advice}", name) from None
    resolved = request.model_dump(mode="json")
    frames = resolved.get("num_video_frames")
    if frames and (frames - 1) % world.multiple:
        message = f"num_video_frames is {frames}; give 1 + {world.multiple}k"
        raise ApiError("invalid_value", message, "num_video_frames")
    return {n: v for n, v in resolved.items() if not n.endswith("_embeddings")}


def drawn(video: Mapping[str, Any], share: float = 1.0) -> Iterator[np.ndarray]:
    """Frames of a ball that rolls over a floor; prompt and seed decide its course."""
    height, width, count = video["height"], video["width"], video["num_frames"]
    words = {n: v for n, v in video["request"].items() if n != "preview_every"}
    generator = np.random.default_rng(zlib.crc32(json.dumps(words, sort_keys=True).encode()))
    rise, speed = generator.uniform(0.5, 0.72), generator.uniform(0.5, 0.75)
    colour = tuple(int(x) for x in generator.integers(90, 235, 3))
    hue = np.array([[196, 208, 214], [228, 214, 190]])[int(generator.integers(2))]
    down = np.linspace(0, 1, height)[:, None, None]
    back = np.broadcast_to(
        np.where(down < rise, hue * (0.72 + 0.3 * down), hue * 0.62), (height, width, 3)
    )
    noise = generator.normal(0, 60 * (1 - share), (height, width, 3)) if share < 1 else 0
    for index in range(count):
        image = Image.fromarray(np.clip(back, 0, 255).astype(np.uint8))
        pen, radius = ImageDraw.Draw(image), height * 0.12
        box = (width * 0.74, height * (rise - 0.22), width * 0.88, height * (rise + 0.06))
        pen.rectangle(box, fill=(62, 98, 150))
        x = width * (0.1 + speed * index / max(1, count - 1))
        y = height * (rise + 0.08) - radius
        pen.ellipse(
            (x - radius, y + radius * 0.8, x + radius, y + radius * 1.15), fill=(90, 84, 72)
        )
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        yield np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def preview(video: Mapping[str, Any], share: float) -> str:
    frame = next(drawn({**video, "num_frames": 1}, share))
    file = io.BytesIO()
    Image.fromarray(frame).resize((320, 320 * video["height"] // video["width"])).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def error_response(error: ApiError) -> JSONResponse:
    names = {"message": error.message, "type": error.type, "param": error.param}
    return JSONResponse({"error": {**names, "code": error.code}}, error.status)


def make_stub(stub: Stub) -> FastAPI:
    app = FastAPI()
    app.state.stub = stub

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if stub.keys and request.url.path.startswith("/v1"):
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme != "Bearer" or key not in stub.keys:
                return error_response(
                    ApiError("invalid_api_key", "Authorization: the key is wrong")
                )
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CSP
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return error_response(error)

    def owner(request: Request) -> str:
        return request.headers.get("authorization", "")

    @app.get("/")
    async def index() -> Response:
        return FileResponse(FILES / "index.html")

    @app.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in {path.name for path in FILES.iterdir()}:
            raise ApiError("unsupported_route", "there is no such file")
        return FileResponse(FILES / name)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [each.entry(name) for name, each in WORLDS.items()]}

    @app.post("/v1/videos")
    @app.post("/v1/videos/extensions")
    async def create(request: Request) -> dict[str, Any]:
        again = stub.keyed.get(request.headers.get("idempotency-key", ""))
        if again is not None:
            return stub.runs[again].video
        extends = request.url.path.endswith("extensions")
        upload = origin = None
        if request.headers.get("content-type", "").startswith("application/json"):
            stated = await request.json()
        else:
            form = await request.form()
            stated = {name: value for name, value in form.items() if isinstance(value, str)}
            file = form.get("input_reference")
            upload = None if file is None else await file.read()
            await form.close()
        reference = stated.pop("input_reference", None)
        if reference is not None:
            origin = stub.find(reference["input_of"], owner(request))
        continued = stub.find(stated.pop("video")["id"], owner(request)) if extends else None
        if upload is not None:
            data = upload
            picture = data.startswith((b"\x89PNG", b"\xff\xd8"))
            if not picture and data[4:8] != b"ftyp":
                message = "input_reference: it is no image and no video; give png, jpeg or mp4"
                raise ApiError("unreadable_media", message, "input_reference")
        elif "none" not in WORLDS.get(stated.get("model", FLOW), WORLDS[FLOW]).inputs and not (
            origin or continued
        ):
            message = "input_reference: it is missing; give an image or a video to continue"
            raise ApiError("missing_parameter", message, "input_reference")
        run = stub.submit(stated, owner(request), origin)
        if upload is not None:
            run.input = run.folder / "input"
            run.input.write_bytes(data)
            run.input_type = "image/png" if picture else "video/mp4"
        if continued is not None:
            run.input, run.input_type = continued.folder / "video.mp4", "video/mp4"
        if run.input is not None:
            run.video["request"]["input_reference"] = {"input_of": run.video["id"]}
        if key := request.headers.get("idempotency-key"):
            stub.keyed[key] = run.video["id"]
        return run.video

    @app.get("/v1/videos")
    async def listed(
        request: Request, after: str = "", limit: int = 20, order: str = "desc"
    ) -> Any:
        down = order == "desc"
        runs = [r.video for r in stub.runs.values() if r.owner == owner(request)]
        runs.sort(key=lambda video: video["id"], reverse=down)
        if after:
            runs = [v for v in runs if (v["id"] < after if down else v["id"] > after)]
        data = runs[:limit]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, **ends, "has_more": len(runs) > limit}

    @app.get("/v1/videos/{id}")
    async def retrieve(request: Request, id: str) -> dict[str, Any]:
        return stub.find(id, owner(request)).video

    @app.delete("/v1/videos/{id}")
    async def delete(request: Request, id: str) -> dict[str, Any]:
        run = stub.find(id, owner(request))
        run.cancelled = True
        del stub.runs[id]
        return {"id": id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{id}/cancel")
    async def cancel(request: Request, id: str) -> dict[str, Any]:
        run = stub.find(id, owner(request))
        stub.cancel(run)
        return run.video

    @app.post("/v1/videos/{id}/remix")
    async def remix(request: Request, id: str) -> dict[str, Any]:
        run, body = stub.find(id, owner(request)), await request.json()
        stated = {n: v for n, v in run.video["request"].items() if n != "input_reference"}
        model = {"model": run.video["model"]}
        again = stub.submit({**stated, **model, **body}, owner(request), run)
        again.video["remixed_from_video_id"] = id
        return again.video

    @app.get("/v1/videos/{id}/content")
    async def content(request: Request, id: str, variant: str = "video") -> Response:
        run = stub.find(id, owner(request))
        if variant == "input" and run.input is not None:
            return FileResponse(run.input, media_type=run.input_type)
        if run.video["status"] != "completed":
            raise ApiError("not_ready", "the video is not finished")
        names = {
            "video": ("video.mp4", "video/mp4"),
            "thumbnail": ("thumbnail.jpg", "image/jpeg"),
            "report": ("report.json", "application/json"),
        }
        name, kind = names[variant]
        return FileResponse(run.folder / name, media_type=kind)

    @app.get("/v1/events")
    async def events(request: Request) -> Response:
        if not stub.streams:
            raise ApiError("too_many_streams", "64 streams are open; close one")
        listener: asyncio.Queue[tuple[str, str, Any] | None] = asyncio.Queue()
        stub.listeners.append(listener)
        return StreamingResponse(stream(listener, owner(request)), media_type="text/event-stream")

    async def stream(
        listener: asyncio.Queue[tuple[str, str, Any] | None], whose: str
    ) -> AsyncIterator[str]:
        yield "retry: 2000\n\n"
        number = 0
        try:
            while (event := await listener.get()) is not None:
                name, who, data = event
                number += 1
                if who == whose:
                    yield f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
        finally:
            stub.listeners.remove(listener)

    return app


@contextlib.contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[str]:
    """Address of a running stub."""
    config = uvicorn.Config(
        make_stub(stub), port=port, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    number = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{number}"
    finally:
        for listener in stub.listeners:
            listener.put_nowait(None)
        server.should_exit = True
        thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--key", action="append", default=[])
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Stub(Path(folder), tuple(options.key)), options.port) as address,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
