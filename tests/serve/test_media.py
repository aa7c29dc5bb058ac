"""Media of clients: kinds by first bytes, a look inside, data URLs, and URLs."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import ssl
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from worldline.serve import media
from worldline.serve.errors import ApiError
from worldline.serve.media import data_url, fetch_url, is_public, probe, sniff, sniff_file
from worldline.video.write import write_video

PUBLIC = "93.184.216.34"
PEERS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _hang_up() -> Iterator[None]:
    yield
    while PEERS:
        PEERS.pop().close()


def picture(kind: str, size: tuple[int, int] = (48, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def clip(path: Path, count: int = 5) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)
    write_video(frames, path, 24)
    return path


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_pictures_are_known_by_their_first_bytes(kind: str, suffix: str) -> None:
    assert sniff(picture(kind)[:4096]) == ("image", suffix)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_videos_are_known_by_their_first_bytes(suffix: str, tmp_path: Path) -> None:
    other = tmp_path / "picture.png"
    clip(tmp_path / f"clip{suffix}").rename(other)
    assert sniff_file(other) == ("video", suffix)


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"", "empty"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "playlist"),
        (b"<!DOCTYPE html>", "web page"),
        (b"<svg xmlns=''></svg>", "web page"),
        (b"hello", "text"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypM4A ", "audio"),
        (b"\x80\x81\x82", "unknown"),
    ],
)
def test_other_files_are_refused(head: bytes, word: str) -> None:
    with pytest.raises(ApiError) as refusal:
        sniff(head)
    assert refusal.value.code == "unreadable_media"
    assert word in refusal.value.message
    assert refusal.value.param == "input_reference"


def test_a_look_inside(tmp_path: Path) -> None:
    info = asyncio.run(probe(clip(tmp_path / "clip.mp4"), "video"))
    assert (info["frames"], info["height"], info["width"], info["fps"]) == (5, 32, 48, 24)
    still = tmp_path / "still"
    still.write_bytes(picture("PNG"))
    info = asyncio.run(probe(still, "image"))
    assert (info["kind"], info["frames"], info["height"], info["width"]) == ("image", 1, 32, 48)


def bomb(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    zeros = zlib.compress(bytes(1 << 20))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def sound(path: Path) -> Path:
    """An MP4 of silence alone."""
    with av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "case", ["truncated", "bomb", "sound", "noise", "claims", "damaged", "html"]
)
def test_unreadable_media(case: str, tmp_path: Path) -> None:
    path, kind = tmp_path / "secret-place.mp4", "video"
    if case == "truncated":
        data = clip(path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif case == "bomb":
        path.write_bytes(bomb(40_000, 40_000))
        kind = "image"
    elif case == "sound":
        sound(path)
    elif case == "noise":
        path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(4000))
    elif case == "claims":
        path.write_bytes(b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n")
    elif case == "html":
        path.write_bytes(b"<html>" * 100)
    else:
        path.write_bytes(picture("PNG")[:-30])
        kind = "image"
    with pytest.raises(ApiError) as refusal:
        asyncio.run(probe(path, "image" if kind == "image" else "video"))
    assert refusal.value.code == "unreadable_media"
    assert refusal.value.param == "input_reference"
    assert "secret-place" not in refusal.value.message
    assert str(tmp_path) not in refusal.value.message


def test_pictures_of_many_pixels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bomb(9000, 5000))
    with pytest.raises(ApiError, match=r"9000 x 5000.*40 million") as caught:
        asyncio.run(probe(path, "image"))
    width, height = map(int, caught.value.message.rpartition("at most ")[2].split(" x "))
    assert 39_900_000 < width * height <= 40_000_000
    assert width / height == pytest.approx(9000 / 5000, rel=1e-3)


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_CHILD_S", 0.01)
    with pytest.raises(ApiError, match="0 seconds"):
        asyncio.run(probe(clip(tmp_path / "clip.mp4"), "video"))


def test_data_urls() -> None:
    data = picture("PNG")
    text = base64.b64encode(data).decode()
    assert data_url(f"data:image/png;base64,{text}") == data
    assert data_url(f"DATA:;charset=x;BASE64,{text[:40]}\n {text[40:]}".replace("=", "")) == data
    assert data_url("data:,a%20b%00") == b"a b\0"
    assert data_url("data:text/plain;base64," + text.replace("+", "%2B")) == data
    url = base64.urlsafe_b64encode(data).decode()
    assert data_url(f"data:image/png;base64,{url}") == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "unreadable_media"),
        ("data:image/png;base64,", "unreadable_media"),
        ("data:image/png;base64,@@@@", "unreadable_media"),
        ("data:image/png;base64,AAAAA", "unreadable_media"),
        ("data:image/png;base64,é", "unreadable_media"),
        ("file:///etc/passwd,", "unreadable_media"),
        ("data:;base64," + "A" * 4000, "request_too_large"),
        ("data:," + "A" * 1001, "request_too_large"),
    ],
)
def test_wrong_data_urls(url: str, code: str) -> None:
    with pytest.raises(ApiError) as refusal:
        data_url(url, limit=1000)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255", "240.0.0.1"),
        *("192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
        *("ff02::1", "::ffff:127.0.0.1", "::ffff:93.184.216.34", "::127.0.0.1", "2001:db8::1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "localhost", ""),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def never(*_: Any, **__: Any) -> socket.socket:
    raise AssertionError("nothing may be connected")


def resolver(*addresses: str) -> Any:
    def resolve(host: str, port: int, **_: Any) -> Sequence[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]

    return resolve


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://host.example/a.png", "https"),
        ("ftp://host.example/a.png", "https"),
        ("file:///etc/passwd", "https"),
        ("//host.example/a", "https"),
        ("https://host.example:8443/a", "8443"),
        ("https://host.example:99999/a", "URL"),
        ("https://user:pw@host.example/a", "user"),
        ("https:///a", "host"),
        ("https://host.example/a b", "spaces"),
        ("https://host.example\\@evil/", "backslashes"),
        ("https://[::1/a", "URL"),
        ("https://other.example/a", "other.example"),
    ],
)
def test_urls_that_their_text_refuses(url: str, word: str, tmp_path: Path) -> None:
    allowed = ["host.example"]
    with pytest.raises(ApiError) as refusal:
        fetch_url(url, allowed, tmp_path / "x", resolver=resolver(PUBLIC), connect=never)
    assert refusal.value.code == "url_refused"
    assert word in refusal.value.message
    assert "pw" not in refusal.value.message


def test_urls_are_off_by_default(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="off"):
        fetch_url("https://host.example/", None, tmp_path / "x", resolver=never, connect=never)


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("169.254.169.254",),
        ("::ffff:127.0.0.1",),
        ("64:ff9b::a00:1",),
        (PUBLIC, "10.0.0.1"),
        (),
    ],
)
def test_hosts_that_resolve_to_private_places(addresses: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"host\.example") as refusal:
        fetch_url(
            "https://host.example/a.png",
            [],
            tmp_path / "x",
            resolver=resolver(*addresses),
            connect=never,
        )
    assert refusal.value.code == "url_refused"


class Tls:
    """A context that leaves sockets as they are, and keeps the names that it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def wrap_socket(self, plain: socket.socket, server_hostname: str) -> socket.socket:
        self.names.append(server_hostname)
        return plain


def serving(*answers: bytes) -> tuple[Any, list[Any]]:
    """A connect function whose hosts answer so, one after another; the addresses asked for."""
    waiting, asked = list(answers), list[Any]()

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        ours, theirs = socket.socketpair()
        theirs.sendall(waiting.pop(0))
        ours.settimeout(timeout)
        theirs.shutdown(socket.SHUT_WR)
        PEERS.append(theirs)
        return ours

    return connect, asked


def body(data: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


def moved(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def fetch(tmp_path: Path, *answers: bytes, resolve: Any = None, limit: int = 10**6) -> Any:
    connect, asked = serving(*answers)
    tls: Any = Tls()
    kind = fetch_url(
        "https://host.example/a.png?x=1",
        [],
        tmp_path / "x",
        limit=limit,
        resolver=resolve or resolver(PUBLIC),
        connect=connect,
        context=tls,
    )
    return kind, asked, tls.names


def test_a_file_is_fetched_from_the_checked_address(tmp_path: Path) -> None:
    data = picture("JPEG")
    answers = moved("/b.png"), moved("https://other.example/c"), body(data)
    kind, asked, names = fetch(tmp_path, *answers)
    assert kind == ("image", ".jpg")
    assert (tmp_path / "x").read_bytes() == data
    assert asked == [(PUBLIC, 443)] * 3
    assert names == ["host.example", "host.example", "other.example"]


@pytest.mark.parametrize(
    ("answers", "code", "word"),
    [
        ([b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"], "url_refused", "404"),
        ([moved("http://host.example/")], "url_refused", "https"),
        ([moved("https://[::ffff:127.0.0.1]/")], "url_refused", "not public"),
        ([moved("/")] * 4, "url_refused", "3 times"),
        ([body(b"hello")], "unreadable_media", "text"),
        ([body(bytes(2000))], "request_too_large", "MB"),
        ([b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2000)], "request_too_large", "MB"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n\x89PNG"], "url_refused", "host.example"),
        ([b"nonsense"], "url_refused", "host.example"),
    ],
)
def test_answers_that_are_refused(
    answers: list[bytes], code: str, word: str, tmp_path: Path
) -> None:
    def resolve(host: str, port: int, **options: Any) -> Sequence[Any]:
        return resolver(host if ":" in host else PUBLIC)(host, port)

    with pytest.raises(ApiError) as refusal:
        fetch(tmp_path, *answers, resolve=resolve, limit=1000)
    assert (refusal.value.code, word in refusal.value.message) == (code, True)
    assert not (tmp_path / "x").exists()


def test_a_slow_host_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_FETCH_S", 0.2)
    ours, theirs = socket.socketpair()
    theirs.sendall(b"HTTP/1.1 200 OK\r\n")

    def connect(address: Any, timeout: float) -> socket.socket:
        return ours  # without a time limit of its own

    tls: Any = Tls()
    url, target = "https://host.example/", tmp_path / "x"
    with theirs, pytest.raises(ApiError, match="no end"):
        fetch_url(url, [], target, resolver=resolver(PUBLIC), connect=connect, context=tls)


def test_the_certificate_is_checked_by_default(tmp_path: Path) -> None:
    context = ssl.create_default_context()
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    connect, _ = serving(b"no handshake")
    with pytest.raises(ApiError, match="cannot be read"):
        fetch_url(
            "https://host.example/", [], tmp_path / "x", resolver=resolver(PUBLIC), connect=connect
        )
