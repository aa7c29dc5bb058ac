"""The client of a server: `worldline.connect`, against a small server of the tests."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline.client.wire import Events, RemoteError, error_of, parse_url
from worldline.errors import GuardrailRefusal, InputError, InsufficientMemoryError
from worldline.step import Step, Video
from worldline.video.read import read_video

from .stub_server import MODEL, Stub

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"


def noise(frames: int = 5, height: int = 17, width: int = 31) -> Any:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def make(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
    for done in range(1, 4):
        yield Step("denoise", done, 3)
        time.sleep(0.02)
    frames = noise()
    report = {"seed": fields.get("seed"), "frames_sha256": hashlib.sha256(frames.data).hexdigest()}
    yield Step("done", 1, 1, frames, video=Video(frames, 12.5, report, fields.get("prompt")))


def endless(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
    for done in range(1000):
        yield Step("denoise", done, 1000)
        time.sleep(0.02)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    with Stub(tmp_path, make) as server:
        yield server


def test_a_video_with_its_frames_report_and_rate(stub: Stub) -> None:
    world = worldline.connect(stub.url)
    seen: list[Step] = []
    video = world.generate(prompt="a ball", seed=np.int64(7), progress=seen.append)
    assert (video.frames == noise()).all()
    assert (video.fps, video.prompt, video.report["seed"]) == (12.5, "a ball", 7)
    assert video.report["video_id"] in stub.jobs
    assert video.report["lossless"] is True
    done = [(step.kind, step.done, step.total) for step in seen if step.kind == "denoise"]
    assert done == sorted({*done})  # none twice, in order
    assert seen[-1].kind == "done"
    assert seen[-1].frames is video.frames
    [(_, _, headers, fields)] = [r for r in stub.requests if r[:2] == ("POST", "/v1/videos")]
    assert fields == {"prompt": "a ball", "seed": 7, "model": MODEL}  # the stub took `lossless`
    assert len(headers["Idempotency-Key"]) == 32
    assert not stub.cancelled


def test_frames_of_an_mp4_where_a_server_sends_no_others(tmp_path: Path) -> None:
    with Stub(tmp_path, make, fields={"seed": {}}) as stub:
        video = worldline.connect(stub.url).generate(prompt="x")
        assert video.frames.shape == noise().shape  # the row and the column that H.264 adds are off
        assert video.report["lossless"] is False
        assert (worldline.connect(stub.url, lossless=False).generate().frames == video.frames).all()


@pytest.mark.parametrize(("family", "default"), [("autoregressive", 0), ("diffusion", 1)])
def test_seeds_are_those_of_a_local_world(tmp_path: Path, family: str, default: int) -> None:
    with Stub(tmp_path, make, family=family) as stub:
        world = worldline.connect(stub.url)
        for seed in (None, 0, 5):
            world.generate(seed=seed)
        assert [fields["seed"] for _, _, _, fields in stub.requests if fields] == [default, 0, 5]


def test_a_world_that_is_loaded_later(tmp_path: Path) -> None:
    with Stub(tmp_path, make) as stub:
        facts = stub.models[MODEL]
        stub.models[MODEL] = {"state": "loading"}
        impatient = worldline.connect(stub.url, patience=0)
        with pytest.raises(RemoteError, match="loading"):
            impatient.generate()
        world = worldline.connect(stub.url)
        stub.models[MODEL] = facts
        assert world.generate().report["lossless"] is True
        assert world.facts == facts


@pytest.mark.parametrize("damaged", [False, True])
def test_previews(stub: Stub, damaged: bool) -> None:
    file = BytesIO()
    Image.new("RGB", (16, 8), "white").save(file, "JPEG")
    stub.preview = "####" if damaged else base64.b64encode(file.getvalue()).decode()
    seen = [*worldline.connect(stub.url).stream()]
    previews = [step for step in seen if step.preview is not None]
    assert (not previews) is damaged
    for step in previews:
        assert step.preview is not None
        assert step.preview.shape == (1, 8, 16, 3)
        assert (step.kind, step.total) in {("queue", 1), ("denoise", 3)}


def test_damaged_frames_are_noticed(tmp_path: Path) -> None:
    def other(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        yield Step("done", 1, 1, video=Video(noise(), 8, {"frames_sha256": 64 * "0"}))

    with Stub(tmp_path, other) as stub, pytest.raises(RemoteError, match="other frames"):
        worldline.connect(stub.url).generate()


@pytest.mark.parametrize("kind", ["frames", "tensor", "pictures", "last"])
def test_frames_arrive_bit_for_bit(stub: Stub, tmp_path: Path, kind: str) -> None:
    frames = noise(6, 32, 34)
    given = {
        "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "pictures": [Image.fromarray(frame) for frame in frames],
    }.get(kind, frames)
    options = {"num_input_frames": 2} if kind == "last" else {}
    worldline.connect(stub.url).generate(given, **options)
    (tmp_path / "input").write_bytes(stub.inputs[0] or b"")
    expected = frames[-2:] if kind == "last" else frames
    assert (read_video(tmp_path / "input").frames == expected).all()


def test_pictures_and_files_arrive_as_they_are(stub: Stub, tmp_path: Path) -> None:
    world, picture = worldline.connect(stub.url), Image.fromarray(noise()[0]).convert("CMYK")
    world.generate(picture, seed=3, tags=[1, {"a": True}])
    (tmp_path / "input").write_bytes(stub.inputs[0] or b"")
    assert (np.asarray(Image.open(tmp_path / "input")) == np.asarray(picture.convert("RGB"))).all()
    world.generate(CLIP)
    assert stub.inputs[1] == CLIP.read_bytes()
    first, second = (fields for method, _, _, fields in stub.requests if method == "POST")
    assert first == {"seed": "3", "model": MODEL, "tags": [1, {"a": True}]}
    assert second == {"seed": "0", "model": MODEL}


@pytest.mark.parametrize(
    ("given", "options", "word"),
    [
        ("nowhere.mp4", {}, "nowhere.mp4"),
        ("http://example.com/a.mp4", {}, "URL"),
        (b"bytes", {}, "bytes"),
        ([], {}, "list"),
        (np.zeros((2, 3), np.uint8), {}, r"\(2, 3\)"),
        (np.zeros((2, 3, 4, 3), np.float32), {}, "float32"),
        (CLIP, {"input_type": "image"}, "video"),
        (Image.new("RGB", (4, 4)), {"input_type": "video"}, "image"),
        (None, {"input_type": "sound"}, "sound"),
        (None, {"seed": float("nan")}, "seed"),
        (None, {"prompt": "\ud800"}, "prompt"),
        (None, {"prompt_embeddings": Path("x.pt")}, "prompt_embeddings"),
        (None, {"prompt_embeddings": np.zeros(3)}, "prompt_embeddings"),
        (None, {'a"b': 1}, "a"),
        (None, {"model": "b"}, "model"),
        (None, {"lossless": True}, "lossless"),
        (None, {"progress": 3}, "progress"),
    ],
)
def test_wrong_inputs_never_reach_the_server(
    stub: Stub, given: Any, options: dict[str, Any], word: str
) -> None:
    world = worldline.connect(stub.url)
    with pytest.raises(InputError, match=word):
        world.generate(given, **options)
    assert not stub.paths("POST")


def test_errors_have_the_classes_of_a_local_world(stub: Stub) -> None:
    world = worldline.connect(stub.url)
    for code, kind in (
        ("invalid_value", InputError),
        ("unknown_parameter", TypeError),
        ("request_too_large", InputError),
        ("idempotency_conflict", RemoteError),
        ("internal_error", RemoteError),
    ):
        error = {"code": code, "message": "seed is -1", "param": "seed"}
        stub.failures["POST", "/v1/videos"] = [(400, {"error": error}, {})]
        with pytest.raises(kind, match="seed is -1"):
            world.stream(prompt="x")  # before the first step
    assert isinstance(error_of({"code": "out_of_memory"}), InsufficientMemoryError)
    for body in (b"<html>Bad Gateway</html>", b"[1]", b'{"error": 3}', b'{"detail": "x"}', b""):
        stub.failures["POST", "/v1/videos"] = [(418, body, {})]
        with pytest.raises(RemoteError, match="418"):
            world.stream()
    stub.failures["POST", "/v1/videos"] = [(200, b"<html>Welcome</html>", {})]
    with pytest.raises(RemoteError, match="/v1/videos"):
        world.stream()
    stub.failures["POST", "/v1/videos"] = [(308, b"", {"Location": "https://else/v1/videos"})]
    with pytest.raises(RemoteError, match="https://else/v1/videos"):
        world.stream()


def test_a_refusal(tmp_path: Path) -> None:
    def refuse(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        yield Step("guardrail", 0, 1)
        raise GuardrailRefusal("A guardrail refused the prompt.", "prompt")

    with Stub(tmp_path, refuse) as stub:
        with pytest.raises(GuardrailRefusal, match="refused") as raised:
            worldline.connect(stub.url).generate(prompt="x")
        assert raised.value.stage == "prompt"
        assert not stub.cancelled  # it has ended


def test_busy_servers_are_asked_again_with_the_same_key(stub: Stub) -> None:
    busy = {"error": {"code": "queue_full", "message": "256 jobs wait"}}
    stub.failures["POST", "/v1/videos"] = [
        (429, busy, {"Retry-After": "0.01"}),
        (503, b"", {"Retry-After": "0.01"}),
        (200, b"{", {"Connection": "close"}),  # as good as broken
    ]
    world = worldline.connect(stub.url)
    with pytest.raises(RemoteError):
        world.stream()
    assert (
        len({headers["Idempotency-Key"] for m, _, headers, _ in stub.requests if m == "POST"}) == 1
    )
    stub.failures["POST", "/v1/videos"] = [(429, busy, {"Retry-After": "60"})]
    with pytest.raises(RemoteError, match="256 jobs wait") as raised:
        worldline.connect(stub.url, patience=1).stream()
    assert (raised.value.status, raised.value.code) == (429, "queue_full")
    stub.failures["POST", "/v1/videos"] = [(503, b"", {"x-should-retry": "false"})]
    with pytest.raises(RemoteError, match="503"):
        world.stream()


def test_broken_streams_are_joined_again(tmp_path: Path) -> None:
    taken = {"error": {"code": "too_many_streams", "message": "64"}}

    def slow(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        while len(stub.paths("GET")) < 14:  # models, then streams and records in turn
            yield Step("denoise", len(stub.paths("GET")), 14)
            time.sleep(0.01)
        yield from make(fields, input)

    with Stub(tmp_path, slow) as stub:
        stub.cut = [1, 1, 0, 1]
        steps = worldline.connect(stub.url).stream()
        next(steps)
        stub.failures["GET", "/events"] = [(429, taken, {}), (404, b"", {}), (200, b"none", {})]
        *_, last = steps
        assert last.video is not None
        assert (last.video.frames == noise()).all()
        streams = [headers for _, path, headers, _ in stub.requests if path.endswith("/events")]
        assert len(streams) >= 6
        assert any("Last-Event-ID" in headers for headers in streams)


def test_broken_downloads_begin_again(stub: Stub) -> None:
    world = worldline.connect(stub.url)
    stub.failures["GET", "/content"] = [(200, b"short", {"Content-Length": "9999"})]
    assert (world.generate().frames == noise()).all()
    damaged = [(404, b"", {}), (200, b"<html>Welcome</html>", {})]  # no lossless file, and no other
    stub.failures["GET", "/content"] = damaged
    with pytest.raises(RemoteError, match="no video"):
        world.generate()


def test_other_servers(stub: Stub) -> None:
    """A server of OpenAI's routes alone: no events, no report, no words about its worlds."""
    stub.models[MODEL] = None
    stub.failures["GET", "/events"] = 99 * [(404, b'{"detail": "Not Found"}', {})]
    world = worldline.connect(stub.url)
    assert (world.facts, world.generate(prompt="x").frames.shape) == ({}, noise().shape)
    stub.failures["POST", "/v1/videos"] = [(200, {"detail": "hello"}, {})]
    with pytest.raises(RemoteError, match="/v1/videos"):
        world.generate()


def test_closing_cancels(tmp_path: Path) -> None:
    with Stub(tmp_path, endless) as stub:
        steps = worldline.connect(stub.url).stream(prompt="x")
        steps.close()  # not one step was taken
        [job] = stub.jobs
        assert stub.cancelled == [job]
        steps = worldline.connect(stub.url).stream(prompt="x")
        for step in steps:
            if step.kind == "denoise":
                break
        steps.close()
        assert stub.cancelled == [*stub.jobs]
        with pytest.raises(ZeroDivisionError):
            worldline.connect(stub.url).generate(progress=lambda step: 1 // 0)
        assert stub.cancelled == [*stub.jobs]


def test_ctrl_c_cancels(tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.kind == "denoise":
            raise KeyboardInterrupt

    with Stub(tmp_path, endless) as stub:
        with pytest.raises(KeyboardInterrupt):
            worldline.connect(stub.url).generate(progress=interrupt)
        assert stub.cancelled == [*stub.jobs]


def test_a_cancelled_job_is_an_error(tmp_path: Path) -> None:
    with Stub(tmp_path, endless) as stub:
        steps = worldline.connect(stub.url).stream()
        with stub.changed:
            next(iter(stub.jobs.values()))["status"] = "cancelled"
            stub.changed.notify_all()
        with pytest.raises(RemoteError, match="cancelled"):
            list(steps)
        assert not stub.cancelled


def test_keys_and_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stub(tmp_path, make, key="secret", prefix="/gpu/worlds") as stub:
        with pytest.raises(InputError, match="key"):
            worldline.connect(stub.url)
        assert (worldline.connect(stub.url, "secret").generate().frames == noise()).all()
        monkeypatch.setenv("WORLDLINE_API_KEY", "secret")
        world = worldline.connect(f"{stub.url}/v1/")  # as `base_url` of the official client
        assert repr(world) == f"RemoteWorld('{MODEL}', '{stub.url}')"
        with pytest.raises(InputError, match="api_key"):
            worldline.connect(stub.url, "a\nHost: b")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=x"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", *words.split(), *name], cwd=tmp_path, check=True, capture_output=True
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Stub(tmp_path, make, tls=tls) as stub:
        with pytest.raises(RemoteError, match="certificate"):
            worldline.connect(stub.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert (worldline.connect(stub.url).generate(CLIP).frames == noise()).all()
        with pytest.raises(RemoteError):
            worldline.connect(stub.url.replace("https", "http"))


def test_several_worlds(tmp_path: Path) -> None:
    with Stub(tmp_path, make) as stub:
        stub.models |= {"tiny-Cosmos-Predict2.5-2B": {}}
        with pytest.raises(InputError, match=f"2 worlds.*{MODEL}"):
            worldline.connect(stub.url)
        with pytest.raises(InputError, match=f"did you mean {MODEL}"):
            worldline.connect(stub.url, model=MODEL.lower())
        with pytest.raises(InputError, match=MODEL):
            worldline.connect(stub.url, model="x")
        assert worldline.connect(stub.url, model=MODEL).facts["inputs"] == ["image", "video"]
        stub.models = {}
        with pytest.raises(InputError, match="0 worlds"):
            worldline.connect(stub.url)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost:8000",
            "ftp://host",
            "http://",
            "http://host:99999",
            "http://[::1",
            None,
            8,
        ),
        *(
            "http://user:key@host",
            "http://host/?a=b",
            "http://host/#a",
            "http://ho st/ä",
            "file:///x",
        ),
        f"http://{'a' * 70}.com",
    ],
)
def test_wrong_addresses(url: Any) -> None:
    with pytest.raises(InputError):
        parse_url(url)


def test_addresses() -> None:
    assert parse_url("https://a.b:8443/x/v1/") == (
        *("https://a.b:8443/x", "a.b", 8443, "/x", True),
    )
    assert parse_url("http://[::1]:80")[1:] == ("::1", 80, "", False)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": "1"}, {"patience": -1}])
def test_wrong_seconds(options: Any) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        worldline.connect("http://127.0.0.1:1", **options)


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match=str(port)):
        worldline.connect(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b"", b"HTTP/1.1 200 OK\r\n\r\n[]"])
def test_what_is_no_server_of_ours(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RemoteError, match=str(server.getsockname()[1])):
            worldline.connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_refusal_before_the_whole_body_was_taken() -> None:
    """A server that is sent too much answers, and does not read on."""
    error = b'{"error": {"code": "request_too_large", "message": "give 1 MB"}}'
    head = b"HTTP/1.1 413 X\r\nContent-Length: %d\r\n\r\n" % len(error)
    models = b'{"data": [{"id": "a"}]}'
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(models) + models
                )
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(head + error)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 16):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(InputError, match="1 MB"):
            worldline.connect(url).generate(noise(30, 128, 128))
        thread.join()


class Lines:
    """An answer of which only lines are read."""

    def __init__(self, data: bytes) -> None:
        self.lines = data.splitlines(keepends=True)

    def readline(self, limit: int) -> bytes:
        return self.lines.pop(0) if self.lines else b""


def test_event_streams() -> None:
    events = Events()
    data = (
        b": hello\n\nretry: 250\nid: 4\nevent: progress\r\ndata: {\r\ndata: }\r\n\r\n"
        b"event: x\n\ndata: no json\n\nid: 5\ndata:1\n\nid: 6\ndata: cut"
    )
    found = [(event.name, event.data) for event in events.read(Lines(data))]  # type: ignore[arg-type]
    assert found == [("", None), ("progress", {}), ("message", 1)]
    assert (events.last_id, events.delay) == ("5", 0.25)  # what was cut is no event


def test_torch_is_not_needed(tmp_path: Path) -> None:
    with Stub(tmp_path, make) as stub:
        script = (
            "import sys, worldline\n"
            f"video = worldline.connect({stub.url!r}).generate({str(CLIP)!r})\n"
            "assert video.frames.shape == (5, 17, 31, 3)\n"
            "assert not {'torch', 'fastapi', 'requests', 'httpx'} & {*sys.modules}\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


def test_frames_equal_those_of_a_local_world(tmp_path: Path) -> None:
    name = "tiny-Cosmos-Predict2.5-2B"
    world = worldline.load(name)

    def real(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        assert fields.pop("model") == name
        prompt = fields.pop("prompt")
        numbers = {name: json.loads(value) for name, value in fields.items()}  # texts of a form
        yield from world.stream(input, prompt=prompt, **numbers)

    frames = read_video(CLIP).frames[:7]
    options = {"num_input_frames": 5, "num_video_frames": 9, "num_steps": 2, "guidance": 0.0}
    local = world.generate(frames, prompt="a ball", **options)
    with Stub(tmp_path, real, family="predict2.5") as stub:
        stub.models[name] = stub.models.pop(MODEL)
        remote = worldline.connect(stub.url).generate(frames, prompt="a ball", **options)
    assert (remote.frames == local.frames).all()
    assert remote.fps == local.fps
    assert remote.report["request"] == local.report["request"]
    for video, path in ((remote, tmp_path / "remote.mp4"), (local, tmp_path / "local.mp4")):
        video.save(path)
    assert (tmp_path / "remote.mp4").read_bytes() == (tmp_path / "local.mp4").read_bytes()
