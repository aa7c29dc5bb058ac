"""Exceptions as exit statuses and lines; needs no torch."""

from __future__ import annotations

import errno
import os
import sys

import click

from worldline.errors import Error

INTERRUPTED = 130


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and last line of a command that an exception ends."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "worldline"
        usage = error.format_message().rstrip(".")
        return 2, f"{usage} (see {path} --help)"
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED, "interrupted"
    if isinstance(error, Error):
        return error.exit_code, str(error)
    if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) == errno.EPIPE:
        # whoever read our output has gone; keep the interpreter from flushing into the void
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1, ""
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else "no memory left"
        return 1, f"out of memory: {reason}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}"
    lines = str(error).strip().splitlines()
    text = f": {lines[0]}" if lines else ""
    return 1, f"unexpected {type(error).__name__}{text} (--debug shows the trace)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had too little memory; imports no torch."""
    torch = sys.modules.get("torch")
    kinds: tuple[type[BaseException], ...] = (MemoryError,)
    if torch is not None:
        kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds)
