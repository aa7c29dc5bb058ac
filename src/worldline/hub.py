"""Files of public repositories: listed, downloaded, resumed, verified; needs no torch.

Names, sizes, hashes, logins and mirrors (HF_ENDPOINT) are the business of huggingface_hub. Its own
download checks sizes alone and begins a broken file anew in the next run, so bytes are fetched
here: a file is written beside its place, goes on where it stopped, and takes its name once its hash
is the published one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from worldline.errors import DownloadError

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds before the second try; doubles
TRIES = 5  # without a byte in between
_PAGES = "https://huggingface.co"  # where licences are accepted, whatever mirror serves the files
_PARALLEL_FILES = 4
_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as lost


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        repository: "owner/name".
        commit: commit that was listed.
        name: path below the repository.
        nbytes: its size.
        digest: its published hash, in hexadecimal.
        is_git: whether the hash is git's of a small file (SHA-1), else SHA-256.
    """

    repository: str
    commit: str
    name: str
    nbytes: int
    digest: str
    is_git: bool

    def hash_of(self, path: Path | None = None) -> Any:
        """Hash of the content of `path`, to be compared with `digest`; of nothing by default."""
        start = hashlib.sha256()
        if self.is_git:
            start = hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)
        if path is not None:
            with path.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    start.update(chunk)
        return start

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds this very file; reads all of it."""
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        return bool(self.hash_of(path).hexdigest() == self.digest)

    def part(self, path: Path) -> Path:
        """Unfinished download of the file beside its place."""
        return path.with_name(f"{path.name}.{self.digest[:8]}.incomplete")

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, self.name, revision=self.commit, endpoint=endpoint())


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or _PAGES).rstrip("/")


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """Files of a repository, by one request.

    Args:
        repository: "owner/name".
        revision: a branch or a commit; None is the newest.

    Raises:
        DownloadError: there is no such repository, it wants a login or a licence, or the hub cannot
            be reached.
    """
    from huggingface_hub import HfApi

    with _explained(repository):
        info = HfApi(endpoint=endpoint()).model_info(
            repository, revision=revision, files_metadata=True, timeout=_TIMEOUT
        )
    files = []
    for entry in info.siblings or ():
        name = PurePosixPath(entry.rfilename)
        if name.is_absolute() or ".." in name.parts:
            raise DownloadError(f"{endpoint()} lists {name} in {repository}: no name of a file")
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if digest is None or entry.size is None or info.sha is None:
            raise DownloadError(f"{endpoint()} publishes no hash or size of {repository} {name}")
        files.append(
            RemoteFile(repository, info.sha, entry.rfilename, entry.size, digest, entry.lfs is None)
        )
    return files


def check_access(file: RemoteFile) -> None:
    """Ask for the head of a file: a gated repository shows its list to everybody.

    Raises:
        DownloadError: it wants a login or a licence; the page to accept is named.
    """
    from huggingface_hub import get_hf_file_metadata

    with _explained(file.repository):
        get_hf_file_metadata(file.url, timeout=_TIMEOUT, endpoint=endpoint())


def matching(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """Files that fit a pattern; one without a slash is of the topmost folder alone."""
    return [
        file
        for file in files
        if any(
            fnmatchcase(file.name, pattern) and ("/" in pattern or "/" not in file.name)
            for pattern in patterns
        )
    ]


def fetch_all(
    files: Sequence[tuple[RemoteFile, Path]],
    report: Callable[[int], None],
    done: Callable[[RemoteFile, Path], None],
) -> None:
    """Download files, several at once; what is whole at its place is not fetched again.

    Args:
        files: files and where each belongs.
        report: called with the bytes that have come, a negative number where they were wrong.
        done: called with every file that is present and verified.

    Raises:
        DownloadError: one cannot be fetched; the others that had begun go on where they were in the
            next run.
    """
    stop = threading.Event()

    def work(file: RemoteFile, path: Path) -> None:
        if file.is_at(path):
            report(file.nbytes)
        else:
            fetch(file, path, report, stop)
        done(file, path)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        futures = [pool.submit(work, file, path) for file, path in files]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            stop.set()  # on an error, and on Ctrl-C
            for future in futures:
                future.cancel()


def fetch(
    file: RemoteFile,
    path: Path,
    report: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Download a file to `path`; an unfinished download of an earlier run goes on.

    Args:
        file: file of a repository.
        path: where it belongs; what is there is replaced once the new file is verified.
        report: called with the bytes that have come.
        stop: once set, the download ends where it is.

    Raises:
        DownloadError: it cannot be fetched or written, or comes with another hash twice.
    """
    part = file.part(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has its name")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _complete(file, part, report, stop or threading.Event()):
            damage = f"{file.name} of {file.repository} came damaged: not the hash {file.digest}"
            logger.warning("%s; fetched anew", damage)
            part.unlink(missing_ok=True)
            report(-file.nbytes)
            if not _complete(file, part, report, stop or threading.Event()):
                part.unlink(missing_ok=True)
                raise DownloadError(f"{damage}, twice; {path} was not written")
        part.replace(path)
        for other in path.parent.glob(f"{path.name}.*.incomplete"):  # of another version
            other.unlink(missing_ok=True)
    except OSError as error:  # the part stays, and is used in the next run
        raise DownloadError(f"{path} cannot be written: {error.strerror or error}") from error


def _complete(
    file: RemoteFile, part: Path, report: Callable[[int], None], stop: threading.Event
) -> bool:
    """Download what `part` lacks; whether it has the hash of the file then."""
    failures = 0
    with part.open("ab") as target:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part} is being written by another download") from error
        except OSError:
            logger.debug("no locks where %s lies", part)
        digest = file.hash_of(part)
        size = target.tell()
        report(size)
        while size < file.nbytes:
            before = size
            reason = "the connection ended"
            try:
                for chunk in _stream(file, size):
                    if chunk is None:  # the whole file comes, not the rest
                        target.truncate(0)
                        report(-size)
                        size, digest = 0, file.hash_of()
                        continue
                    if stop.is_set():
                        raise DownloadError(f"{file.name} was not finished; run it again to go on")
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    report(len(chunk))
            except _connection_errors() as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
            if size >= file.nbytes:
                break
            failures = 0 if size > before else failures + 1
            if failures == TRIES or stop.is_set():
                raise DownloadError(
                    f"{file.name} of {file.repository} cannot be fetched: {reason}; what has come "
                    "is kept: run it again to go on"
                )
            logger.info("%s: %s; going on at %s bytes", file.name, reason, f"{size:,}")
            stop.wait(PAUSE * 2**failures)
        target.flush()
        os.fsync(target.fileno())
        return size == file.nbytes and bool(digest.hexdigest() == file.digest)


def _stream(file: RemoteFile, begin: int) -> Iterator[bytes | None]:
    """Bytes from `begin` on; None first if the server begins at 0 instead."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    # a redirect to another host is followed without the login
    request = get_session().stream("GET", file.url, headers=headers, timeout=_TIMEOUT)
    with _explained(file.repository, retried=True), request as response:
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            yield None
        yield from response.iter_bytes()  # as they come: what a buffer holds would be lost


def _connection_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP library where a connection fails."""
    from huggingface_hub.errors import HfHubHTTPError

    # its library has had several names; all of its errors are below the base of this one
    return tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)


@contextmanager
def _explained(repository: str, *, retried: bool = False) -> Iterator[None]:
    """Turn answers of the hub into errors that name the remedy.

    Args:
        repository: repository that was asked for.
        retried: leave lost connections and faults of the server to the caller.

    Raises:
        DownloadError: the hub refuses.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
    )

    page = f"{_PAGES}/{repository}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"HF_HUB_OFFLINE is set, so {repository} cannot be fetched") from error
    except HfHubHTTPError as error:
        status, gated = error.response.status_code, isinstance(error, GatedRepoError)
        if status == 401 or (gated and get_token() is None):
            why = "is gated: accept its licence on" if gated else "is not there, or is not public:"
            message = f"{repository} {why} {page}, then log in with `hf auth login` (or HF_TOKEN)"
        elif status == 403 or gated:
            message = (
                f"{repository} is gated: accept its licence on {page} with the account of your "
                "token; a fine-grained token needs read access to gated repositories"
            )
        elif status == 404:
            message = f"{endpoint()} has no {repository}, or not this file"
        elif retried:
            raise
        else:
            message = f"{endpoint()} fails with status {status} for {repository}"
        raise DownloadError(message) from error
    except _connection_errors() as error:
        if retried:
            raise
        raise DownloadError(
            f"{repository}: {endpoint()} cannot be reached: {error} (HF_ENDPOINT names a mirror)"
        ) from error
