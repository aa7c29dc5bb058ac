"""What commands print: lines, results and, with --log_json, events; none that fails ends a run.

Results of work (a video that was made) may be lost with a closed pipe or a full disk; where the
output is all that a command is for (a list, a help), it is written by click, which raises.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

import click

from worldline.errors import InputError, printable, strerror
from worldline.events import EVENT, report_event


class Dropping:
    """A text stream that goes nowhere from the first failure on, such as a closed pipe's."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)


def silence(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Occupy closed standard streams, so that no file of the run takes their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number; it cannot be written
            if number:
                setattr(sys, name, os.fdopen(number, "w", closefd=False))


class Lines(logging.StreamHandler[Any]):
    """Log records as lines on standard error; a notice appears once, however many models load."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.setLevel(level)
        self.notices: set[str] = set()

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"worldline: {prefix}{printable(record.getMessage())}"

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        once = logging.INFO <= record.levelno < logging.ERROR and not hasattr(record, "repeats")
        if record.levelno != EVENT and not (once and line in self.notices):
            self.notices.add(line)
            super().emit(record)


class Events(logging.FileHandler):
    """Log records, stages and results as JSON, one a line, at the end of a file."""

    def __init__(self, path: str) -> None:
        """Raise `InputError` unless `path` can be written, and holds nothing but events."""
        try:
            if os.path.isfile(path):
                with open(path, "rb") as earlier:
                    if line := earlier.readline(1 << 16):
                        json.loads(line)["event"]
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            reason = f"--log_json {path}: {strerror(error)}; give a file in a folder"
            raise InputError(reason) from error
        except (ValueError, TypeError, LookupError, RecursionError):
            raise InputError(f"--log_json {path}: it holds no events; give a new file") from None
        self.setLevel(EVENT)

    def format(self, record: logging.LogRecord) -> str:
        kind = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        event = {"time": round(record.created, 3), "event": kind, "message": record.getMessage()}
        return json.dumps(event | getattr(record, "event", {}))

    def handleError(self, record: logging.LogRecord) -> None:
        """An event that cannot be written is lost."""


class Results:
    """Lines about what was made, on standard output.

    Attributes:
        quiet: whether the last one alone is printed, by `finish`.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.last = ""

    def add(self, line: str) -> None:
        report_event("result", line)
        if self.quiet:
            self.last = line
        else:
            self._print(line)

    def finish(self) -> None:
        if self.last:
            self._print(self.last.rpartition("\n")[2])
        self.quiet, self.last = False, ""

    def _print(self, line: str) -> None:
        try:
            click.echo(line.encode("utf-8", "backslashreplace").decode())  # names may be no UTF-8
        except OSError:
            silence(sys.stdout)


results = Results()
