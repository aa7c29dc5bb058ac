"""HTTP server of the application: uvicorn with our errors, limits and signals."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from worldline.serve.answers import error_response
from worldline.serve.errors import ApiError
from worldline.serve.settings import MAX_HEADER

KEEP_ALIVE_S = 75  # in which the headers of a request must arrive
STALL_S = 300  # for which a client may take nothing of an answer, as a paused player does


class Protocol(H11Protocol):
    """HTTP whose broken requests get the one form of errors, and whose silent clients are left.

    Uvicorn waits for ever for the headers of a request of which one byte has come, or of a first
    one, and for clients that take nothing of an answer; they would take all file descriptors.
    """

    waiting: asyncio.TimerHandle | None = None
    stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self.waiting, self.stalled)):
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        """Close the connection unless the headers of its next request arrive in time."""
        if self.waiting:
            self.waiting.cancel()
        self.waiting = self.loop.call_later(self.timeout_keep_alive, self._leave, self.cycle)

    def _leave(self, last: object) -> None:
        if self.cycle is last:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = ApiError("invalid_value", "the request is no HTTP that can be read")
            answer = error_response(error, f"req_{secrets.token_hex(12)}")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            events = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that leaves signals alone."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: Any, grace_s: int) -> Server:
    """A server that is not started; its signals are the caller's."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it speaks of what we log, too
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
        h11_max_incomplete_event_size=MAX_HEADER,
    )
    return Server(config)
