"""Errors of the HTTP interface: one code each, with its status and OpenAI's type."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

from worldline.errors import is_disk_full, strerror

logger = logging.getLogger(__name__)

_INVALID, _MISSING, _SERVER = "invalid_request_error", "not_found_error", "server_error"

# code -> HTTP status and type
CODES: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        (
            *("invalid_value", "missing_parameter", "unknown_parameter", "conflicting_parameters"),
            *("invalid_json", "unreadable_media", "url_refused", "guardrail_refused"),
        ),
        (400, _INVALID),
    ),
    "invalid_api_key": (401, _INVALID),
    **dict.fromkeys(("origin_refused", "host_refused"), (403, "permission_error")),
    **dict.fromkeys(
        ("video_not_found", "model_not_found", "not_ready", "unsupported_route"), (404, _MISSING)
    ),
    "method_not_allowed": (405, _INVALID),
    "expired": (410, _MISSING),
    "request_too_large": (413, _INVALID),
    "unsupported_content_type": (415, _INVALID),
    "range_not_satisfiable": (416, _INVALID),
    **dict.fromkeys(("video_failed", "video_cancelled", "idempotency_conflict"), (422, _INVALID)),
    **dict.fromkeys(("queue_full", "key_limit", "too_many_streams"), (429, "rate_limit_error")),
    "internal_error": (500, _SERVER),
    **dict.fromkeys(("loading", "shutting_down", "no_worker", "disk_full"), (503, _SERVER)),
    "timeout": (504, _SERVER),
}


# of a job whose error is no one's business but the log's
NEUTRAL = "The server failed to make this video; its log has the reason."


def unkept(error: Exception) -> tuple[str, str]:
    """Code and message of a job whose files could not be written."""
    if is_disk_full(error):
        return "disk_full", "The disk of the server is full; the video was not kept."
    logger.error("files cannot be written", exc_info=error)
    return "internal_error", NEUTRAL


class ApiError(Exception):
    """An answer that is not 2xx.

    Attributes:
        code: of CODES.
        message: one sentence without paths of the server and words of a refused prompt.
        param: field of the request.
        retry_after: seconds, where the client may try again.
        extra: further entries of the error, such as video_id.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type = CODES[code]
        self.code, self.message, self.param = code, message, param
        self.retry_after, self.extra = retry_after, dict(extra or {})


def unwritable(error: OSError | sqlite3.Error) -> ApiError:
    """The answer where the disk takes nothing; the log has the reason."""
    logger.error("a write failed: %s", strerror(error))
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if is_disk_full(error) or code == sqlite3.SQLITE_FULL:
        return ApiError("disk_full", "The server's disk is full; try later.", retry_after=60)
    return ApiError("internal_error", "The server cannot write to its disk.")
