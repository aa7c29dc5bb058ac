"""Every exception that worldline raises on purpose, and the words of any.

    Error                        exit status 1
    ├── InputError               2: an argument or a file is wrong (also a ValueError)
    │   ├── CheckpointError      2: weights are absent, damaged, or of another model
    │   └── InsufficientMemoryError  2: the request cannot fit on the device
    ├── DownloadError            1: a released file cannot be fetched
    ├── NonFiniteError           1: latents, logits or frames became NaN or infinite
    └── GuardrailRefusal         3: a guardrail refused the prompt or the video

A command prints the message as one line and exits with `exit_code`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from reprlib import Repr
from types import MappingProxyType
from typing import Any


class Error(Exception):
    """Base of all errors that a program may want to catch.

    Attributes:
        failures: of a batch, errors of its inputs by their places.
    """

    exit_code = 1
    failures: Mapping[int, Error] = MappingProxyType({})

    def __reduce__(self) -> Any:
        return _restored, (type(self), self.args, vars(self))  # to another process


def _restored(kind: type[Error], args: tuple[Any, ...], values: Mapping[str, Any]) -> Error:
    error = kind.__new__(kind, *args)
    vars(error).update(values)
    return error


class InputError(Error, ValueError):
    """An argument, a file or a line of a batch is wrong; found before any weight is read."""

    exit_code = 2


class UnknownOptionError(InputError, TypeError):
    """A keyword or a field that does not exist."""


class CheckpointError(InputError):
    """A checkpoint is absent, incomplete, damaged, unsafe, or does not fit the model."""


class InsufficientMemoryError(InputError):
    """The device has less memory than the request needs."""


class DownloadError(Error):
    """A released file cannot be fetched: no such repository, no access, no connection, damage."""


class NonFiniteError(Error):
    """Numbers of a request are NaN or infinite: the weights are damaged, or a precision too narrow.

    Attributes:
        index: place of the input in its batch.
        report: that of the video that was not made, and "error".
    """

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index
        self.report: dict[str, Any] = {}


class GuardrailRefusal(Error):
    """A guardrail refused; the message never holds the prompt's words.

    Attributes:
        stage: "prompt" or "video"; "prompt and video" where a batch was refused by both.
    """

    exit_code = 3

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


@contextmanager
def blame(index: int) -> Iterator[None]:
    """Give a `NonFiniteError` the place of the input that it is of."""
    try:
        yield
    except NonFiniteError as error:
        error.index = index
        raise


# whether messages name options as flags: while a command runs
as_flags: ContextVar[bool] = ContextVar("as_flags", default=False)


def option(name: str, value: Any = None) -> str:
    """An option as the caller writes it: `dtype='float32'` in Python, else `--dtype float32`."""
    if as_flags.get():
        return f"--{name}" if value is None or value is True else f"--{name} {value}"
    return name if value is None else f"{name}={value!r}"


def brief(value: object, limit: int = 80) -> str:
    """Value for a message, at most `limit` characters of it; long ones are not written first."""
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        return short.repr(value)[:limit]
    except ValueError:  # Python writes no number of thousands of digits
        return f"a huge {type(value).__name__}"


def printable(message: str, limit: int = 1900) -> str:
    """Message for a terminal: at most `limit` characters, control characters escaped.

    As many lines as fit are kept, with the number of the others; both ends of a long one.
    """
    lines = message.strip().split("\n")
    width, room = (limit, limit) if len(lines) == 1 else (limit // 4, limit - 30)
    kept: list[str] = []
    for line in lines:
        if len(line) > width:  # before it is escaped, which would take its time
            line = f"{line[: width // 2]}…{line[1 - width // 2 :]}"
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        line = line if len(line) <= width else f"{line[: width - 1]}…"
        if (room := room - len(line) - bool(kept)) < 0:
            break
        kept.append(line)
    more = len(lines) - len(kept)
    return "\n".join(kept + ([f"and {more:,} more"] if more else []))


def did_you_mean(word: str, known: Sequence[str], cutoff: float) -> str:
    """End of a message about a wrong name: the nearest known name; "" if none is near.

    Args:
        word: the wrong name.
        known: the right names.
        cutoff: smallest similarity, 0 to 1, as of `difflib`.
    """
    close = get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def counted(count: int, noun: str) -> str:
    """A number and what it counts: 1 step, 2,000 steps."""
    return f"{count:,} {noun}{'s' if count > 1 else ''}"


def one_line(error: BaseException) -> str:
    """First line of an error, with its class if it is none of ours."""
    lines = str(error).strip().splitlines()[:1]
    names = [] if lines and isinstance(error, Error) else [type(error).__name__]
    return ": ".join(names + lines)


def strerror(error: BaseException) -> str:
    """Reason that the system gives for an error, which names no file; else its text."""
    return str(getattr(error, "strerror", None) or error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory; imports no torch."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or its cause, is a full disk, which all further files would meet, too."""
    numbers = {getattr(each, "errno", None) for each in (error, error.__cause__)}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT})
