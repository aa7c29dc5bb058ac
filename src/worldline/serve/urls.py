"""Inputs in URLs: data URLs, and files of the public internet; needs no torch."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from worldline.errors import is_disk_full, printable
from worldline.serve.errors import ApiError
from worldline.serve.media import unreadable
from worldline.serve.records import INPUT

_FETCH_S = 20.0
_REDIRECTS = 3
_HTTPS = 443

Resolver = Callable[..., Sequence[Any]]
Connect = Callable[..., socket.socket]

# NAT64, 6to4 and the like carry the address of IPv4 inside; only native ones are public
_NATIVE, _CARRYING = IPv6Network("2000::/3"), (IPv6Network("2001::/23"), IPv6Network("2002::/16"))


def data_url(url: str, limit: int) -> bytes:
    """Contents of a data URL, in base64 or in percent form; its own type is not believed.

    Raises:
        ApiError: unreadable_media, or request_too_large.
    """
    head, comma, text = url.strip().partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise unreadable("the data URL has no comma or does not begin with data:")
    encoded = head.lower().split(";")[-1].strip() == "base64"
    if len(text) > (4 * limit // 3 + 1024 if encoded else 3 * limit):
        raise _too_long(limit)
    if encoded:
        if "%" in text:
            text = unquote_to_bytes(text).decode("latin-1")
        text = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            raise unreadable("the data URL is no valid base64") from None
    else:
        data = unquote_to_bytes(text)
    if len(data) > limit:
        raise _too_long(limit)
    if not data:
        raise unreadable("the data URL is empty")
    return data


def _too_long(limit: int) -> ApiError:
    message = f"{INPUT}: the file is larger than {limit / 1e6:g} MB; give a smaller one"
    return ApiError("request_too_large", message, INPUT)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed not in _NATIVE or any(parsed in network for network in _CARRYING):
            return False
        if parsed.scope_id is not None:
            return False
    return parsed.is_global and not (
        parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified
    )


def fetch_url(
    url: str,
    allowed: Sequence[str],
    target: Path,
    *,
    limit: int,
    resolver: Resolver = socket.getaddrinfo,
    connect: Connect = socket.create_connection,
    context: ssl.SSLContext | None = None,
) -> None:
    """Fetch a file from the public internet; blocks for 20 s at most, beside its resolver.

    Args:
        url: https, of port 443, without a user.
        allowed: names of hosts; empty: every public one.
        target: file that is written; absent after an error.
        limit: bytes.
        resolver: as `socket.getaddrinfo`.
        connect: as `socket.create_connection`, called with a checked address.
        context: of TLS.

    Raises:
        ApiError: url_refused, or request_too_large.
        OSError: the disk is full.
    """
    context = context or ssl.create_default_context()
    deadline = time.monotonic() + _FETCH_S
    for _ in range(_REDIRECTS + 1):
        parts = _checked_url(url, allowed)
        name = parts.hostname or ""
        address = _public_address(name, resolver)
        if time.monotonic() > deadline:
            raise _refused(f"{name} was not found within {_FETCH_S:.0f} seconds")
        location = _get(parts, address, target, (limit, deadline, connect, context))
        if location is None:
            return
        url = urljoin(url, location)
    raise _refused(f"it is redirected more than {_REDIRECTS} times")


def _refused(problem: str) -> ApiError:
    message = f"{INPUT}: {problem}; give another URL, or send the file"
    return ApiError("url_refused", printable(message, 400), INPUT)


def _checked_url(url: str, allowed: Sequence[str]) -> SplitResult:
    """Parts of a URL that may be fetched, as far as its text decides."""
    try:
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise ValueError("it has spaces, backslashes or control characters")
        parts = urlsplit(url)
        name, port = (parts.hostname or "").rstrip("."), parts.port
        if parts.scheme != "https":
            raise ValueError(f"its scheme is {parts.scheme[:20] or 'missing'}, not https")
        if port not in (None, _HTTPS):
            raise ValueError(f"its port is {port}, not {_HTTPS}")
        if "@" in parts.netloc:
            raise ValueError("it names a user")
        if not name:
            raise ValueError("it has no host")
        name = name if ":" in name else name.encode("idna").decode().lower()
    except ValueError as error:  # UnicodeError, too
        raise _refused(f"the URL cannot be used: {error}") from None
    if allowed and name not in {host.lower().rstrip(".") for host in allowed}:
        raise _refused(f"host {name} is not one that this server allows")
    host = f"[{name}]" if ":" in name else name
    return parts._replace(netloc=host, fragment="")


def _public_address(name: str, resolver: Resolver) -> str:
    """One of the addresses of a host, all of which are public."""
    try:
        found = [info[4][0] for info in resolver(name, _HTTPS, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise _refused(f"host {name} has no address") from None
    if not found:
        raise _refused(f"host {name} has no address")
    if not all(is_public(str(address)) for address in found):
        raise _refused(f"host {name} has an address that is not public")
    return str(found[0])


def _get(
    parts: SplitResult,
    address: str,
    target: Path,
    limits: tuple[int, float, Connect, ssl.SSLContext],
) -> str | None:
    """Location of a redirect; None once the body is in the target."""
    limit, deadline, connect, context = limits
    name, late = parts.hostname or "", threading.Event()
    connection = http.client.HTTPConnection(name, _HTTPS)  # of whose socket this takes care
    plain: socket.socket | None = None
    answer: http.client.HTTPResponse | None = None

    def cut() -> None:  # else a host that sends a byte now and then holds us for ever
        late.set()
        if plain is not None:
            with suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    try:
        plain = connect((address, _HTTPS), timeout=max(0.1, deadline - time.monotonic()))
        timer.start()
        connection.sock = context.wrap_socket(plain, server_hostname=name)
        plain = connection.sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "User-Agent": "worldline"}
        headers |= {"Accept": "image/*, video/*", "Accept-Encoding": "identity"}
        connection.request("GET", _ascii(path), headers=headers)
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (
            location := answer.getheader("Location")
        ):
            return location
        if answer.status != 200:
            raise _refused(f"host {name} answered {answer.status}")
        _write(answer, target, limit, late)
        return None
    except ssl.SSLCertVerificationError as error:
        raise _refused(f"the certificate of {name} is not valid: {error.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if is_disk_full(error):
            raise
        reason = getattr(error, "strerror", None) or type(error).__name__
        if late.is_set() or isinstance(error, TimeoutError):
            reason = f"no end within {_FETCH_S:.0f} seconds"
        raise _refused(f"host {name} cannot be read: {reason}") from None
    finally:
        timer.cancel()
        for open_one in (answer, connection, plain):
            if open_one is not None:
                open_one.close()


def _ascii(path: str) -> str:
    """A path as it goes over the wire: other letters in percent form."""
    return "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode()) for c in path)


def _write(
    answer: http.client.HTTPResponse, target: Path, limit: int, late: threading.Event
) -> None:
    """Write a body of at most `limit` bytes; no file is there after an error."""
    if (answer.length or 0) > limit:
        raise _too_long(limit)
    size = 0
    try:
        with target.open("wb") as file:
            while data := answer.read(1 << 16):
                size += len(data)
                if size > limit:
                    raise _too_long(limit)
                file.write(data)
        if late.is_set() or answer.length:
            raise TimeoutError if late.is_set() else ConnectionError(0, "it ended early")
    except BaseException:
        target.unlink(missing_ok=True)
        raise
