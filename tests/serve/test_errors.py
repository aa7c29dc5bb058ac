"""Each error as the official client meets it: its class, its words, and whether it asks again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from worldline.serve.errors import CODES, ApiError

from .fake_worker import FakeWorker, Script
from .running import Running, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCRIPT = Script(seconds=0.001)
CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def make(world: str, name: str) -> FakeWorker:
        return FakeWorker(world, name, SCRIPT)

    folder = tmp_path_factory.mktemp("serve") / "data"
    with running(folder, {"fake": [make("fake", "fake/0")]}, make) as started:
        yield started


@pytest.fixture
def client(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1) as client:
        monkeypatch.setattr(client, "_sleep_for_retry", lambda **_: None)
        yield client


@pytest.mark.parametrize("code", CODES)
def test_errors(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    status, kind = CODES[code]
    assert status != 409
    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise ApiError(code, "words", "field", retry_after=500 if status in (429, 503) else None)

    monkeypatch.setattr(server.store, "get", fail)
    monkeypatch.setattr(server.queue, "check", fail)
    asked = {
        "GET": lambda: client.videos.retrieve(f"video_{'0' * 32}"),
        "POST": lambda: client.videos.create(prompt="a ball"),
    }
    for method, ask in asked.items():
        calls.clear()
        with pytest.raises(CLASSES.get(status, openai.APIStatusError)) as caught:
            ask()
        error = caught.value
        assert (error.code, error.type, error.status_code) == (code, kind, status)
        assert error.param in ("field", "video_id")
        assert error.request_id
        again = status in (429, 503) or (status == 500 and method == "GET")
        assert len(calls) == (2 if again else 1)
        assert int(error.response.headers.get("retry-after", "1")) <= 120


def test_unsupported_routes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/videos/edits", body={}, cast_to=object)
    assert caught.value.code == "unsupported_route"
    with pytest.raises(openai.APIStatusError) as wrong:
        client.put("/videos", body={}, cast_to=object)
    assert (wrong.value.code, wrong.value.status_code) == ("method_not_allowed", 405)
    with pytest.raises(openai.APIStatusError) as other:
        client.post(
            "/videos",
            content=b"x",
            options={"headers": {"Content-Type": "text/plain"}},
            cast_to=object,
        )
    assert (other.value.code, other.value.status_code) == ("unsupported_content_type", 415)


def test_a_job_that_fails_is_returned(client: openai.OpenAI) -> None:
    for prompt, code in (("refuse it", "guardrail_refused"), ("break it", "internal_error")):
        video = client.videos.create_and_poll(prompt=prompt, poll_interval_ms=20)
        assert video.status == "failed"
        assert video.error is not None
        assert video.error.code == code


def test_a_cancelled_job_is_returned(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SCRIPT, "steps", 100_000)
    video = client.videos.create(prompt="a ball")
    client.post(f"/videos/{video.id}/cancel", cast_to=object)
    status: str = client.videos.poll(video.id, poll_interval_ms=20).status
    assert status == "cancelled"


def test_list_by_the_client(client: openai.OpenAI) -> None:
    ids = {client.videos.create(prompt="a ball").id for _ in range(7)}
    listed = [video.id for video in client.videos.list(limit=3, order="asc")]
    assert listed == sorted(set(listed))
    assert ids <= set(listed)
