"""HTTP server of the application: uvicorn with our errors, limits and signals."""

from __future__ import annotations

import logging
import secrets
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from worldline.serve.answers import error_response
from worldline.serve.errors import ApiError
from worldline.serve.settings import MAX_HEADER

_KEEP_ALIVE_S = 75


class Protocol(H11Protocol):
    """HTTP whose broken requests get the one form of errors."""

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


def make_server(app: Any, grace_s: int) -> uvicorn.Server:
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
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
        h11_max_incomplete_event_size=MAX_HEADER,
    )
    return uvicorn.Server(config)
