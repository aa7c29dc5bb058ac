"""A server in a thread of the test, with fake workers or a real world."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline.serve.app import make_app
from worldline.serve.jobs import Queue, Settings
from worldline.serve.records import Worker
from worldline.serve.server import make_server
from worldline.serve.settings import Access, AppSettings
from worldline.serve.store import Store


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def code(self) -> str:
        """Code of an error, which has the one form."""
        error = self.json()["error"]
        assert {"message", "type", "param", "code", "request_id"} <= error.keys()
        assert error["request_id"] == self.headers["x-request-id"]
        code: str = error["code"]
        return code


@dataclass
class Running:
    """A server that listens."""

    url: str
    store: Store
    queue: Queue
    app: Any
    loop: asyncio.AbstractEventLoop

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """An answer; a body that is no bytes is sent as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            headers.setdefault("Content-Type", "application/json")
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def wait(self, id: str) -> Any:
        """A job's object once it has ended."""
        for _ in range(2000):
            video = self.ask("GET", f"/v1/videos/{id}").json()
            if video["status"] not in ("queued", "in_progress"):
                return video
            time.sleep(0.02)
        raise TimeoutError(id)

    def incoming(self) -> list[Path]:
        return [*(self.store.path / "incoming").iterdir()]


@contextmanager
def running(
    folder: Path,
    worlds: Mapping[str, Sequence[Worker]] | Callable[[], Mapping[str, Sequence[Worker]]],
    make_worker: Callable[[str, str], Worker],
    *,
    stated: Mapping[str, Any] | None = None,
    keys: Sequence[str] = (),
    settings: Settings | None = None,
    comment_s: float = 15.0,
) -> Iterator[Running]:
    """Serve until the block ends."""
    ready, started = threading.Event(), list[Running]()
    problems: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        store = Store(folder)
        made = worlds() if callable(worlds) else worlds
        queue = Queue(store, made, make_worker, settings or Settings(min_free_bytes=0))
        access = Access.parse({"keys": tuple(keys)})
        app = make_app(queue, store, AppSettings.parse(stated or {}), access)
        app.state.videos.comment_s = comment_s
        server = make_server(app, 1)
        listener = socket.create_server(("127.0.0.1", 0))
        await queue.start()
        loop = asyncio.get_running_loop()

        def end() -> None:
            loop.call_soon_threadsafe(setattr, server, "should_exit", True)

        stop.append(end)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started.append(Running(url, store, queue, app, loop))
        ready.set()
        try:
            await server.serve([listener])
        finally:
            await queue.drain(0)
            store.close()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            problems.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(30)
    if problems:
        raise problems[0]
    try:
        for _ in range(1200):
            if started[0].ask("GET", "/health").status == 200:
                break
            time.sleep(0.05)
        yield started[0]
    finally:
        stop[0]()
        thread.join(30)
    assert not problems, problems
