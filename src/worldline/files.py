"""Files: atomic writing, fingerprints, JSON, folders of released models; needs no torch."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from worldline.errors import CheckpointError, InputError, brief

GIGABYTE = 1e9
# a whole transformer in NVIDIA's layout, in order of preference
TRANSFORMER_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt")
WEIGHTS = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_DIFFUSERS_FILE = "diffusion_pytorch_model"
_LONGEST_NAME = 255  # bytes, of every common file system
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
# with what a hub answers in place of a file that it does not give
_REFUSALS = (b"entry not found", b"repository not found", b"invalid username", b"access to model")
_HASHED = 1 << 26  # bytes of a file up to which it is compared with the hash in its name
MAX_TEXT = 1 << 26  # bytes of a text that is read whole
MAX_ENTRIES = 100_000  # of a batch
MAX_PROBLEMS = 1000  # of a batch, behind which the others are not looked for
_MOST_FILES = 100_000  # that are looked at for those of a broken download
_DEEPEST = 100  # levels of nested values
# a string is kept whole, so that what looks like a comment in it stays
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*+"|//[^\n]*')
# how files begin that are given for weights -> what they are
_FORMATS = {
    rb"GGUF": "GGUF",
    rb"\x89HDF\r\n": "HDF5",
    rb".{4}TFL3": "TensorFlow Lite",
    rb"\x08[\x01-\x20]\x12.(pytorch|tf2onnx|onnx)": "ONNX",
    rb"\x93NUMPY": "a NumPy array",
    rb".{257}ustar": "a tar archive, as .nemo is",
    rb"\x1f\x8b": "a gzip archive",
    rb"\x28\xb5\x2f\xfd": "a zstd archive",
    rb"\xfd7zXZ": "an xz archive",
    rb"7z\xbc\xaf": "a 7z archive",
    rb"Rar!": "a RAR archive",
    rb".{4}ftyp|\x1aE\xdf\xa3": "a video",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF": "a picture",
    rb"%PDF": "a PDF",
}
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
    mark = f"{os.getpid()}-{_MACHINE}{secrets.token_hex(2)}"
    temporaries = [path.with_name(f".{path.name}.{mark}.tmp") for path in paths]
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


def check_folder(folder: Path) -> None:
    """Refuse a folder that can be neither written nor made; tried, whatever permissions allow."""
    folders = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in folders if os.path.exists(path))
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{folder}: it cannot be written: {error.strerror}") from error


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


def foreign(head: bytes) -> str:
    """Format of a file that holds no weights for us, by its first 512 bytes; "" if unknown."""
    kinds = (kind for start, kind in _FORMATS.items() if re.match(start, head, re.DOTALL))
    return next(kinds, "")


def folded(name: str) -> str:
    """Name in the form that a file system without case, such as macOS's, compares."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def check_path(value: Any) -> Any:
    """The value; `InputError` where it is a text that can name no file, such as a URL."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        try:  # bytes of no encoding may come from the command line
            encoded = os.fsencode(text)
            if b"\0" in encoded or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
                raise ValueError
        except ValueError:
            raise InputError(f"{brief(text)} is not the name of a file") from None
        if re.match(r"\s*(data:|[a-z][a-z0-9+.-]+:/)", text, re.IGNORECASE):
            raise InputError(f"{text:.80}: URLs are not fetched; save the file, and give its path")
    return value


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


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Text of a regular file, in UTF-8 or, as Windows writes it, in UTF-16.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than `limit` bytes, not text, or no regular file.
    """
    if path.exists() and not path.is_file():  # a FIFO would wait for a writer
        raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {readable_size(limit)}")
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start:,})") from None


def parse_json(text: str) -> Any:
    """Value of a JSON text; comments, from `//` to the end of a line, are left out.

    Raises:
        ValueError: it is no JSON, an object has a name twice, values are nested more than 100
            deep, or a number has thousands of digits.
    """
    try:
        value = json.loads(without_comments(text), object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict | list):
                inner += each.values() if isinstance(each, dict) else each
        if not inner:
            return value
        level = inner
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def without_comments(text: str) -> str:
    """JSON without what follows `//` in a line, except in strings; lines stay lines."""
    if "//" not in text:
        return text
    return _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0].startswith('"') else "", text)


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of an object, in which no name may stand twice."""
    fields: dict[str, Any] = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{brief(twice)} stands there twice")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, such as a config.json.

    Raises:
        CheckpointError: the file cannot be read, or holds no object.
    """
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(settings).__name__}")
    return settings


def read_entries(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Entries of a batch, a JSON document or JSON lines; contents decide, not the suffix.

    Each is "line", its number from 1 and its value, or a ValueError in place of one that cannot be
    read; of a document it is "", 1 and the whole value.

    Raises:
        OSError, ValueError: the file cannot be read, is empty, or is a damaged document.
    """

    def parse(piece: str) -> Any:
        try:
            value = parse_json(piece)
        except ValueError as error:
            return error
        return many if isinstance(value, list | dict) and len(value) > MAX_ENTRIES else value

    many = ValueError(f"it has more than {MAX_ENTRIES:,} entries")
    text = read_text(path)
    # not `splitlines`: some of the signs that end its lines may stand in a JSON string
    pieces = enumerate(text.split("\n"), 1)
    lines = ((number, line) for number, line in pieces if without_comments(line).strip())
    head, lined = [*islice(lines, 2)], path.suffix.lower() == ".jsonl"
    if not head:
        raise ValueError("it has no input")
    if not isinstance(parse(head[0][1]), dict) or (len(head) == 1 and not lined):
        document = parse(text)
        if not isinstance(document, ValueError):
            yield "", 1, document
            return
        if not lined or document is many:
            raise document
    for count, (number, line) in enumerate(chain(head, lines), 1):
        if count > MAX_ENTRIES:
            raise many
        yield "line", number, parse(line)


def hub_cache() -> Path:
    """Folder in which huggingface_hub keeps repositories, by the variables that it reads."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(hub or f"{home}/hub")).expanduser()


def snapshots(root: Path, name: str, revision: str = "") -> list[Path]:
    """Snapshots of a repository in a hub cache.

    Those with weights come first; of them `revision`, then `main`, then the newest. A name without
    an owner is NVIDIA's.
    """
    cache = root / f"models--{(name if '/' in name else f'nvidia/{name}').replace('/', '--')}"
    try:
        current = (cache / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        current = ""

    def preference(path: Path) -> tuple[bool, bool, bool, int]:
        # a link whose blob is missing is no file
        whole = any(p.suffix in WEIGHTS and p.is_file() for p in path.rglob("*"))
        named = path.name == revision, path.name == current
        return whole, *named, path.stat().st_mtime_ns

    return sorted(filter(Path.is_dir, cache.glob("snapshots/*")), key=preference, reverse=True)


def model_name(folder: Path) -> str:
    """Name of a model's folder; of a snapshot in a hub cache that of the repository."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def released_folders(root: Path, name: str, revision: str = "") -> list[Path]:
    """Folders of a released model: by its whole name, in a hub cache, by its last name.

    The name is that of the hub, such as "nvidia/Cosmos-Predict2.5-2B"; `revision` is the snapshot
    that is preferred in a cache.
    """
    folders = [root / name, *snapshots(root, name, revision), root / Path(name).name]
    return [path for path in folders if path.is_dir()]


def repository_folders(name: str, roots: Sequence[Path]) -> list[Path]:
    """Folders of a released model below the roots and in the user's hub cache, preferred first."""
    places = dict.fromkeys((*roots, hub_cache()))
    return [folder for root in places for folder in released_folders(root, name)]


def find_repository(name: str, roots: Sequence[Path]) -> Path:
    """The preferred one of `repository_folders`; CheckpointError without any."""
    for folder in repository_folders(name, roots):
        return folder
    raise CheckpointError(f"{name} is missing: no folder of it in {' or '.join(map(str, roots))}")


def holds_diffusers(path: Path) -> bool:
    """Whether a folder, or a file in it, has diffusers' layout of a transformer."""
    folders = (path.parent,) if path.is_file() else (path, path / "transformer")
    return any(any(f.glob(f"{_DIFFUSERS_FILE}*")) or _is_diffusers(f) for f in folders)


def _is_diffusers(folder: Path) -> bool:
    """Whether a config.json is of diffusers."""
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"_class_name"' in file.read(1 << 20)
    except OSError:
        return False


def unfinished(folder: Path) -> str:
    """End of a message about absent files that names those of a broken download; "" without any."""
    # downloads of a hub cache are in a folder beside
    beside = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    every = (path for root in {folder, beside} for path in islice(root.rglob("*"), _MOST_FILES))
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
