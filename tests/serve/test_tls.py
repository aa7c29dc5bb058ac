"""URLs of inputs over real TLS: whose certificate is believed, and for which name."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worldline.serve.errors import ApiError
from worldline.serve.urls import fetch_url

HOST, OTHER, ADDRESS = "clips.example", "other.example", "93.184.216.34"
BODY = bytes(range(256)) * 300

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes certificates")


def run(*words: str, folder: Path) -> None:
    subprocess.run(("openssl", *words), cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an authority, and of the certificate of one host."""
    folder = tmp_path_factory.mktemp("tls")
    names = f"subjectAltName=DNS:{HOST}\nauthorityKeyIdentifier=keyid\n"
    (folder / "name.cnf").write_text(names)
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.pem")
    run("req", "-x509", *curve, "-subj", "/CN=authority", *authority, folder=folder)
    run("req", *curve, "-subj", "/CN=host", "-keyout", "key.pem", "-out", "host.csr", folder=folder)
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "name.cnf")
    run("x509", "-req", "-in", "host.csr", *signed, "-out", "host.pem", folder=folder)
    return folder


@pytest.fixture
def port(certificates: Path) -> Iterator[int]:
    """Port of 127.0.0.1 where every connection gets one answer."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "host.pem", certificates / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:  # closed
                return
            try:
                with context.wrap_socket(peer, server_side=True) as secure:
                    secure.recv(65536)
                    secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY))
                    secure.sendall(BODY)
            except OSError:  # refused by the other side
                peer.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def fetch(host: str, port: int, target: Path, context: ssl.SSLContext | None) -> None:
    """Fetch from the local port as if it were a public address."""

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ADDRESS, 443))]

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address == (ADDRESS, 443)
        return socket.create_connection(("127.0.0.1", port), timeout)

    url, allowed = f"https://{host}/a.mp4", [HOST, OTHER]
    given: dict[str, Any] = {"resolver": resolve, "connect": connect, "context": context}
    fetch_url(url, allowed, target, limit=10**6, **given)


def test_a_file_comes_from_a_host_that_is_proven(
    certificates: Path, port: int, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    fetch(HOST, port, tmp_path / "a", context)
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize(("host", "trusted"), [(OTHER, True), (HOST, False)])
def test_hosts_that_are_not_proven(
    certificates: Path, port: int, tmp_path: Path, host: str, trusted: bool
) -> None:
    authority = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with pytest.raises(ApiError) as refusal:
        fetch(host, port, tmp_path / "a", authority if trusted else None)
    assert refusal.value.code == "url_refused"
    assert host in str(refusal.value)
    assert "certificate" in str(refusal.value)
    assert not (tmp_path / "a").exists()
