"""Bodies of requests: JSON objects and multipart forms; files go to disk while they arrive."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from worldline.errors import brief, counted
from worldline.serve.errors import ApiError, unwritable
from worldline.serve.settings import MAX_COMMAS, MAX_DEPTH, MAX_FIELDS, MAX_FILES, AppSettings

_HEAD = 4096  # first bytes of a file, by which its kind is known
_MEGABYTE = 1_000_000
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


class FormText(str):
    """Text of a form, which the type of its field gives a meaning."""


@dataclass
class Upload:
    """A file of a form, on disk."""

    path: Path
    sha256: str
    head: bytes


@dataclass
class Body:
    """What a client posted.

    Attributes:
        values: fields by name.
        uploads: files by name of their field.
    """

    values: dict[str, Any] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        """Give a field or a file another name, which no other may have.

        Raises:
            ApiError: conflicting_parameters.
        """
        places: tuple[dict[str, Any], dict[str, Any]] = self.values, self.uploads
        if sum(name in place for name in (old, new) for place in places) > 1:
            message = f"{old} and {new} are there twice, or both; give one"
            raise ApiError("conflicting_parameters", message, old)
        for place in places:
            if old in place:
                place[new] = place.pop(old)

    def discard(self) -> None:
        """Remove files that no job has taken."""
        for upload in self.uploads.values():
            upload.path.unlink(missing_ok=True)


async def read_body(request: Request, settings: AppSettings, incoming: Callable[[], Path]) -> Body:
    """Fields and files of a request.

    `incoming` makes a fresh path for a file.

    Raises:
        ApiError: the body is too large, too slow, or no valid JSON object or form.
    """
    content_type, options = _content_type(request)
    if content_type == "application/json":
        limit = settings.max_field_mb * _MEGABYTE + _MEGABYTE
        data = b"".join([chunk async for chunk in _chunks(request, settings, limit)])
        values = parse_json(data)
        if not isinstance(values, dict):
            raise ApiError("invalid_json", f"the body is {_called(values)}; give an object")
        _check_count(len(values))
        return Body(values)
    form = _Form(settings, incoming)
    try:
        await _read_form(request, settings, options.get(b"boundary", b""), form)
        form.body.values = _nested(form.texts)
        _check_values(form.body.values)
    except BaseException:
        form.discard()
        raise
    return form.body


def _content_type(request: Request) -> tuple[str, dict[bytes, bytes]]:
    """Type and options of the body."""
    headers = request.headers.getlist("content-type")
    code, advice = "unsupported_content_type", "give application/json or multipart/form-data"
    if len(headers) != 1:
        number = counted(len(headers), "Content-Type header") if headers else "no Content-Type"
        raise ApiError(code, f"the request has {number}; {advice}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(code, "the body is compressed; send it as it is")
    raw, options = parse_options_header(headers[0])
    kind = raw.decode("latin-1").lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(code, f"Content-Type is {brief(kind)}; {advice}")
    charset = options.get(b"charset", b"utf-8").decode("latin-1").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(code, f"charset is {brief(charset)}; give utf-8")
    return kind, options


async def _chunks(request: Request, settings: AppSettings, limit: float) -> AsyncIterator[bytes]:
    """The body as it arrives, within limits of size and time."""
    too_large = ApiError(
        "request_too_large", f"the body is larger than {limit / _MEGABYTE:g} MB; send less"
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    end, size, stream = time.monotonic() + settings.upload_s, 0, request.stream()
    while True:
        idle = min(settings.upload_idle_s, end - time.monotonic())
        try:
            async with asyncio.timeout(max(idle, 0.001)):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"the body did not end, nor go on for {settings.upload_idle_s:g} s; send all"
            raise ApiError("invalid_value", message, "body") from None
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


def parse_json(data: bytes | str) -> Any:
    """A JSON value without NaN, names that are there twice, and deep nesting.

    Raises:
        ApiError: invalid_json; invalid_value where an object holds what no field may hold.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        if text.count(",") > MAX_COMMAS:  # millions of values would take gigabytes and seconds
            message = f"more than {MAX_COMMAS:,} commas; send files in a form"
            raise ApiError("invalid_json", message)
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        if isinstance(value, dict):
            _check_values(value)
        return value
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        message = f"the body is no UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except ValueError as error:  # also numbers of thousands of digits
        message = brief(str(error))
    raise ApiError("invalid_json", f"invalid JSON: {message}; give one object")


def _too_deep() -> ApiError:
    return ApiError("invalid_json", f"values are nested deeper than {MAX_DEPTH}; nest less")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError("conflicting_parameters", f"{brief(twice)} is there twice", twice[:80])
    return values


def _called(value: Any) -> str:
    names = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _check_count(number: int) -> None:
    if number > MAX_FIELDS:
        raise ApiError("invalid_value", f"{number:,} fields; give at most {MAX_FIELDS}")


def _check_values(values: dict[str, Any]) -> None:
    """Refuse what no field may hold: NUL, half a character, infinity, deep nesting."""
    for name, value in values.items():
        for each in _leaves({name: value}):
            if isinstance(each, float) and not math.isfinite(each):
                raise ApiError("invalid_value", f"{brief(name)} is no finite number", name[:80])
            if isinstance(each, str):
                _check_text(each, name)


def _check_text(text: str, name: str) -> None:
    with suppress(UnicodeEncodeError):
        text.encode()
        if "\0" not in text:
            return
    label = name[:80].encode("ascii", "backslashreplace").decode()
    raise ApiError("invalid_value", f"{brief(label)} holds NUL or half a character", label)


def _leaves(value: Any) -> Iterator[Any]:
    """Names and values of a JSON value."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            yield from value
            stack += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            stack += [(each, depth + 1) for each in value]
        else:
            yield value


class _Form:
    """Parts of a form, taken in as they arrive.

    Attributes:
        texts: names and texts, in order.
        ended: whether the last boundary has come.
    """

    def __init__(self, settings: AppSettings, incoming: Callable[[], Path]) -> None:
        self.limit, self.incoming = settings.max_field_mb * _MEGABYTE, incoming
        self.texts: list[tuple[str, FormText]] = []
        self.body = Body()
        self.num_files = 0
        self.ended = False
        self.size = 0
        self.headers: dict[str, bytes] = {}
        self.header, self.value = b"", b""
        self.name, self.text = "", bytearray()
        self.file: IO[bytes] | None = None
        self.path, self.filename = Path(), b""
        self.hash, self.head = hashlib.sha256(), b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self.begin,
            "on_header_field": self.add_header,
            "on_header_value": self.add_value,
            "on_header_end": self.end_header,
            "on_headers_finished": self.open_part,
            "on_part_data": self.add_data,
            "on_part_end": self.end_part,
            "on_end": self.end,
        }

    def begin(self) -> None:
        self.headers = {}
        self.size, self.text = 0, bytearray()

    def add_header(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def add_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def end_header(self) -> None:
        self.headers[self.header.decode("latin-1").lower()] = self.value
        self.header = self.value = b""

    def open_part(self) -> None:
        kind, options = parse_options_header(self.headers.get("content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise ApiError("invalid_value", "a part of the form has no name; give each a name")
        try:
            self.name = options[b"name"].decode()
        except UnicodeDecodeError:
            raise ApiError("invalid_value", "the name of a field is no UTF-8") from None
        _check_text(self.name, self.name)
        if b"filename" not in options:
            _check_count(len(self.texts) + 1)
            return
        self.num_files += 1
        if self.num_files > MAX_FILES:  # also of those in which nothing was chosen
            raise ApiError("invalid_value", f"more than {MAX_FILES} files; give one", self.name)
        if self.name in self.body.uploads:
            message = f"{brief(self.name)} is there twice; give one file"
            raise ApiError("conflicting_parameters", message, self.name[:80])
        self.filename = options[b"filename"]
        self.path, self.hash, self.head = self.incoming(), hashlib.sha256(), b""
        self.file = open(self.path, "xb")  # noqa: SIM115 - closed by end_part or discard

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self.size += end - start
        part = data[start:end]
        if self.file is not None:
            self.file.write(part)
            self.hash.update(part)
            self.head += part[: max(0, _HEAD - len(self.head))]
            return
        if self.size > self.limit:
            message = f"{brief(self.name)} is larger than {self.limit / _MEGABYTE:g} MB"
            raise ApiError("request_too_large", message, self.name[:80])
        self.text += part

    def end_part(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
            if self.filename or self.size:
                upload = Upload(self.path, self.hash.hexdigest(), self.head)
                self.body.uploads[self.name] = upload
            else:  # a page's file chooser in which nothing was chosen
                self.path.unlink(missing_ok=True)
            return
        try:
            self.texts.append((self.name, FormText(self.text.decode())))
        except UnicodeDecodeError:
            message = f"{brief(self.name)} is no UTF-8"
            raise ApiError("invalid_value", message, self.name[:80]) from None

    def end(self) -> None:
        self.ended = True

    def discard(self) -> None:
        """Remove every file."""
        if self.file is not None:
            self.file.close()
            self.path.unlink(missing_ok=True)
        self.body.discard()


async def _read_form(request: Request, settings: AppSettings, boundary: bytes, form: _Form) -> None:
    if not 0 < len(boundary) <= 200:
        message = "the form has no boundary; give multipart/form-data; boundary=…"
        raise ApiError("invalid_value", message, "body")
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in _chunks(request, settings, settings.max_upload_mb * _MEGABYTE):
            parser.write(chunk)
    except (FormParserError, AssertionError):  # its messages quote bytes
        raise ApiError("invalid_value", "the form is damaged; send it again", "body") from None
    except OSError as error:
        raise unwritable(error) from error
    if not form.ended:
        raise ApiError("invalid_value", "the form is cut short; send all of it", "body")


def _nested(texts: Iterable[tuple[str, FormText]]) -> dict[str, Any]:
    """Fields of a form: `a[b]` is in an object, `a[]` in an array."""
    values: dict[str, Any] = {}
    for name, text in texts:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ApiError("invalid_value", f"{brief(name)} is no name of a field", name[:80])
        keys = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
        if len(keys) > MAX_DEPTH:
            raise _too_deep()
        where: Any = values
        for key, following in pairwise(keys):
            empty: Any = [] if following == "" else {}
            inside = where.setdefault(key, empty) if isinstance(where, dict) else None
            if type(inside) is not type(empty):
                raise _conflict(name)
            where = inside
        if isinstance(where, list):
            where.append(text)
        elif where.setdefault(keys[-1], text) != text:
            raise _conflict(name)
    return values


def _conflict(name: str) -> ApiError:
    message = f"{brief(name)} is there twice, or beside others of its name; give one"
    return ApiError("conflicting_parameters", message, name[:80])
