"""A hub on this machine that serves made-up repositories, and fails on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What it serves, and what goes wrong.

    Attributes:
        repositories: "owner/name" -> file -> content.
        drops: file -> after how many bytes of an answer the connection breaks, one answer each.
        damaged: file -> how many times a byte of it comes wrong.
        fails: file -> how many times the server answers 503.
        refused: repository -> status and error code for its files.
        small: files that are in git itself, with git's hash.
        raw: file, or "" for every list -> status, headers and body of all its answers.
        listed: file -> what its entry in the list has in place of the true values.
        endless: file -> how many times its content is sent in one answer.
        asked: method, path and range of every request.
        logins: the login of every request for a file.
        files_at: address of another host that holds the files; "" is this one.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    drops: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    damaged: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    fails: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    raw: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    endless: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)
    files_at: str = ""
    address: str = ""

    def listing(self, repository: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.repositories[repository].items():
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
            if name not in self.small:
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 1}
            siblings.append(entry | self.listed.get(name, {}))
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}

    def fetched(self, name: str) -> list[str]:
        """Return the ranges in which a file was asked for."""
        return [span for method, path, span in self.asked if method == "GET" and path == name]


class QuietServer(ThreadingHTTPServer):
    """A server of threads that prints no trace, where a client hangs up, into what a test reads."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port of this machine."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            # a data set is a repository "datasets/owner/name"
            path = path.replace("/api/datasets/", "/api/models/datasets/")
            parts = 3 if "datasets/" in path else 2
            if path.startswith("/api/models/") and "" in hub.raw:
                status, headers, body = hub.raw[""]
                self.reply(body, headers, status)
                return
            if path.startswith("/api/models/"):
                repository = "/".join(path.split("/")[3 : 3 + parts])
                if repository not in hub.repositories:
                    self.refuse(404, "RepoNotFound")
                    return
                self.reply(json.dumps(hub.listing(repository)).encode(), {})
                return
            if path.count("/") < 5:  # such as what huggingface_hub asks of its own accord
                self.refuse(404, "")
                return
            words = path.strip("/").split("/")
            _, commit, *rest = words[parts:]
            repository, file = "/".join(words[:parts]), "/".join(rest)
            with lock:
                hub.asked.append((self.command, file, self.headers.get("Range", "")))
                hub.logins.append(self.headers.get("Authorization"))
            if file in hub.raw and self.command == "GET":
                status, headers, body = hub.raw[file]
                self.reply(body, headers, status)
            elif repository in hub.refused:
                self.refuse(*hub.refused[repository])
            elif file not in hub.repositories.get(repository, {}):
                self.refuse(404, "EntryNotFound")
            elif self.command == "GET" and hub.files_at:
                self.reply(b"", {"Location": hub.files_at + self.path}, 302)
            else:
                self.serve(file, hub.repositories[repository][file], commit)

        def serve(self, file: str, content: bytes, commit: str) -> None:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            with lock:
                if self.command == "GET" and hub.fails[file]:
                    hub.fails[file] -= 1
                    self.refuse(503, "")
                    return
                broken = hub.drops[file].pop(0) if self.command == "GET" and hub.drops[file] else -1
                if self.command == "GET" and hub.damaged[file]:
                    hub.damaged[file] -= 1
                    content = bytes([content[0] ^ 1]) + content[1:]
            span = self.headers.get("Range", "")
            begin = int(span.removeprefix("bytes=").split("-")[0]) if span and hub.ranges else 0
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            if begin > len(content) or (begin and begin == len(content)):
                self.reply(b"", {}, 416)
                return
            content = content[begin:] * hub.endless.get(file, 1)
            self.reply(content, headers, 206 if begin else 200, broken)

        def refuse(self, status: int, code: str) -> None:
            self.reply(b"", {"X-Error-Code": code} if code else {}, status)

        def reply(
            self, body: bytes, headers: dict[str, str], status: int = 200, broken: int = -1
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # the client has what it wants
                    self.wfile.write(body if broken < 0 else body[:broken])
            if broken >= 0:
                self.close_connection = True

    server = QuietServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
