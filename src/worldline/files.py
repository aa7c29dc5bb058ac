"""Files as such: written whole or not at all, told apart, recognised again; needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError

GIGABYTE = 1e9
# a whole transformer in NVIDIA's layout, in order of preference
TRANSFORMER_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt")
_FIRST_OF_DIFFUSERS = "diffusion_pytorch_model"
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload")


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


def folded(name: str) -> str:
    """Return what two names have in common where a file system, as macOS has, ignores case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def stamp(path: Path) -> dict[str, Any]:
    """Return what tells this file, as it is now, from another or a changed one.

    Raises:
        OSError: it cannot be looked at.
    """
    found = path.stat()
    return {"path": str(path.resolve()), "nbytes": found.st_size, "modified": found.st_mtime_ns}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, such as a config.json.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(settings).__name__}")
    return settings


def released_folders(checkpoint_dir: Path, name: str, revision: str = "") -> list[Path]:
    """List the folders below `checkpoint_dir` that may hold a released model.

    That is a folder of its whole name or of the last part of it, or a hub cache.

    Args:
        checkpoint_dir: holds the folders of models.
        name: on the hub, such as "nvidia/Cosmos-Predict2.5-2B".
        revision: of the snapshot that is preferred in a cache.
    """
    cache = checkpoint_dir / f"models--{name.replace('/', '--')}"
    try:
        current = (cache / "refs" / "main").read_text().strip()
    except OSError:
        current = ""
    snapshots = sorted(
        (path for path in cache.glob("snapshots/*") if path.is_dir()),
        key=lambda path: (path.name == revision, path.name == current, path.stat().st_mtime_ns),
        reverse=True,
    )
    found = [checkpoint_dir / name, *snapshots, checkpoint_dir / Path(name).name]
    return [path for path in found if path.is_dir()]


def holds_diffusers(named: Path) -> bool:
    """Tell whether a folder, or a file of it, is laid out as diffusers saves a transformer."""
    if named.is_file():
        return named.name.startswith(_FIRST_OF_DIFFUSERS)
    return any(any(f.glob(f"{_FIRST_OF_DIFFUSERS}*")) for f in (named, named / "transformer"))


def unfinished(folder: Path) -> str:
    """Return the end of a message about absent files: what a broken download left in `folder`."""
    if not folder.is_dir():
        return ""
    left = {path.name for pattern in _UNFINISHED for path in folder.rglob(pattern)}
    # in a hub cache a snapshot has links, and the bytes are in a folder beside
    left |= {path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()}
    if folder.parent.name == "snapshots":
        left |= {path.name for path in (folder.parent.parent / "blobs").glob("*.incomplete")}
    if not left:
        return ""
    names = ", ".join(sorted(left)[:3])
    return f"; a download was not finished ({names}): download it again"
