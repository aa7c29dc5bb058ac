"""Answers as JSON: errors in the one form, lists, and objects."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from worldline.serve.errors import ApiError

MAX_RETRY_S = 120  # above it the official client gives up


class Json(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def to_json(value: Any) -> str:
    """Compact JSON; numbers that it does not know are null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def error_response(error: ApiError, request_id: str, method: str = "GET") -> Json:
    """The answer that an error makes."""
    body = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
        **error.extra,
    }
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(min(MAX_RETRY_S, max(1, math.ceil(error.retry_after))))
    elif error.status in (429, 503):
        headers["Retry-After"] = "5"
    if error.code == "invalid_api_key":
        headers["WWW-Authenticate"] = "Bearer"
    if error.code == "timeout" or (error.status == 500 and method not in ("GET", "HEAD")):
        headers["x-should-retry"] = "false"
    return Json({"error": body}, error.status, headers)
