"""Files: atomic writing, fingerprints, JSON, folders of released models; needs no torch."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from worldline.errors import CheckpointError, InputError

GIGABYTE = 1e9
# a whole transformer in NVIDIA's layout, in order of preference
TRANSFORMER_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt")
_DIFFUSERS_FILE = "diffusion_pytorch_model"
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
# with what a hub answers in place of a file that it does not give
_REFUSALS = (b"entry not found", b"repository not found", b"invalid username", b"access to model")
_HASHED = 1 << 26  # bytes of a file up to which it is compared with the hash in its name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Temporary name beside `path`; a file or folder made there is renamed to `path` at the end.

    On any exception, Ctrl-C too, the temporary is removed and the old content of `path` stays.
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


def check_folder(folder: Path) -> None:
    """Refuse a folder that can be neither written nor made; tried, whatever permissions allow."""
    folders = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in folders if os.path.exists(path))
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{folder}: it cannot be written: {error.strerror}") from error


def readable_size(nbytes: float) -> str:
    """A number of bytes in words: 8.0 GB."""
    for unit, name in ((GIGABYTE, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes:.0f} B"


def disguise(head: bytes) -> str:
    """Kind of page that often takes the place of a download; "" for other content.

    That is "web page", "hub's refusal" or "git-lfs pointer"; `head` is the first 64 bytes of the
    file, or more.
    """
    text = head.lstrip()[:64].lower()
    if text.startswith((*_REFUSALS, b'{"error"')):
        return "hub's refusal"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "web page"
    return "git-lfs pointer" if text.startswith(b"version https://git-lfs") else ""


def folded(name: str) -> str:
    """Name in the form that a file system without case, such as macOS's, compares."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def stamp(path: Path) -> dict[str, Any]:
    """Fingerprint of a file: its path, size and time of modification."""
    status = path.stat()
    return {"path": str(path.resolve()), "nbytes": status.st_size, "modified": status.st_mtime_ns}


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, such as a config.json.

    Raises:
        CheckpointError: the file cannot be read, or holds no object.
    """
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(settings).__name__}")
    return settings


def released_folders(root: Path, name: str, revision: str = "") -> list[Path]:
    """Folders of a released model: by its whole name, in a hub cache, by its last name.

    The name is that of the hub, such as "nvidia/Cosmos-Predict2.5-2B"; `revision` is the snapshot
    that is preferred in a cache.
    """
    cache = root / f"models--{name.replace('/', '--')}"
    try:
        current = (cache / "refs" / "main").read_text().strip()
    except OSError:
        current = ""
    snapshots = sorted(
        (path for path in cache.glob("snapshots/*") if path.is_dir()),
        key=lambda path: (path.name == revision, path.name == current, path.stat().st_mtime_ns),
        reverse=True,
    )
    folders = [root / name, *snapshots, root / Path(name).name]
    return [path for path in folders if path.is_dir()]


def repository_folders(name: str, roots: Sequence[Path]) -> list[Path]:
    """Folders of a released model below the roots and in the user's hub cache, preferred first."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return [folder for root in (*roots, cache) for folder in released_folders(root, name)]


def find_repository(name: str, roots: Sequence[Path]) -> Path:
    """The preferred one of `repository_folders`; CheckpointError without any."""
    for folder in repository_folders(name, roots):
        return folder
    raise CheckpointError(f"{name} is missing: no folder of it in {' or '.join(map(str, roots))}")


def holds_diffusers(path: Path) -> bool:
    """Whether a folder, or a file in it, has diffusers' layout of a transformer."""
    if path.is_file():
        return path.name.startswith(_DIFFUSERS_FILE)
    return any(any(f.glob(f"{_DIFFUSERS_FILE}*")) for f in (path, path / "transformer"))


def unfinished(folder: Path) -> str:
    """End of a message about absent files that names those of a broken download; "" without any."""
    # downloads of a hub cache are in a folder beside
    beside = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    every = (path for root in {folder, beside} for path in root.rglob("*"))
    names = sorted({path.name for path in every if path.suffix in UNFINISHED})[:3]
    return f"; a download was not finished ({', '.join(names)}): download it again" if names else ""


def refuse_broken(path: Path) -> None:
    """Refuse a small file that is not whole, as far as its name and its content betray it.

    Raises:
        CheckpointError: it is absent, unfinished, no regular file, empty, a page (`disguise`), or
            other than the hash that a hub's cache names it by.
    """
    try:
        if path.suffix in UNFINISHED:
            reason = "is an unfinished download"
        elif not path.is_file():
            reason = "is a folder" if path.is_dir() else "is no regular file, or a link to nothing"
        else:
            with path.open("rb") as file:
                head = file.read(512)
            page = f"is a {disguise(head)}" if disguise(head) else ""
            hashed = "" if _fits_hash(path.resolve()) else "has another hash than its name"
            reason = page or hashed if head.strip(b"\0") else "is empty or starts with zeros"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    if reason:
        raise CheckpointError(f"{path} {reason}; download it again, or remove it")


def _fits_hash(blob: Path) -> bool:
    """Whether a file of a hub's cache has the hash that it is named by; true of any other."""
    named = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    if not named or blob.stat().st_size > _HASHED:
        return True
    data = blob.read_bytes()
    git = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False)
    return blob.name in (git.hexdigest(), hashlib.sha256(data).hexdigest())
