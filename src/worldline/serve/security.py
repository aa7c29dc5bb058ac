"""Gate before every route: ids, keys, hosts and origins, the one form of errors, one log line."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from worldline.errors import brief, printable
from worldline.serve.answers import error_response
from worldline.serve.errors import ApiError
from worldline.serve.settings import LOOPBACK, MAX_HEADER, Access, AppSettings

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# called with route, method, status and seconds of an answer
Observer = Callable[[str, str, int, float], None]

ROUTE = "worldline.route"  # where a route leaves its name in the scope
_CLIENT_GONE = 499
_OPEN = ("/", "/health", "/favicon.ico")  # need no key
_OPEN_BELOW = ("/v1/health/", "/page/")
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": _POLICY,
    "cross-origin-resource-policy": "same-origin",
}
_METHODS = "GET, HEAD, POST, DELETE"
_ALLOWED = "authorization, content-type, idempotency-key, last-event-id, range"
_EXPOSED = (
    "content-disposition, content-range, location, openai-poll-after-ms, retry-after, "
    "x-request-id, x-video-id, x-seed"
)


class Gate:
    """ASGI application around another."""

    def __init__(
        self, app: App, settings: AppSettings, access: Access, observe: Observer | None = None
    ) -> None:
        self.app, self.settings, self.access, self.observe = app, settings, access, observe
        self.origins = {origin.rstrip("/").lower() for origin in settings.cors_origin}
        self.hosts = _hosts(access.host) | {host.lower() for host in settings.allowed_host}
        self.any_address = access.host in ("0.0.0.0", "::", "")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id, method, began = f"req_{secrets.token_hex(12)}", scope["method"], time.perf_counter()
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"], state["owner"] = id, ""
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), id, headers.get("origin"))
            await send(message)

        async def refuse(error: ApiError) -> None:
            if not status:
                await error_response(error, id, method)(scope, receive, answer)

        try:
            if response := self._preflight(method, headers):
                await response(scope, receive, answer)
                return
            state["owner"] = self._admit(method, scope["path"], headers)
            await self.app(scope, receive, answer)
        except ApiError as error:
            await refuse(error)
        except (ClientDisconnect, ConnectionError):
            status = status or _CLIENT_GONE
        except Exception as error:
            logger.error("%s: unexpected %s", id, type(error).__name__, extra={"repeats": True})
            logger.debug("%s: its trace", id, exc_info=True)
            await refuse(ApiError("internal_error", "the server failed; its log has more"))
        finally:
            seconds = time.perf_counter() - began
            route = scope.get(ROUTE, "other")
            status = status or _CLIENT_GONE
            if self.observe:
                self.observe(route, method, status, seconds)
            name = printable(f"{method[:10]} {route}", 100)
            line = "%s %s %d %.3f s"
            logger.info(line, id, name, status, seconds, extra={"repeats": True})

    def _admit(self, method: str, path: str, headers: Headers) -> str:
        """Owner of what a request makes.

        Raises:
            ApiError: request_too_large, host_refused, origin_refused, invalid_api_key.
        """
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER:
            message = f"the headers are longer than {MAX_HEADER:,} bytes; send less"
            raise ApiError("request_too_large", message)
        is_open = path in _OPEN or path.startswith(_OPEN_BELOW)
        host = headers.get("host", "")
        is_health = path == "/health" or path.startswith("/v1/health/")
        if not is_health and not self._is_own_host(host):
            message = f"Host {brief(host)} is not this server's; --allowed_host adds one"
            raise ApiError("host_refused", message)
        # a browser names the origin of a page's own modules, too; its files are no secret
        is_page = method in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))
        origins = [] if is_page else headers.getlist("origin")
        if any(not self._is_allowed(origin, host) for origin in origins):
            message = f"Origin {brief(origins[0])} may not use this server; --cors_origin adds one"
            raise ApiError("origin_refused", message)
        if not self.access.keys or is_open:
            return ""
        typed = headers.getlist("authorization")
        scheme, _, key = (typed[0] if len(typed) == 1 else "").partition(" ")
        owner = self.access.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            problem = "the API key is wrong" if typed else "the API key is missing"
            raise ApiError("invalid_api_key", f"{problem}; give Authorization: Bearer KEY")
        return owner

    def _is_own_host(self, host: str) -> bool:
        name = _host_name(host)
        if name in self.hosts:
            return True
        return self.any_address and _is_address(name)  # rebinding needs a name

    def _is_allowed(self, origin: str, host: str) -> bool:
        origin = origin.lower()
        own = origin.partition("://")[2] == host.lower() and self._is_own_host(host)
        return origin in self.origins or (own and origin.startswith(("http://", "https://")))

    def _preflight(self, method: str, headers: Headers) -> Response | None:
        """Answer to a browser that asks whether a page may send a request."""
        origin = headers.get("origin", "").lower()
        asked = "access-control-request-method" in headers
        if method != "OPTIONS" or not asked or origin not in self.origins:
            return None
        allowed = {
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": _ALLOWED,
            "access-control-max-age": "600",
        }
        return Response(status_code=204, headers=allowed)

    def _add_headers(self, headers: MutableHeaders, id: str, origin: str | None) -> None:
        headers["x-request-id"] = id
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        if self.origins:
            headers.add_vary_header("Origin")
        if origin is not None and origin.lower() in self.origins:
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _EXPOSED
            headers["cross-origin-resource-policy"] = "cross-origin"


def _hosts(host: str) -> set[str]:
    """Names by which a bound address is reached."""
    names = {*LOOPBACK}
    if host not in ("0.0.0.0", "::", ""):
        names.add(host.lower().strip("[]"))
    if host not in LOOPBACK:
        names.add(socket.gethostname().lower())
    return names


def _host_name(host: str) -> str:
    """A Host header without its port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def refuse_open_host(host: str, keys: tuple[str, ...], insecure: bool) -> str | None:
    """Why a server must not listen there; None where it may."""
    name = host.strip("[]").lower()
    loopback = name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
    if loopback or keys or insecure:
        return None
    return (
        f"--host {host}: everyone who reaches it could use the server; give --api_key_file, or "
        "--insecure"
    )
