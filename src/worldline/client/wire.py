"""HTTP of the client: requests that are tried again, forms that are streamed, events, errors."""

from __future__ import annotations

import http.client
import json
import logging
import math
import re
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worldline.errors import (
    Error,
    GuardrailRefusal,
    InputError,
    InsufficientMemoryError,
    UnknownOptionError,
    brief,
    printable,
    strerror,
)

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_LARGEST_JSON = 64 << 20
_LONGEST_LINE = 32 << 20  # of an event: a preview is one line
_LONGEST_WAIT = 120.0  # seconds, of a server's Retry-After
_AGAIN = frozenset({429, 502, 503})
_AGAIN_IF_SAFE = _AGAIN | {500, 504}
# codes by which the caller is at fault
_INPUT_CODES = frozenset(
    {
        *("invalid_value", "missing_parameter", "conflicting_parameters", "invalid_json"),
        *("unreadable_media", "url_refused", "invalid_api_key", "model_not_found"),
        *("request_too_large", "unsupported_content_type", "host_refused", "origin_refused"),
    }
)


class RemoteError(Error):
    """A server does not answer, or answers with an error that is not the caller's.

    Attributes:
        status: of the answer; 0 where there was none, and of a job that failed.
        code: such as "queue_full", or "" from what is no worldline server.
    """

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def error_of(record: Mapping[str, Any], status: int = 0) -> Error:
    """Error of a server's `{code, message, param}`, of the class that a local world raises."""
    code, param = str(record.get("code") or ""), record.get("param")
    message = printable(str(record.get("message") or code or "it gives no reason"))
    if code == "guardrail_refused":
        return GuardrailRefusal(message, "prompt" if param == "prompt" else "video")
    if code == "out_of_memory":
        return InsufficientMemoryError(message)
    if code == "unknown_parameter":
        return UnknownOptionError(message)
    if code in _INPUT_CODES:
        return InputError(message)
    return RemoteError(message, status, code)


@dataclass(frozen=True)
class Body:
    """What a request sends; `chunks` can be called again for another attempt."""

    content_type: str
    length: int
    chunks: Callable[[], Iterator[bytes]]


def json_body(fields: Mapping[str, Any]) -> Body:
    data = json.dumps(fields).encode()
    return Body("application/json", len(data), lambda: iter([data]))


def form_body(fields: Mapping[str, Any], name: str, file: Path, media_type: str) -> Body:
    """Form with a file, which is read while it is sent; lists and objects go as JSON."""
    boundary = secrets.token_hex(16)
    head = b""
    nested = {key: value for key, value in fields.items() if isinstance(value, list | dict)}
    texts = {key: _text(value) for key, value in fields.items() if key not in nested}
    if nested:
        texts["extra_params"] = json.dumps(nested)
    for key, text in texts.items():
        disposition = f'Content-Disposition: form-data; name="{key}"'
        head += f"--{boundary}\r\n{disposition}\r\n\r\n{text}\r\n".encode()
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="input"'
    head += f"--{boundary}\r\n{disposition}\r\nContent-Type: {media_type}\r\n\r\n".encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: {strerror(error).lower()}") from error

    def chunks() -> Iterator[bytes]:
        yield head
        missing = size
        try:
            with file.open("rb") as source:
                while missing and (chunk := source.read(min(_CHUNK, missing))):
                    missing -= len(chunk)
                    yield chunk
        except OSError as error:
            raise InputError(f"{file}: {strerror(error).lower()}") from error
        if missing:
            raise InputError(f"{file}: it became shorter while it was sent")
        yield tail

    length = len(head) + size + len(tail)
    return Body(f"multipart/form-data; boundary={boundary}", length, chunks)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class ServerEvent:
    """One event of a stream; a comment, by which a server shows that it lives, has no name."""

    name: str
    data: Any = None


class Events:
    """Reader of event streams; keeps what the next connection needs.

    Attributes:
        last_id: of the last event.
        delay: seconds until a broken stream is asked for again.
    """

    def __init__(self) -> None:
        self.last_id, self.delay = "", 2.0

    def read(self, response: http.client.HTTPResponse) -> Iterator[ServerEvent]:
        """Events until the stream ends.

        Raises:
            OSError: the connection broke.
            http.client.HTTPException: it ended within a chunk.
        """
        name, data, identity = "", list[str](), self.last_id
        while line := response.readline(_LONGEST_LINE):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if not text:
                self.last_id = identity
                if data:
                    with suppress(ValueError):  # what is no JSON is no event of ours
                        yield ServerEvent(name or "message", json.loads("\n".join(data)))
                name, data = "", []
                continue
            key, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if key == "event":
                name = value
            elif key == "data":
                data.append(value)
            elif key == "id" and "\0" not in value:
                identity = value
            elif key == "retry" and value.isascii() and value.isdigit():
                self.delay = min(int(value[:9]) / 1000, 60.0)
            elif not key:
                yield ServerEvent("")


class Server:
    """Address of a server, with what each request to it needs.

    Attributes:
        url: without a slash at its end.
        patience: seconds for which a request is tried again.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float, patience: float) -> None:
        self.url, self._host, self._port, self._prefix, self._secure = parse_url(url)
        self.patience, self._timeout = patience, timeout
        self._headers = {"User-Agent": "worldline", "Connection": "close"}
        if api_key is not None:
            if not isinstance(api_key, str) or not re.fullmatch(r"[\x21-\x7e]+", api_key):
                raise InputError("api_key has blanks or letters that a header cannot have")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._tls = ssl.create_default_context() if self._secure else None

    def open(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        patience: float | None = None,
    ) -> http.client.HTTPResponse:
        """Answer of 2xx, whose body waits to be read; the caller closes it.

        What a server is too busy for, or a broken connection, is tried again for `patience`.

        Raises:
            InputError: the server refuses what was sent.
            RemoteError: it cannot be reached, or fails.
        """
        begin, pause, breaks = time.monotonic(), 0.5, 0
        patience = self.patience if patience is None else patience
        while True:
            wait = pause
            try:
                response = self._send(method, path, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                failure: Error = self.unreachable(error)
                # a proxy may cut off what is too large without a word
                breaks += isinstance(error, BrokenPipeError | ConnectionResetError)
                again = breaks < 4 and not isinstance(error, ssl.SSLCertVerificationError)
            else:
                if 200 <= response.status < 300:
                    return response
                with closing(response):
                    failure = self._failure(response)
                    again = response.status in (_AGAIN_IF_SAFE if method == "GET" else _AGAIN)
                    again &= response.headers.get("x-should-retry", "") != "false"
                    wait = _retry_after(response.headers.get("Retry-After")) or pause
            if not again or time.monotonic() + wait - begin > patience:
                raise failure
            logger.info("%s; asking again in %.1f s", failure, wait)
            time.sleep(wait)
            pause = min(2 * pause, 8.0)

    def json(self, method: str, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Answer that is a JSON object; arguments are those of `open`."""
        with closing(self.open(method, path, *args, **options)) as response:
            try:
                answer = json.loads(response.read(_LARGEST_JSON))
            except (OSError, http.client.HTTPException) as error:
                raise self.unreachable(error) from error
            except ValueError:
                answer = None
        if not isinstance(answer, dict):
            raise RemoteError(f"{self.url}{path} does not answer as a worldline server does")
        return answer

    def download(self, path: str, file: Path) -> None:
        """Write a body to a file, whole; a broken transfer begins again.

        Raises:
            Error: it cannot be had, or the disk of this machine is full.
        """
        begin = time.monotonic()
        while True:
            with closing(self.open("GET", path)) as response:
                try:
                    with file.open("wb") as target:
                        for chunk in _chunks(response):
                            target.write(chunk)
                    return
                except http.client.HTTPException as error:
                    if time.monotonic() - begin > self.patience:
                        raise self.unreachable(error) from error
                except OSError as error:
                    raise Error(f"{file} cannot be written: {strerror(error)}") from error
            time.sleep(0.5)

    def unreachable(self, error: Exception) -> RemoteError:
        reason = strerror(error) or type(error).__name__
        return RemoteError(f"{self.url} cannot be reached: {reason}; is worldline serve running?")

    def _send(
        self, method: str, path: str, body: Body | None, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        """The first answer, also one that comes before the whole body was taken."""
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        sent = {**self._headers, **headers}
        if body is not None:
            sent |= {"Content-Type": body.content_type, "Content-Length": str(body.length)}
        elif method == "POST":
            sent["Content-Length"] = "0"
        try:
            try:
                chunks = None if body is None else body.chunks()
                connection.request(method, self._prefix + path, chunks, sent)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
            response = connection.getresponse()  # after a broken pipe a refusal may lie there
            if connection.sock is not None:
                connection.sock.close()  # once the response is closed
            return response
        except BaseException:
            connection.close()
            raise

    def _failure(self, response: http.client.HTTPResponse) -> Error:
        record: Any = None
        with suppress(OSError, ValueError, http.client.HTTPException):
            record = json.loads(response.read(1 << 20))
        record = record.get("error") if isinstance(record, dict) else None
        if isinstance(record, dict):
            return error_of(record, response.status)
        place = f"; give {response.headers['Location']}" if "Location" in response.headers else ""
        reason = f"{self.url} answers {response.status} {response.reason}{place:.200}"
        return RemoteError(printable(reason), response.status)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Body in pieces.

    Raises:
        http.client.HTTPException: it is not whole, whatever broke.
    """
    missing = response.length
    try:
        while chunk := response.read(_CHUNK):
            missing = None if missing is None else missing - len(chunk)
            yield chunk
    except OSError as error:
        raise http.client.HTTPException(strerror(error)) from error
    if missing:
        raise http.client.IncompleteRead(b"", missing)


def parse_url(url: str) -> tuple[str, str, int | None, str, bool]:
    """Address of a server: itself, host, port, prefix of paths, whether by TLS.

    Raises:
        InputError: it is none.
    """
    if not isinstance(url, str):
        raise InputError(f"url is {type(url).__name__}; give a text such as http://127.0.0.1:8000")
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        raise InputError(f"{brief(url)} is not the address of a server: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{brief(url)} is not the address of a server; give http://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError("url has a name, a query or a fragment; give the key as api_key")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")  # as of `base_url` elsewhere
    if re.search(r"[^\x21-\x7e]", prefix):
        raise InputError(f"{brief(url)} has blanks or letters that an address cannot have")
    return f"{parts.scheme}://{parts.netloc}{prefix}", host, port, prefix, parts.scheme == "https"


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After, which may be a date; 0 without."""
    seconds = 0.0
    if value:
        with suppress(ValueError, TypeError):
            seconds = float(value)
        if not seconds:
            with suppress(ValueError, TypeError):
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else 0.0
