"""Files as such: written whole or not at all, told apart, recognised again; needs no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIGABYTE = 1e9


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is made there takes the name `path` at the end.

    The temporary may become a file or a folder. On any exception, Ctrl-C too, it is removed and
    what `path` held stays.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a crash may leave the new name with an empty file
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def disguise(head: bytes) -> str:
    """Name what often lies in the place of a file that was to be downloaded.

    Args:
        head: the first bytes, 64 or more.

    Returns:
        "web page", "git-lfs pointer", or "".
    """
    text = head.lstrip()[:64].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "web page"
    return "git-lfs pointer" if text.startswith(b"version https://git-lfs") else ""


def stamp(path: Path) -> dict[str, Any]:
    """Return what tells this file, as it is now, from another or a changed one.

    Raises:
        OSError: it cannot be looked at.
    """
    found = path.stat()
    return {"path": str(path.resolve()), "nbytes": found.st_size, "modified": found.st_mtime_ns}
