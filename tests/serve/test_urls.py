"""Inputs in URLs: data URLs, and what may be fetched from where."""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from worldline.serve import urls
from worldline.serve.errors import ApiError
from worldline.serve.urls import data_url, fetch_url, is_public

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(250, 256)) * 20
PUBLIC = "93.184.216.34"
PEERS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _hang_up() -> Iterator[None]:
    yield
    while PEERS:
        PEERS.pop().close()


def test_data_urls() -> None:
    data = PICTURE
    text = base64.b64encode(data).decode()
    assert data_url(f"data:image/png;base64,{text}", 1000) == data
    assert (
        data_url(f"DATA:;charset=x;BASE64,{text[:40]}\n {text[40:]}".replace("=", ""), 1000) == data
    )
    assert data_url("data:,a%20b%00", 1000) == b"a b\0"
    assert data_url("data:text/plain;base64," + text.replace("+", "%2B"), 1000) == data
    url = base64.urlsafe_b64encode(data).decode()
    assert data_url(f"data:image/png;base64,{url}", 1000) == data


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
        fetch_url(url, allowed, tmp_path / "x", limit=1, resolver=resolver(PUBLIC), connect=never)
    assert refusal.value.code == "url_refused"
    assert word in refusal.value.message
    assert "pw" not in refusal.value.message


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
            limit=1,
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
    fetch_url(
        "https://host.example/a.png?x=1",
        [],
        tmp_path / "x",
        limit=limit,
        resolver=resolve or resolver(PUBLIC),
        connect=connect,
        context=tls,
    )
    return asked, tls.names


def test_a_file_is_fetched_from_the_checked_address(tmp_path: Path) -> None:
    data = PICTURE
    answers = moved("/b.png"), moved("https://other.example/c"), body(data)
    asked, names = fetch(tmp_path, *answers)
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
    monkeypatch.setattr(urls, "_FETCH_S", 0.2)
    ours, theirs = socket.socketpair()
    theirs.sendall(b"HTTP/1.1 200 OK\r\n")

    def connect(address: Any, timeout: float) -> socket.socket:
        return ours  # without a time limit of its own

    tls: Any = Tls()
    url, target = "https://host.example/", tmp_path / "x"
    with theirs, pytest.raises(ApiError, match="no end"):
        fetch_url(url, [], target, limit=1, resolver=resolver(PUBLIC), connect=connect, context=tls)


def test_the_certificate_is_checked_by_default(tmp_path: Path) -> None:
    context = ssl.create_default_context()
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    connect, _ = serving(b"no handshake")
    with pytest.raises(ApiError, match="cannot be read"):
        fetch_url(
            "https://host.example/",
            [],
            tmp_path / "x",
            limit=1,
            resolver=resolver(PUBLIC),
            connect=connect,
        )
