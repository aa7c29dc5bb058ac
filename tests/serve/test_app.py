"""Routes, limits and rules of the server, with fake workers."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldline.serve.content import spritesheet
from worldline.serve.errors import ApiError
from worldline.video.write import write_video

from .fake_worker import FakeWorker, Script
from .running import Answer, Running, running

PNG = io.BytesIO()
Image.new("RGB", (96, 64), "grey").save(PNG, "PNG")
BOUNDARY = "x" * 20


@contextmanager
def serving(folder: Path, script: Script | None = None, **settings: Any) -> Iterator[Running]:
    script = script or Script(seconds=0.001)

    def make(world: str, name: str) -> FakeWorker:
        return FakeWorker(world, name, script)

    with running(folder, {"fake": [make("fake", "fake/0")]}, make, **settings) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stated = {"upload_idle_s": 0.5, "max_upload_mb": 3.0, "max_field_mb": 1.0, "streams": 3}
    folder = tmp_path_factory.mktemp("serve") / "data"
    with serving(folder, stated={**stated, "cors_origin": ("https://studio.example",)}) as started:
        yield started


def form(*parts: tuple[str, bytes] | tuple[str, bytes, str], end: bool = True) -> bytes:
    """A multipart body; a third entry is the name of a file."""
    body = b""
    for name, data, *file in parts:
        disposition = f'form-data; name="{name}"' + "".join(f'; filename="{f}"' for f in file)
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
        body += data + b"\r\n"
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def create(server: Running, **fields: Any) -> Any:
    answer = server.ask("POST", "/v1/videos", {"prompt": "a ball", **fields})
    assert answer.status == 200, answer.content
    return answer.json()


def test_json_and_forms_make_equal_jobs(server: Running) -> None:
    fields = {
        "prompt": "a ball é🎈",
        "seed": 3,
        "steps": 2,
        "guidance": 2.5,
        "metadata": {"a": "b"},
    }
    parts = (
        ("prompt", "a ball é🎈".encode()),
        ("seed", b"3"),
        ("extra_params[steps]", b"2"),
        ("guidance", b"2.5"),
        ("metadata[a]", b"b"),
        ("input_reference", b"", ""),
    )
    answers = [
        server.ask("POST", "/v1/videos", fields),
        server.ask("POST", "/v1/videos", form(*parts), MULTIPART),
    ]
    one, other = (answer.json() for answer in answers)
    for name in ("request", "metadata", "size", "seconds", "seed", "model"):
        assert one[name] == other[name], name
    assert answers[0].headers["location"] == f"/v1/videos/{one['id']}"
    assert 250 <= int(answers[0].headers["openai-poll-after-ms"]) <= 5000
    assert answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]


def test_an_input_as_file_data_url_and_id(server: Running) -> None:
    url = f"data:text/plain;base64,{base64.b64encode(PNG.getvalue()).decode()}"
    parts = ("input_reference", PNG.getvalue(), "../../x.mp4"), ("prompt", b"a ball")
    first = server.ask("POST", "/v1/videos", form(*parts), MULTIPART).json()
    kept = server.ask("GET", f"/v1/videos/{first['id']}/content?variant=input")
    assert (kept.status, kept.content) == (200, PNG.getvalue())
    assert kept.headers["content-type"] == "image/png"
    for reference in (
        {"image_url": url},
        {"image_url": {"url": url}},
        url,
        {"input_of": first["id"]},
    ):
        video = create(server, input_reference=reference)
        kept = server.ask("GET", f"/v1/videos/{video['id']}/content?variant=input")
        assert kept.content == PNG.getvalue()
    again = server.ask("POST", "/v1/videos", first["request"])
    assert again.json()["request"] == {
        **first["request"],
        "input_reference": {"input_of": again.json()["id"]},
    }
    assert server.incoming() == []


def test_content_ranges_and_variants(server: Running) -> None:
    id = create(server)["id"]
    assert server.wait(id)["status"] == "completed"
    path = f"/v1/videos/{id}/content"
    whole = server.ask("GET", path)
    assert whole.headers["content-disposition"] == f'attachment; filename="{id}.mp4"'
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    size = len(whole.content)
    for asked, start, end in (("0-9", 0, 10), ("5-", 5, size), ("-4", size - 4, size)):
        part = server.ask("GET", path, headers={"Range": f"bytes={asked}"})
        assert (part.status, part.content) == (206, whole.content[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for ignored in ("bytes=9-2", "bytes=a", "lines=0-1", "bytes=0-1,3-4"):
        assert server.ask("GET", path, headers={"Range": ignored}).status == 200
    beyond = server.ask("GET", path, headers={"Range": f"bytes={size}-"})
    assert (beyond.status, beyond.code) == (416, "range_not_satisfiable")
    known = server.ask("GET", path, headers={"If-None-Match": whole.headers["etag"]})
    assert (known.status, known.content) == (304, b"")
    head = server.ask("HEAD", path)
    assert (head.status, head.headers["content-length"]) == (200, str(size))
    report = server.ask("GET", f"{path}?variant=report")
    assert report.json()["request"]["prompt"] == "a ball"
    assert server.ask("GET", f"{path}?variant=x").code == "invalid_value"
    assert server.ask("GET", f"{path}?variant=input").status == 404


def test_list_by_pages(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        ids = sorted(create(server)["id"] for _ in range(45))
        for order in ("asc", "desc"):
            expected = sorted(ids, reverse=order == "desc")
            found: list[str] = []
            after, deleted = "", ""
            while True:
                path = f"/v1/videos?limit=20&order={order}{after}"
                page = server.ask("GET", path).json()
                found += [video["id"] for video in page["data"]]
                assert (page["object"], page["last_id"]) == ("list", found[-1])
                if not deleted:
                    deleted = found[-1]
                    assert server.ask("DELETE", f"/v1/videos/{deleted}").json()["deleted"]
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            assert found == expected
            ids = [id for id in ids if id != deleted]
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=5"):
            assert server.ask("GET", f"/v1/videos?{query}").code == "invalid_value"


def test_idempotency(server: Running) -> None:
    headers = {"Idempotency-Key": "once"}
    first, second = (
        server.ask("POST", "/v1/videos", {"prompt": "a ball"}, headers).json() for _ in "ab"
    )
    assert first["id"] == second["id"]
    other = server.ask("POST", "/v1/videos", {"prompt": "a cube"}, headers)
    assert (other.status, other.code) == (422, "idempotency_conflict")
    wrong = server.ask("POST", "/v1/videos", {"prompt": "a"}, {"Idempotency-Key": "k" * 256})
    assert wrong.code == "invalid_value"


def test_remix(server: Running) -> None:
    first = create(server, seed=9, num_steps=2)
    answer = server.ask("POST", f"/v1/videos/{first['id']}/remix", {"prompt": "a cube"})
    remix = answer.json()
    assert (remix["seed"], remix["prompt"]) == (9, "a cube")
    assert remix["remixed_from_video_id"] == first["id"]
    path = f"/v1/videos/{first['id']}/remix"
    assert server.ask("POST", path, {"prompt": 3}).code == "invalid_value"
    assert server.ask("POST", path, {}).code == "missing_parameter"
    assert server.ask("POST", path, {"prompt": "a", "seed": 1}).code == "unknown_parameter"


def test_a_video_of_a_world_that_is_not_served(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        id = create(server)["id"]
        server.wait(id)

    def make(world: str, name: str) -> FakeWorker:
        return FakeWorker(world, name)

    with running(tmp_path / "data", {"other": [make("other", "other/0")]}, make) as server:
        assert server.ask("GET", f"/v1/videos/{id}").json()["model"] == "fake"
        for path, fields in (
            (f"/v1/videos/{id}/remix", {}),
            ("/v1/videos/extensions", {"video": {"id": id}}),
        ):
            answer = server.ask("POST", path, {"prompt": "a cube", **fields})
            assert (answer.status, answer.code) == (404, "model_not_found"), path


@pytest.mark.parametrize("route", ["/v1/videos/extensions", "/v1/infer"])
def test_two_inputs_of_two_names(server: Running, route: str) -> None:
    """Neither takes the place of the other, and neither stays in incoming/."""
    picture = PNG.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}".encode()
    file, text = ("input_reference", picture, "a.png"), ("input_reference", url)
    for other in (file, text):
        for video in (("video", picture, "b.png"), ("video", url)):
            answer = server.ask("POST", route, form(other, video, ("prompt", b"a")), MULTIPART)
            assert answer.code == "conflicting_parameters"
            assert server.incoming() == []
        alone = server.ask("POST", route, form(("video", *other[1:]), ("prompt", b"a")), MULTIPART)
        assert alone.status == 200, alone.content


def test_routes_that_are_not_there(server: Running) -> None:
    id = f"video_{'0' * 32}"
    for method, path, status, code in (
        ("GET", "/nothing", 404, "unsupported_route"),
        ("GET", "/v1/videos/", 404, "unsupported_route"),
        ("POST", "/v1/videos/edits", 404, "unsupported_route"),
        ("POST", "/v1/videos/characters", 404, "unsupported_route"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("BREW", "/v1/videos", 405, "method_not_allowed"),
        ("HEAD", "/v1/nothing", 404, ""),
        ("GET", f"/v1/videos/{id}", 404, "video_not_found"),
        ("DELETE", f"/v1/videos/{id}", 404, "video_not_found"),
        ("POST", f"/v1/videos/{id}/cancel", 404, "video_not_found"),
        ("GET", f"/v1/videos/{id}/events", 404, "video_not_found"),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404, "unsupported_route"),
        ("GET", "/v1/videos/video_..", 404, "video_not_found"),
        ("GET", "/page/..%2fapp.py", 404, "unsupported_route"),
        ("GET", "/page/app.py", 404, "unsupported_route"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ):
        answer = server.ask(method, path)
        assert answer.status == status, (path, answer.content)
        assert not code or answer.code == code, path
        assert str(server.store.path) not in answer.content.decode()


def test_models_page_health_and_version(server: Running) -> None:
    listed = server.ask("GET", "/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["fake"]
    assert server.ask("GET", "/v1/models/fake").json() == listed["data"][0]
    assert listed["data"][0]["worldline"]["fields"]["num_steps"]["maximum"] == 1000
    page = server.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/health", "/v1/health/ready", "/v1/health/live"):
        assert server.ask("GET", path).json()["object"] == "health.response"
    assert server.ask("GET", "/v1/version").json()["api"] == "v1"
    assert server.ask("GET", "/v1/metadata").json()["worlds"][0]["id"] == "fake"


def test_hosts_and_origins(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    own = f"http://127.0.0.1:{port}"
    for headers, code in (
        ({"Host": "evil.example"}, "host_refused"),
        ({"Host": "127.0.0.1.evil.example"}, "host_refused"),
        ({"Origin": "http://evil.example"}, "origin_refused"),
        ({"Origin": "null"}, "origin_refused"),
        ({"Origin": "http://127.0.0.1:1"}, "origin_refused"),
        ({"Origin": own.replace("http", "https", 1) + ".evil.example"}, "origin_refused"),
        ({"Origin": own}, ""),
        ({"Host": f"localhost:{port}"}, ""),
        ({"Host": "[::1]:80"}, ""),
    ):
        answer = server.ask("GET", "/v1/models", headers=headers)
        assert answer.status == (403 if code else 200), headers
        assert not code or answer.code == code
        assert "access-control-allow-origin" not in answer.headers
    allowed = server.ask("GET", "/v1/models", headers={"Origin": "https://studio.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://studio.example"
    asks = {"Access-Control-Request-Method": "POST"}
    for origin, status in (("https://studio.example", 204), ("https://other.example", 403)):
        asked = server.ask("OPTIONS", "/v1/videos", headers={**asks, "Origin": origin})
        assert asked.status == status


def test_keys(tmp_path: Path) -> None:
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("first-key", "second-key"))
    with serving(tmp_path / "data", keys=("first-key", "second-key")) as server:
        job = server.ask("POST", "/v1/videos", {"prompt": "a ball"}, one).json()
        path = f"/v1/videos/{job['id']}"
        for headers in (None, {"Authorization": "Bearer other"}, {"Authorization": "first-key"}):
            for asked in (path, "/metrics", "/v1/models", "/nothing"):
                answer = server.ask("GET", asked, headers=headers)
                assert (answer.status, answer.code) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert server.ask("GET", path, headers=one).status == 200
        for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel")):
            assert server.ask(method, path + rest, headers=two).code == "video_not_found"
        body = {"prompt": "a ball", "input_reference": {"id": job["id"]}}
        assert server.ask("POST", "/v1/videos", body, two).code == "video_not_found"
        assert server.ask("GET", "/v1/videos", headers=two).json()["data"] == []
        for asked in ("/", "/health", "/v1/health/live", "/page/page.js"):
            assert server.ask("GET", asked).status == 200


def events(server: Running, path: str, headers: Mapping[str, str] | None = None) -> list[Any]:
    """Names, ids and data of a stream that ends."""
    answer = server.ask("GET", path, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.startswith(b"retry: 2000\n\n")
    found = []
    for block in answer.content.decode().split("\n\n")[1:]:
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if lines:
            found.append((lines["event"], int(lines["id"]), json.loads(lines["data"])))
    return found


def test_events(tmp_path: Path) -> None:
    with serving(tmp_path / "data", Script(seconds=0.1, steps=6), comment_s=0.05) as server:
        id = create(server)["id"]
        found = events(server, f"/v1/videos/{id}/events")
        numbers = [number for _, number, _ in found]
        assert numbers == sorted(set(numbers))
        assert [name for name, _, _ in found].count("completed") == 1
        name, last, video = found[-1]
        assert (name, video["id"], video["status"]) == ("completed", id, "completed")
        progress = [data["progress"] for name, _, data in found if name == "progress"]
        assert progress == sorted(progress)
        assert progress[-1] < 100
        again = events(server, f"/v1/videos/{id}/events", {"Last-Event-ID": str(last)})
        assert [name for name, _, _ in again] == ["completed"]
        assert again[0][1] > last


def test_streams_have_a_limit_and_comments(tmp_path: Path) -> None:
    with serving(tmp_path / "data", stated={"streams": 2}, comment_s=0.05) as server:
        opened = []
        for _ in "ab":
            stream = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
            stream.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while b": still here" not in received:
                received += stream.recv(4096)
            opened.append(stream)
        refused = server.ask("GET", "/v1/events")
        assert (refused.status, refused.code) == (429, "too_many_streams")
        assert int(refused.headers["retry-after"]) <= 120
        for stream in opened:
            stream.close()
        for _ in range(100):
            if not server.queue.num_listeners:
                break
            time.sleep(0.02)
        assert server.queue.num_listeners == 0


def test_streams_that_are_asked_for_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "data", stated={"streams": 2}) as server:
        port = int(server.url.rpartition(":")[2])
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(9)]
        for client in clients:
            client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        statuses = [client.recv(12) for client in clients]
        assert statuses.count(b"HTTP/1.1 200") == 2
        assert statuses.count(b"HTTP/1.1 429") == 7
        for client in clients:
            client.close()


def test_sync(tmp_path: Path) -> None:
    script = Script(seconds=0.01)
    with serving(tmp_path / "data", script, stated={"sync_timeout_s": 1.0}) as server:
        body = {"prompt": "a ball", "seed": 4}
        answer = server.ask("POST", "/v1/videos/sync", body)
        assert (answer.status, answer.headers["content-type"]) == (200, "video/mp4")
        assert answer.headers["x-seed"] == "4"
        assert answer.headers["server-timing"].startswith("text;dur=")
        id = answer.headers["x-video-id"]
        assert server.ask("GET", f"/v1/videos/{id}").json()["status"] == "completed"
        refused = server.ask("POST", "/v1/videos/sync", {"prompt": "refuse this"})
        assert (refused.status, refused.code) == (400, "guardrail_refused")
        assert "this" not in refused.json()["error"]["message"].split()
        failed = server.ask("POST", "/v1/videos/sync", {"prompt": "break it"})
        assert (failed.status, failed.code) == (422, "video_failed")
        script.seconds = 1.0
        late = server.ask("POST", "/v1/videos/sync", body)
        assert (late.status, late.code) == (504, "timeout")
        assert late.headers["x-should-retry"] == "false"
        id = late.json()["error"]["video_id"]
        assert server.ask("POST", f"/v1/videos/{id}/cancel").status == 200


def test_a_client_that_leaves_sync_cancels(tmp_path: Path) -> None:
    with serving(tmp_path / "data", Script(seconds=0.1, steps=100)) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = b'{"prompt": "a ball"}'
            head = "POST /v1/videos/sync HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            while not (jobs := server.ask("GET", "/v1/videos").json()["data"]):
                time.sleep(0.01)
        assert server.wait(jobs[0]["id"])["status"] == "cancelled"


def test_pictures_after_one_that_fails_are_not_made(tmp_path: Path) -> None:
    with serving(tmp_path / "data", Script(seconds=0.1)) as server:
        body = {"prompt": "refuse it", "n": 3}
        answer = server.ask("POST", "/v1/images/generations", body)
        assert (answer.status, answer.code) == (400, "guardrail_refused")
        statuses = [each["status"] for each in server.ask("GET", "/v1/videos").json()["data"]]
        assert statuses == ["cancelled", "cancelled", "failed"]


def test_content_of_videos_that_are_not_completed(tmp_path: Path) -> None:
    with serving(tmp_path / "data", Script(seconds=0.01, steps=10_000)) as server:
        id = create(server, prompt="refuse it")["id"]
        video = server.wait(id)
        assert (video["status"], video["error"]["code"]) == ("failed", "guardrail_refused")
        content = server.ask("GET", f"/v1/videos/{id}/content")
        assert (content.status, content.code) == (422, "video_failed")
        id = create(server)["id"]
        content = server.ask("GET", f"/v1/videos/{id}/content")
        assert (content.status, content.code) == (404, "not_ready")
        server.ask("POST", f"/v1/videos/{id}/cancel")
        assert server.wait(id)["status"] == "cancelled"
        content = server.ask("GET", f"/v1/videos/{id}/content")
        assert (content.status, content.code) == (422, "video_cancelled")


def test_limits_of_the_server(tmp_path: Path) -> None:
    with serving(tmp_path / "data", stated={"max_frames": 9, "max_pixels": 96 * 64}) as server:
        for fields, param in (
            ({"num_frames": 13}, "num_frames"),
            ({"num_video_frames": 13}, "num_video_frames"),
        ):
            answer = server.ask("POST", "/v1/videos", {"prompt": "a ball", **fields})
            assert (answer.status, answer.code) == (400, "invalid_value")
            assert answer.json()["error"]["param"] == param
        assert create(server, num_frames=9, size="96x64")["num_frames"] == 9


def test_a_sheet_of_frames(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 96, 3), np.uint8)

    def write(task: Any) -> None:
        folder = Path(task.folder)
        write_video(frames, folder / "video.mp4", 24)
        (folder / "thumbnail.jpg").write_bytes(b"\xff\xd8")
        (folder / "report.json").write_bytes(b"{}")

    with serving(tmp_path / "data", Script(seconds=0.001, write=write)) as server:
        id = create(server)["id"]
        assert server.wait(id)["status"] == "completed"
        sheet = server.ask("GET", f"/v1/videos/{id}/content?variant=spritesheet")
        assert Image.open(io.BytesIO(sheet.content)).size == (4 * 96, 4 * 64)


@pytest.mark.parametrize("count", [1, 5, 16, 60])
def test_sprites_are_frames_of_the_whole_video(tmp_path: Path, count: int) -> None:
    """The first is at the upper left, the last at the lower right; few are in memory at once."""
    greys = np.linspace(20, 220, count).astype(np.uint8)
    frames = np.broadcast_to(greys[:, None, None, None], (count, 256, 384, 3))
    write_video(frames, tmp_path / "video.mp4", 24)
    spritesheet(tmp_path).unlink()  # what it imports counts no more
    tracemalloc.start()
    path = spritesheet(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sheet = np.asarray(Image.open(path))
    height, width = sheet.shape[0] // 4, sheet.shape[1] // 4
    middles = sheet[height // 2 :: height, width // 2 :: width, 0].ravel()
    expected = np.interp(np.linspace(0, 1, 16), np.linspace(0, 1, count), greys)
    assert np.abs(middles - expected).max() <= 100 / max(1, count - 1) + 4
    assert peak < 8 * frames[0].size


def test_urls_of_this_machine_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "data", stated={"allow_url_inputs": ("*",)}) as server:
        for host in ("localhost", "127.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]"):
            for url in (f"https://{host}/a.png", f"http://{host}/a.png"):
                body = {"prompt": "a ball", "input_reference": {"image_url": url}}
                answer = server.ask("POST", "/v1/videos", body)
                assert (answer.status, answer.code) == (400, "url_refused")
        assert server.incoming() == []


OPENED: list[tuple[str, str | None]] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None and isinstance(arguments[0], str):
        OPENED.append((arguments[0], arguments[1]))


def test_files_of_clients_stay_in_the_folder(tmp_path: Path) -> None:
    """An audit hook sees every file that the API process opens."""
    global OPENED
    sys.addaudithook(_record)
    with serving(tmp_path / "data") as server:
        OPENED = []
        try:
            for reference in ("/etc/passwd", "file:///etc/passwd", {"image_url": "/etc/passwd"}):
                body = {"prompt": "a ball", "input_reference": reference}
                assert server.ask("POST", "/v1/videos", body).status == 400
            parts = ("input_reference", PNG.getvalue(), "/etc/passwd"), ("prompt", b"a ball")
            id = server.ask("POST", "/v1/videos", form(*parts), MULTIPART).json()["id"]
            server.wait(id)
            for variant in ("video", "input", "../../../../etc/passwd"):
                server.ask("GET", f"/v1/videos/{id}/content?variant={variant}")
        finally:
            opened, OPENED = OPENED, None
    below = str(tmp_path / "data")
    assert any(path.startswith(below) for path, _ in opened)
    assert not [path for path, _ in opened if "passwd" in path]
    written = [path for path, mode in opened if mode and set(mode) & set("wax+")]
    assert all(path.startswith(below) for path in written), written


def test_unexpected_errors(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"secret of {server.store.path}")

    monkeypatch.setattr(server.queue, "check", fail)
    answer = server.ask("POST", "/v1/videos", {"prompt": "a ball"})
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.headers["x-should-retry"] == "false"
    assert b"secret" not in answer.content
    assert server.incoming() == []


def test_an_input_for_which_the_disk_has_no_room(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server.ask(
        "POST",
        "/v1/videos",
        form(("input_reference", PNG.getvalue(), "a.png"), ("prompt", b"a")),
        MULTIPART,
    ).json()

    def fail(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copy(source: Path, path: Path) -> None:
        fail(path, source.read_bytes())

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr("worldline.serve.intake._link", copy)
    url = f"data:image/png;base64,{base64.b64encode(PNG.getvalue()).decode()}"
    for reference in (url, {"input_of": first["id"]}):
        body = {"prompt": "a ball", "input_reference": reference}
        answer = server.ask("POST", "/v1/videos", body)
        assert (answer.status, answer.code) == (503, "disk_full")
        assert server.incoming() == []


# what no client should send

WRONG_FIELDS: list[Any] = [
    *({"prompt": value} for value in (1, True, [], {}, "", " ", "x" * 8001, "a\0b", "\ud800")),
    *({"seed": value} for value in (-1, 2**32, 1.5, "7", "🎈", True, [1], {"a": 1}, 1e308)),
    *({"num_steps": value} for value in (0, 1001, -5, "many", 2.5, 10**40)),
    *({"num_frames": value} for value in (0, -1, 1e308, "9 frames", 10**30)),
    *({"guidance": value} for value in (-1, 101, 1e308, "high", [])),
    *({"fps": value} for value in (0, 0.5, 241, "fast", -24)),
    *({"size": value} for value in ("", "x", "96x", "0x0", "96x64x3", 96, "../x..", "-96x64")),
    *({"seconds": value} for value in (0, -1, "nan", "inf", "four", 1e308, [], True)),
    *({"width": value} for value in (0, -1, "wide", 1e9)),
    *({"model": value} for value in ("other", 3, "../../fake", ["fake"], "f" * 10_000)),
    *({"metadata": value} for value in (3, [], {"a": 1}, {"a": {"b": "c"}}, {"x" * 99: ""})),
    *({"user": value} for value in (3, [])),
    *({"extra_params": value} for value in (3, [], "{", "[1]", {"extra_params": {}}, {"a": 1})),
    *(
        {"input_reference": value}
        for value in (
            *(3, [], True, "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "data:"),
            *("data:image/png;base64,!!!!", "data:,", "https://example.org/x.png", {"a": "b"}),
            *({"image_url": 3}, {"image_url": "http://127.0.0.1/x"}, {"id": "../x"}, {"id": 3}, {}),
            *({"id": f"video_{'0' * 32}"}, {"input_of": None}, {"image_url": {"url": []}}),
            *({"id": "a", "input_of": "b"}, {"path": "/etc/passwd"}, {"image_url": "ftp://x/y"}),
            "data:image/png;base64,iVBORw0K",
            "data:video/mp4;base64,I0VYVE0zVQ==",
        )
    ),
    *({name: "/etc/passwd"} for name in ("output_path", "video_path", "prompt_embeddings", "lora")),
    *({name: 1} for name in ("", "🎈", "a" * 10_000, "seed\0", "use_guardrails", "n", "../seed")),
    {"steps": 1, "num_steps": 2},
    {"frames": 9, "num_frames": 5},
    {"size": "96x64", "width": 32},
    {"seconds": 5, "num_frames": 5},
    {"rollout": "pixels"},
    {f"field{n}": 1 for n in range(65)},
    *({"seed": value} for value in (-0.5, 2**32, "1e3", "0x10", "7 ", "٣")),
    *({"size": value} for value in ("96", "96x", "x64", "-96x64", "96x64x3", [96, 64])),
    *({"num_steps": value} for value in (1001, "", None.__class__.__name__)),
    *({"fps": value} for value in (0, 241, "fast")),
    *({"preview_every": value} for value in (-1, 1001)),
]
BODIES: list[bytes] = [
    *(b"", b"null", b"3", b'"x"', b"[]", b"{", b"{'a': 1}", b"\xff\xfe", b'{"seed": NaN}'),
    *(b'{"seed": Infinity}', b'{"seed": 1e999}', b'{"seed": 1, "seed": 2}', b"{}{}", b"\0"),
    *(b"[" * 900_000, b'{"a":' * 100_000, b'{"extra_params":' * 40 + b"1" + b"}" * 40),
    *(b'{"prompt": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b" " * 100, b"<xml/>"),
    b'{"prompt": "' + b"x" * 2_500_000 + b'"}',
]
PICTURES: dict[str, bytes] = {
    "empty": b"",
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "page": b"<html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "text": b"concat:/etc/passwd|/etc/hosts",
    "heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "zip": b"PK\3\4" + bytes(100),
    "noise": bytes(range(256)) * 10,
}
FORMS: dict[str, Callable[[], bytes]] = {
    **{
        name: (lambda data=data: form(("input_reference", data, "a.mp4")))
        for name, data in PICTURES.items()
    },  # type: ignore[misc]
    "wrong field": lambda: form(("video", PNG.getvalue(), "a.png")),
    "two files": lambda: form(*2 * [("input_reference", PNG.getvalue(), "a.png")]),
    "three files without content": lambda: form(*3 * [("input_reference", b"", "")]),
    "three files": lambda: form(*(("f" + str(n), b"x", "a.png") for n in range(3))),
    "seed a file": lambda: form(("seed", b"3", "a.txt")),
    "file and text": lambda: form(
        ("input_reference", PNG.getvalue(), "a.png"), ("input_reference", b"data:,x")
    ),
    "cut short": lambda: form(("input_reference", PNG.getvalue(), "a.png"), end=False),
    "cut in a part": lambda: form(("prompt", b"a ball"))[:-10],
    "no UTF-8": lambda: form(("prompt", b"\xff\xfe")),
    "NUL": lambda: form(("prompt", b"a\0b")),
    "NUL in a name": lambda: form(("pro\0mpt", b"a")),
    "twice": lambda: form(("seed", b"1"), ("seed", b"2")),
    "value and object": lambda: form(("metadata", b"1"), ("metadata[a]", b"2")),
    "object and array": lambda: form(("metadata[a]", b"1"), ("metadata[]", b"2")),
    "brackets": lambda: form(("metadata[a", b"1")),
    "deep": lambda: form(("metadata" + "[a]" * 40, b"1")),
    "deep array": lambda: form(("metadata[][a]", b"1")),
    "many": lambda: form(*((f"field{n}", b"1") for n in range(65))),
    "no name": lambda: f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
    "no form": lambda: b"hello",
    "nothing": lambda: b"",
    "long field": lambda: form(("prompt", b"x" * 1_100_000)),
    "large file": lambda: form(("input_reference", PNG.getvalue() + bytes(3_100_000), "a.png")),
    "long header": lambda: form(("x" * 10_000, b"1")),
    "seed of words": lambda: form(("seed", b"seven")),
    "boolean seed": lambda: form(("seed", b"true")),
    "list seed": lambda: form(("seed[]", b"1")),
    "half a character in metadata": lambda: form(("metadata", b'{"a": "\\ud800"}')),
    "half a character in a text": lambda: form(("extra_params", b'{"prompt": "\\ud800"}')),
    "NUL in a text": lambda: form(("extra_params", b'{"prompt": "a\\u0000b"}')),
    "url": lambda: form(("input_reference[image_url]", b"https://example.org/a.png")),
    "path": lambda: form(("input_reference", b"/etc/passwd")),
}
CONTENT_TYPES = [
    *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png", ""),
    *("multipart/form-data; boundary=", "application/json; charset=utf-16", "application/xml"),
    *("multipart/mixed; boundary=x", "application/json, multipart/form-data", "🎈"),
]


def refused(server: Running, answer: Answer) -> None:
    assert 400 <= answer.status < 500, (answer.status, answer.content[:300])
    assert answer.status != 409
    assert answer.code
    text = answer.content.decode()
    assert "Traceback" not in text
    assert str(server.store.path) not in text
    assert len(text) < 3000
    assert server.incoming() == []


@pytest.mark.parametrize("route", ["/v1/videos", "/v1/videos/sync", "/v1/infer"])
def test_wrong_fields(server: Running, route: str) -> None:
    for fields in WRONG_FIELDS if route == "/v1/videos" else WRONG_FIELDS[::7]:
        try:
            refused(server, server.ask("POST", route, {"prompt": "a ball", **fields}))
        except AssertionError as error:
            raise AssertionError(f"{str(fields)[:200]}: {error}") from error


def test_wrong_bodies(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    for body in BODIES:
        if body != b"{}":
            refused(server, server.ask("POST", "/v1/videos", body, headers))


def test_a_body_of_many_values(server: Running) -> None:
    """It is refused by its text: its values would take a hundred times its bytes."""
    body = b'{"metadata": [' + b"0," * 900_000 + b"0]}"
    answer = server.ask("POST", "/v1/videos", body, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (400, "invalid_json")
    assert "100,000" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", FORMS)
def test_wrong_forms(server: Running, name: str) -> None:
    refused(server, server.ask("POST", "/v1/videos", FORMS[name](), MULTIPART))


def test_wrong_content_types(server: Running) -> None:
    for kind in CONTENT_TYPES:
        headers = {"Content-Type": kind.encode().decode("latin-1")}
        refused(server, server.ask("POST", "/v1/videos", b'{"prompt": "a ball"}', headers))
    for encoding in ("gzip", "br"):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        refused(server, server.ask("POST", "/v1/videos", b"{}", headers))


def raw(server: Running, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to bytes as they are."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(data)
        received = b""
        while b"\r\n\r\n" not in received or not received.rstrip().endswith(b"}"):
            if not (part := client.recv(65536)):
                break
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


POST = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST
        + b"Content-Type: application/json\r\nContent-Type: text/plain\r\n"
        + b"Content-Length: 2\r\n\r\n{}",
        POST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        POST + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{}",
        POST
        + f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n".encode()
        + b"Content-Length: 9999\r\n\r\n"
        + form(("input_reference", PNG.getvalue(), "a.png"), end=False),
        POST + b"Content-Length: 9000000000\r\nContent-Type: application/json\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /v1/videos HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    ],
)
def test_broken_requests(server: Running, data: bytes) -> None:
    status, body = raw(server, data)
    assert 400 <= status < 500
    assert {"message", "type", "param", "code", "request_id"} <= json.loads(body)["error"].keys()
    for _ in range(100):
        if not server.incoming():
            break
        time.sleep(0.02)
    assert server.incoming() == []


def test_silent_clients_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a request and within its headers, the first one's and a later one's."""
    monkeypatch.setattr("worldline.serve.server.KEEP_ALIVE_S", 0.3)
    asked = b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\n"
    with serving(tmp_path / "data", comment_s=0.1) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for data in (b"", asked, asked + b"\r\n", asked + b"\r\n" + asked):
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(data)
                while client.recv(4096):
                    pass
        with socket.create_connection(address, timeout=10) as client:  # an answer takes longer
            client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while received.count(b": still here") < 6:
                received += (part := client.recv(4096))
                assert part


def test_a_client_that_takes_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worldline.serve.server.STALL_S", 0.3)
    size = 30_000_000  # more than the buffers of a connection

    def write(task: Any) -> None:
        for name in ("video.mp4", "thumbnail.jpg", "report.json"):
            Path(task.folder, name).write_bytes(bytes(size if name == "video.mp4" else 9))

    with serving(tmp_path / "data", Script(seconds=0.001, write=write)) as server:
        id = create(server)["id"]
        server.wait(id)
        assert len(server.ask("GET", f"/v1/videos/{id}/content").content) == size
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as client:
            path = f"/v1/videos/{id}/content"
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            time.sleep(1.5)
            received = 0
            with suppress(ConnectionResetError):
                while part := client.recv(1 << 20):
                    received += len(part)
            assert received < size


def test_slow_hosts_hold_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def fetch(*_: Any, **__: Any) -> None:
        ended.wait(20)
        raise ApiError("url_refused", "the host is slow")

    monkeypatch.setattr("worldline.serve.intake.fetch_url", fetch)
    with serving(tmp_path / "data", stated={"allow_url_inputs": ("*",)}) as server:
        names = server.store.incoming
        taken: list[Path] = []
        monkeypatch.setattr(server.store, "incoming", lambda: taken.append(names()) or taken[-1])
        body = {"prompt": "a", "input_reference": {"image_url": "https://example.org/a.png"}}
        askers = [
            threading.Thread(target=server.ask, args=("POST", "/v1/videos", body))
            for _ in range(40)
        ]
        for asker in askers:
            asker.start()
        try:
            url = f"data:image/png;base64,{base64.b64encode(PNG.getvalue()).decode()}"
            for _ in range(500):
                if len(taken) == len(askers):
                    break
                time.sleep(0.01)
            began = time.monotonic()
            create(server, input_reference=url)
            assert time.monotonic() - began < 10
        finally:
            ended.set()
            for asker in askers:
                asker.join()


def test_an_upload_that_breaks_leaves_nothing(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    body = form(("input_reference", PNG.getvalue() * 10, "a.png"), end=False)
    head = (
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: 99999\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(POST + head.encode() + body)
        while not server.incoming():
            time.sleep(0.005)
    for _ in range(200):
        if not server.incoming():
            break
        time.sleep(0.02)
    assert server.incoming() == []


def test_files_of_the_page_need_no_origin_of_their_own(server: Running) -> None:
    """Behind a proxy that changes Host, a browser still names the page's origin of its modules."""
    evil = {"Origin": "http://evil.example"}
    for path in ("/", "/page/page.js", "/page/page.css"):
        assert server.ask("GET", path, headers=evil).status == 200
        assert server.ask("GET", path, headers={**evil, "Host": "evil"}).code == "host_refused"
        assert server.ask("POST", path, headers=evil).code == "origin_refused"
    assert server.ask("GET", "/v1/models", headers=evil).code == "origin_refused"


def test_methods_that_a_route_has_are_named(server: Running) -> None:
    for path, methods in (
        ("/v1/videos", {"GET", "POST"}),
        ("/v1/videos/sync", {"POST"}),
        ("/v1/videos/x", {"GET", "DELETE"}),
    ):
        message = server.ask("PUT", path).json()["error"]["message"]
        assert {*re.findall("GET|POST|DELETE|HEAD", message)} == methods


def test_a_variant_that_was_not_made_and_an_unknown_id(server: Running) -> None:
    id = create(server)["id"]
    server.wait(id)
    answer = server.ask("GET", f"/v1/videos/{id}/content?variant=lossless")
    assert (answer.status, answer.json()["error"]["param"]) == (404, "variant")
    assert "lossless=true" in answer.json()["error"]["message"]
    unknown = f"video_{0:032x}", "video_x"
    messages = [server.ask("GET", f"/v1/videos/{i}").json()["error"]["message"] for i in unknown]
    assert messages[0].replace(unknown[0], unknown[1]) == messages[1]
