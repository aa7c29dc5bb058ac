"""Media of clients: kind by first bytes, a look inside by a child process, data URLs and URLs.

Needs no torch. As a program, `python -m worldline.serve.media FILE KIND`, it is that child: it
opens a file with little memory and prints its measurements as JSON.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import os
import re
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from worldline.serve.errors import ApiError
from worldline.serve.records import MediaKind

PARAM = "input_reference"
HEAD = 4096  # bytes that decide the kind of a file
MAX_PIXELS = 40_000_000  # of a frame
MAX_BYTES = 200_000_000  # of a body
_CHILD_S = 20.0
_CHILD_BYTES = 1_000_000_000  # of address space, beyond the child's own
_FETCH_S = 20.0
_REDIRECTS = 3
_HTTPS = 443

_FORMATS = "give a png, jpeg or webp image, or an mp4, mov, mkv, webm or gif video"
_BRANDS = {  # of ISO files that are no videos we take
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "a HEIC picture"),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF picture"),
    **dict.fromkeys((b"M4A ", b"M4B "), "audio"),
}
_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # that begin a MOV without ftyp
_OTHERS = (  # first bytes -> kind, for messages
    (b"#EXTM3U", "a playlist"),
    (b"%PDF", "a PDF file"),
    (b"PK\3\4", "a zip file"),
    (b"ID3", "audio"),
    (b"OggS", "an Ogg file"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"\x1f\x8b", "a gzip file"),
)


def sniff(head: bytes) -> tuple[MediaKind, str]:
    """Kind and suffix of a file by its first 4096 bytes, or by all of a shorter one.

    Raises:
        ApiError: unreadable_media.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image", ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", ".jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image", ".webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "video", ".gif"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video", ".webm" if b"\x42\x82\x84webm" in head[:HEAD] else ".mkv"
    kind = ""
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12], "")
        if not kind:
            return "video", ".mov" if head[8:12] == b"qt  " else ".mp4"
    elif head[4:8] in _BOXES:
        return "video", ".mov"
    if not head:
        raise _unreadable("the file is empty")
    kind = kind or next((kind for start, kind in _OTHERS if head.startswith(start)), "")
    if not kind:
        page = head.lstrip()[:64].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg"))
        text = head.isascii() and b"\0" not in head
        kind = "a web page" if page else "text" if text else "of an unknown kind"
    raise _unreadable(f"the file is {kind}")


def sniff_file(path: Path) -> tuple[MediaKind, str]:
    """Kind and suffix of a file, as of `sniff`."""
    with path.open("rb") as file:
        return sniff(file.read(HEAD))


def _unreadable(problem: str) -> ApiError:
    advice = "" if "; " in problem else f"; {_FORMATS}"
    return ApiError("unreadable_media", f"{PARAM}: {problem}{advice}", PARAM)


async def probe(path: str | Path, kind: MediaKind) -> dict[str, Any]:
    """Measurements of a media file by a child process: kind, frames, height, width, fps, notes.

    All packets are read, the first frame is decoded, with little memory and time.

    Args:
        path: the file.
        kind: that its first bytes have.

    Raises:
        ApiError: unreadable_media.
    """
    # one arena and one thread: else each reserves address space
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    words = (sys.executable, "-P", "-m", "worldline.serve.media", str(path), kind)
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    output = b""
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _CHILD_S)
    except TimeoutError:
        raise _unreadable(f"it cannot be read within {_CHILD_S:.0f} seconds") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:  # it was killed, or failed in a way of its own
        raise _unreadable("it cannot be decoded with 1 GB of memory") from None
    if "error" in answer:
        raise _unreadable(str(answer["error"]))
    return answer


def measure(path: Path, kind: MediaKind) -> dict[str, Any]:
    """Measurements of a file, or {"error"}; in the child."""
    from PIL import Image

    from worldline.errors import InputError, printable
    from worldline.video.read import probe as read_measurements

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours
    try:
        if kind == "image":
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                width, height = picture.size
            if problem := _too_large(width, height):
                return {"error": problem}
        info = read_measurements(path)
    except InputError as error:
        problem = printable(str(error).replace(f"{path}: ", "").replace(str(path), "it"))
        if kind == "video" and "truncated" in problem:  # its first bytes are those of a video
            reason = problem.rpartition(": ")[2]
            problem = f"the video is damaged or cut short ({reason}); send the whole file"
        return {"error": problem}
    except MemoryError:
        return {"error": "it cannot be decoded with 1 GB of memory"}
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        return {"error": f"it is damaged ({type(error).__name__})"}
    if info.kind != kind:
        return {"error": f"it begins like a file of type {kind} and is none"}
    if problem := _too_large(info.width, info.height):
        return {"error": problem}
    return info._asdict()


def _too_large(width: int, height: int) -> str:
    if width * height <= MAX_PIXELS:
        return ""
    scale = math.sqrt(MAX_PIXELS / (width * height))
    most = f"{max(1, int(width * scale))} x {max(1, int(height * scale))}"
    pixels = f"{width} x {height} pixels are more than {MAX_PIXELS / 1e6:.0f} million"
    return f"{pixels}; scale it down to at most {most}"


def _confine() -> None:
    """Take as little of the machine as a child that opens unknown files may have."""
    with suppress(AttributeError, OSError):  # macOS has none; one thread decodes
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import av  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401

    import worldline.video.read  # noqa: F401

    for limit, value in (
        (resource.RLIMIT_CPU, int(_CHILD_S)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    with suppress(OSError, ValueError):  # macOS has no such file
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _CHILD_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def data_url(url: str, limit: int = MAX_BYTES) -> bytes:
    """Contents of a data URL, in base64 or in percent form; its own type is not believed.

    Raises:
        ApiError: unreadable_media, or request_too_large.
    """
    head, comma, text = url.strip().partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise _unreadable("the data URL has no comma or does not begin with data:")
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
            raise _unreadable("the data URL is no valid base64") from None
    else:
        data = unquote_to_bytes(text)
    if len(data) > limit:
        raise _too_long(limit)
    if not data:
        raise _unreadable("the data URL is empty")
    return data


def _too_long(limit: int) -> ApiError:
    message = f"{PARAM}: the file is larger than {limit / 1e6:g} MB; give a smaller one"
    return ApiError("request_too_large", message, PARAM)


Resolver = Callable[..., Sequence[Any]]
Connect = Callable[..., socket.socket]

# NAT64, 6to4 and the like carry the address of IPv4 inside; only native ones are public
_NATIVE, _CARRYING = IPv6Network("2000::/3"), (IPv6Network("2001::/23"), IPv6Network("2002::/16"))


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
    allowed: Sequence[str] | None,
    target: Path,
    *,
    limit: int = MAX_BYTES,
    resolver: Resolver = socket.getaddrinfo,
    connect: Connect = socket.create_connection,
    context: ssl.SSLContext | None = None,
) -> tuple[MediaKind, str]:
    """Kind and suffix of a file that is fetched from the public internet; blocks for 20 s at most.

    Args:
        url: https, of port 443, without a user.
        allowed: names of hosts; empty: every public one; None: none at all.
        target: file that is written; absent after an error.
        limit: bytes.
        resolver: as `socket.getaddrinfo`.
        connect: as `socket.create_connection`, called with a checked address.
        context: of TLS.

    Raises:
        ApiError: url_refused, unreadable_media, or request_too_large.
    """
    if allowed is None:
        raise _refused("URL inputs are off", "send the file, or a data URL")
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
            try:
                return sniff_file(target)
            except ApiError:
                target.unlink(missing_ok=True)
                raise
        url = urljoin(url, location)
    raise _refused(f"it is redirected more than {_REDIRECTS} times")


def _refused(problem: str, advice: str = "give another URL, or send the file") -> ApiError:
    from worldline.errors import printable

    return ApiError("url_refused", printable(f"{PARAM}: {problem}; {advice}", 400), PARAM)


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


if __name__ == "__main__":
    _confine()
    print(json.dumps(measure(Path(sys.argv[1]), "image" if sys.argv[2] == "image" else "video")))
