"""ASGI application of a server: its routes, behind the gate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from worldline.errors import brief
from worldline.serve.answers import Json
from worldline.serve.compatible import Compatible
from worldline.serve.errors import ApiError
from worldline.serve.intake import Intake
from worldline.serve.jobs import Queue
from worldline.serve.metrics import Metrics
from worldline.serve.routes import Videos
from worldline.serve.security import ROUTE, Gate
from worldline.serve.settings import Access, AppSettings
from worldline.serve.store import Store

API = "v1"
PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_UNSUPPORTED = ("edits", "characters")  # of OpenAI's, below /v1/videos

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    queue: Queue, store: Store, settings: AppSettings | None = None, access: Access | None = None
) -> FastAPI:
    """The application of a queue; `app.state.videos` and `app.state.metrics` are its parts."""
    settings, access = settings or AppSettings.parse({}), access or Access()
    app = FastAPI(
        title="Worldline", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    release = version("worldline")
    intake = Intake(queue, store, settings)
    videos = Videos(queue, store, settings, intake)
    compatible, metrics = Compatible(videos), Metrics(queue, store, release)
    app.state.videos, app.state.metrics = videos, metrics
    service = Service(queue, metrics, release)

    def add(path: str, method: str, endpoint: Endpoint) -> None:
        async def named(request: Request) -> Response:
            request.scope[ROUTE] = path
            return await endpoint(request)

        app.router.add_route(path, named, methods=[method])

    async def unsupported(request: Request) -> NoReturn:
        raise ApiError("unsupported_route", f"{request.url.path} is not supported here")

    for name in _UNSUPPORTED:
        for method in ("GET", "POST", "DELETE"):
            add(f"/v1/videos/{name}", method, unsupported)
            add(f"/v1/videos/{name}/{{rest:path}}", method, unsupported)
    add("/v1/videos", "POST", videos.create)
    add("/v1/videos", "GET", videos.page)
    add("/v1/videos/sync", "POST", videos.sync)
    add("/v1/videos/extensions", "POST", videos.extend)
    add("/v1/videos/{id}", "GET", videos.retrieve)
    add("/v1/videos/{id}", "DELETE", videos.delete)
    add("/v1/videos/{id}/content", "GET", videos.content)
    add("/v1/videos/{id}/cancel", "POST", videos.cancel)
    add("/v1/videos/{id}/remix", "POST", videos.remix)
    add("/v1/videos/{id}/events", "GET", videos.events)
    add("/v1/events", "GET", videos.events)
    add("/v1/infer", "POST", compatible.infer)
    add("/v1/images/generations", "POST", compatible.images)
    add("/v1/models", "GET", videos.models)
    add("/v1/models/{name:path}", "GET", videos.model)
    for path in ("/health", "/v1/health/ready"):
        add(path, "GET", service.ready)
    add("/v1/health/live", "GET", service.live)
    for path in ("/metrics", "/v1/metrics"):
        add(path, "GET", service.metrics_text)
    add("/v1/version", "GET", service.version)
    add("/v1/metadata", "GET", service.metadata)
    add("/", "GET", service.page)
    add("/page/{name}", "GET", service.page)
    add("/favicon.ico", "GET", service.icon)
    app.add_exception_handler(HTTPException, _as_api_error)
    app.add_middleware(Gate, settings=settings, access=access, observe=metrics.answered)
    return app


async def _as_api_error(request: Request, error: Exception) -> NoReturn:
    """Raise what the router found, in the one form."""
    assert isinstance(error, HTTPException)
    path = brief(request.url.path)
    if error.status_code == 405:
        routes = [
            route
            for route in request.app.routes
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        ]
        same = [route for route in routes if route.path == routes[0].path]
        allowed = sorted(set().union(*(route.methods or () for route in same)) - {"HEAD"})
        message = f"{request.method[:20]} {path}: use {' or '.join(allowed) or 'another method'}"
        raise ApiError("method_not_allowed", message)
    if error.status_code == 404:
        slash = "; leave the last / out" if request.url.path.rstrip("/") != request.url.path else ""
        raise ApiError("unsupported_route", f"{path}: there is no such route{slash}")
    raise ApiError("invalid_value", "the request cannot be read")


class Service:
    """Answers about the server itself."""

    def __init__(self, queue: Queue, metrics: Metrics, release: str) -> None:
        self.queue, self.metrics, self.release = queue, metrics, release
        files = PAGE.iterdir() if PAGE.is_dir() else ()
        self.files = {path.name: path for path in files if path.suffix in _PAGE_TYPES}

    async def live(self, request: Request) -> Response:
        return self._health("live", "The process answers.", 200)

    async def ready(self, request: Request) -> Response:
        status, description = self.queue.health()
        return self._health(status, description, 200 if status == "ready" else 503)

    def _health(self, status: str, description: str, code: int) -> Response:
        body = {"object": "health.response", "description": description, "status": status}
        headers = {"Cache-Control": "no-store"}
        return Json(body, code, headers if code == 200 else {**headers, "Retry-After": "5"})

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=_METRICS_TYPE)

    async def version(self, request: Request) -> Response:
        return Json({"release": self.release, "api": API})

    async def metadata(self, request: Request) -> Response:
        return Json(
            {
                "release": self.release,
                "api": API,
                "licenses": {"worldline": "Apache-2.0"},
                "worlds": [_metadata(name, self.queue) for name in self.queue.worlds],
            }
        )

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self.files:
            raise ApiError("unsupported_route", f"there is no {brief(name)}")
        path = self.files[name]
        headers = {"Cache-Control": "no-cache"}
        return Response(path.read_bytes(), media_type=_PAGE_TYPES[path.suffix], headers=headers)

    async def icon(self, request: Request) -> Response:
        return Response(status_code=204)


def _metadata(name: str, queue: Queue) -> dict[str, Any]:
    """A world, its released files and their licence, where it is a released one."""
    from worldline.catalog import find

    entry, facts = find(name), queue.facts(name)
    return {
        "id": name,
        "family": facts.family if facts else None,
        "repository": getattr(entry, "repository", None),
        "revision": getattr(entry, "revision", None),
        "license": getattr(entry, "licence", None),
        "guardrails": facts.guardrails if facts else None,
    }
