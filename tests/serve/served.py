"""`worldline serve` in a process of its own, and clients that ask it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Served:
    """A server that listens; its worlds may still be loaded.

    Attributes:
        url: its address, which it has printed.
        log: what it writes to standard error.
    """

    def __init__(self, folder: Path, *words: str, port: int = 0, key: str = "") -> None:
        """Start it on FOLDER/data; `words` are its worlds and further flags."""
        command = [sys.executable, "-m", "worldline", "serve", *words, "--port", str(port)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "WORLDLINE_API_KEY": key}
        self.log, printed = folder / "server.log", folder / "server.out"
        with self.log.open("wb") as log, printed.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--data_dir", str(folder / "data")],
                stderr=log,
                stdout=out,
                env=environment,
            )
        self._key = key
        pattern = r"http://[\d.]+:[1-9]\d*"
        self.url: str = self.until(lambda: re.search(pattern, printed.read_text()))[0]

    def until(self, done: Callable[[], Any], seconds: float = 60) -> Any:
        """What a condition finds, once it does."""
        end = time.monotonic() + seconds
        while not (found := done()):
            alive = self.process.poll() is None and time.monotonic() < end
            assert alive, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return found

    def until_ready(self) -> None:
        self.until(lambda: self.open("/health")[0] == 200)

    def open(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and content of an answer; a body is posted as JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, path: str, body: object = None) -> Any:
        """Object of an answer that is 200."""
        status, answer = self.open(path, body)
        assert status == 200, answer
        return json.loads(answer)

    def resident(self) -> float:
        """Memory of the process, 1e6 bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(60)


def ask_all(
    address: str, asked: Sequence[tuple[str, str, object]], count: int, together: int
) -> Counter[int]:
    """Statuses of `count` requests, of clients that ask at once and keep their connections.

    Args:
        address: of the server.
        asked: method, path and JSON body of each, in turn.
        count: of all requests.
        together: number of clients.
    """
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def ask(first: int) -> None:
        connection = HTTPConnection(str(urlsplit(address).netloc), timeout=60)
        own: Counter[int] = Counter()
        for number in range(first, count, together):
            method, path, body = asked[number % len(asked)]
            data = None if body is None else json.dumps(body)
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            answer.read()
            own[answer.status] += 1
        connection.close()
        with lock:
            statuses.update(own)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses
