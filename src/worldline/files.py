"""Files: names, atomic writing, fingerprints, what is not whole; needs no torch."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from worldline.errors import CheckpointError, InputError, brief, strerror

GIGABYTE = 1e9
DATASET = "lerobot:"  # begins the name of a data set, which has a folder and parameters
LONGEST_NAME = 255  # bytes, of every common file system
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
# with what a hub answers in place of a file that it does not give
_REFUSALS = (b"entry not found", b"repository not found", b"invalid username", b"access to model")
_LARGEST_HASHED = 1 << 26  # bytes of a file up to which it is compared with the hash in its name
_BLOCK, _NUM_BLOCKS = 1 << 18, 256  # bytes and number of the blocks by which weights are hashed
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:4]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Temporary name beside `path`; a file or folder made there is renamed to `path` at the end.

    On any exception, Ctrl-C too, the temporary is removed and the old content of `path` stays.
    """
    with replacing_all([path]) as [temporary]:
        yield temporary


@contextlib.contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names, as of `replacing`, that take their places once all are on the disk."""
    for path in paths:
        remove_stale(path)
    temporaries = [temporary_name(path) for path in paths]
    try:
        yield temporaries
        for temporary in filter(Path.is_file, temporaries):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a crash may leave the new name with an empty file
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            remove(temporary)
        raise


def temporary_name(path: Path) -> Path:
    """Name beside `path` that `remove_stale` removes once this process has ended."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_MACHINE}{secrets.token_hex(2)}.tmp")


def check_folder(folder: Path) -> None:
    """Refuse a folder that can be neither written nor made; tried, whatever permissions allow."""
    folders = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in folders if os.path.exists(path))
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{folder}: it cannot be written: {strerror(error)}") from error


def remove_stale(path: Path) -> None:
    """Remove the temporaries of `path` that killed processes of this machine left."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-{_MACHINE}[0-9a-f]{{4}}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if match := pattern.fullmatch(name):
                try:
                    os.kill(int(match[1]), 0)  # whether it runs
                except (ProcessLookupError, OverflowError):
                    remove(path.with_name(name))
                except PermissionError:  # it does, as another user's
                    pass


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """The name itself; ValueError where it is none, but empty or a path."""
    if not name.strip(" .") or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"{name!r:.40} is not the name of a file; give one without folders")
    return name


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


def check_path(value: Any) -> Any:
    """The value; `InputError` where it is a text that can name no file, such as a URL."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        try:  # bytes of no encoding may come from the command line
            encoded = os.fsencode(text)
            if b"\0" in encoded or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
                raise ValueError
        except ValueError:
            raise InputError(f"{brief(text)} is not the name of a file") from None
        if is_dataset(text):
            raise InputError(
                f"{text:.80}: it is a data set, not a file; give it to a command that makes a batch"
            )
        if re.match(r"\s*(data:|[a-z][a-z0-9+.-]+:/)", text, re.IGNORECASE):
            raise InputError(f"{text:.80}: URLs are not fetched; save the file, and give its path")
    return value


def is_dataset(name: object) -> bool:
    """Whether a name is that of a data set, not of a file or a folder."""
    return str(name).lower().startswith(DATASET)


def refuse_dataset(folder: Path) -> None:
    """Refuse the folder of a data set in place of its name.

    Raises:
        InputError: it is one.
    """
    if (folder / "meta" / "info.json").is_file():
        name = f"{DATASET}{folder}#camera=NAME"
        raise InputError(f"{folder}: it is a LeRobot data set; give {name}")


def digest(path: Path, *, sampled: bool = False) -> str:
    """SHA-256 of a file's bytes, or of the names and contents in a folder.

    Args:
        path: of the file, which is hashed once for as long as its status stays.
        sampled: of more than 64 MB only the size and 256 blocks are read, the first and the last
            among them, where headers lie; weights differ everywhere.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        contents = [(child.name, digest(child, sampled=sampled)) for child in path.iterdir()]
        return hashlib.sha256(json.dumps(sorted(contents)).encode()).hexdigest()
    status = path.stat()
    sampled = sampled and status.st_size > _BLOCK * _NUM_BLOCKS
    return _digest(path, sampled, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, sampled: bool, nbytes: int, *_times: int) -> str:
    with path.open("rb") as file:
        if not sampled:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(nbytes).encode())
        for index in range(_NUM_BLOCKS):
            file.seek(index * (nbytes - _BLOCK) // (_NUM_BLOCKS - 1))
            sha.update(file.read(_BLOCK))
        return sha.hexdigest()


def stamp(path: Path, *, sampled: bool = False) -> dict[str, Any]:
    """Report entry of a file: its path, size, time of modification and `digest`."""
    status = path.stat()
    place = {"path": str(path.resolve()), "nbytes": status.st_size, "modified": status.st_mtime_ns}
    return {**place, "digest": digest(path, sampled=sampled)}


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
        reason = f"cannot be read: {strerror(error)}"
    if reason:
        raise CheckpointError(f"{path} {reason}; download it again, or remove it")


def _fits_hash(blob: Path) -> bool:
    """Whether a file of a hub's cache has the hash that it is named by; true of any other."""
    named = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    if not named or blob.stat().st_size > _LARGEST_HASHED:
        return True
    data = blob.read_bytes()
    git = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False)
    return blob.name in (git.hexdigest(), hashlib.sha256(data).hexdigest())
