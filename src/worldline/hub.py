"""Files of public repositories: listed, fetched, resumed, verified; needs no torch.

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
from typing import IO, Any

from worldline.errors import DownloadError

logger = logging.getLogger(__name__)

PAGES = "https://huggingface.co"  # where licences are accepted, whatever mirror serves the files
AT_ONCE = 4  # files
TRIES = 5  # without a byte in between
PAUSE = 1.0  # seconds before the second try; doubles
_CHUNK = 1 << 20
_SILENCE = 30.0  # seconds without a byte, after which a connection counts as lost


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        repository: "owner/name".
        commit: that was listed.
        name: below the repository.
        nbytes: of it.
        digest: published hash of it, in hexadecimal.
        is_git: the hash is git's of a small file (SHA-1), else SHA-256.
    """

    repository: str
    commit: str
    name: str
    nbytes: int
    digest: str
    is_git: bool

    def begin_hash(self) -> Any:
        """Return what the content is fed to, to be compared with `digest`."""
        if self.is_git:
            return hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)
        return hashlib.sha256()

    def is_at(self, path: Path) -> bool:
        """Tell whether `path` holds this very file; reads all of it."""
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        return bool(_hashed(self, path).hexdigest() == self.digest)


def endpoint() -> str:
    """Return where the hub is asked: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or PAGES).rstrip("/")


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """Return the files of a repository, by one request.

    Args:
        repository: "owner/name".
        revision: a branch or a commit; None is the newest.

    Raises:
        DownloadError: there is no such repository, it wants a login or a licence, or the hub cannot
            be reached.
    """
    from huggingface_hub import HfApi

    with _explained(repository):
        found = HfApi(endpoint=endpoint()).model_info(
            repository, revision=revision, files_metadata=True, timeout=_SILENCE
        )
    files = []
    for entry in found.siblings or ():
        name = PurePosixPath(entry.rfilename)
        if name.is_absolute() or ".." in name.parts:
            raise DownloadError(f"{endpoint()} lists {name} in {repository}: no name of a file")
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if digest is None or entry.size is None or found.sha is None:
            raise DownloadError(
                f"{endpoint()} publishes no hash or size of {entry.rfilename} of {repository}, so "
                "it could not be verified"
            )
        files.append(
            RemoteFile(
                repository, found.sha, entry.rfilename, entry.size, digest, entry.lfs is None
            )
        )
    return files


def check_access(file: RemoteFile) -> None:
    """Ask for the head of a file: a gated repository shows its list to everybody.

    Raises:
        DownloadError: it wants a login or a licence; the page to accept is named.
    """
    from huggingface_hub import get_hf_file_metadata

    with _explained(file.repository):
        get_hf_file_metadata(_url(file), timeout=_SILENCE, endpoint=endpoint())


def chosen(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """Return the files that fit a pattern; one without a slash is of the topmost folder alone."""
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
    tell: Callable[[RemoteFile, int], None],
    done: Callable[[RemoteFile, Path], None],
) -> None:
    """Fetch files, several at once; what is whole at its place is not fetched again.

    Args:
        files: and where each belongs.
        tell: is given the bytes that have come of a file, a negative number where they were wrong.
        done: is told of every file that is there and verified.

    Raises:
        DownloadError: one cannot be fetched; the others that had begun go on where they were in the
            next run.
    """
    stop = threading.Event()

    def work(file: RemoteFile, path: Path) -> None:
        if file.is_at(path):
            tell(file, file.nbytes)
        else:
            fetch(file, path, lambda count: tell(file, count), stop)
        done(file, path)

    with ThreadPoolExecutor(AT_ONCE) as pool:
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
    tell: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch a file to `path`; what an earlier run has left is used.

    Args:
        file: of a repository.
        path: where it belongs; what is there is replaced once the new file is verified.
        tell: is given the bytes that have come.
        stop: once set, the download ends where it is.

    Raises:
        DownloadError: it cannot be fetched or written, or comes with another hash twice.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has its name")
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(file, path, tell, stop or threading.Event())
    except OSError as error:  # what has come of it stays, and is used in the next run
        raise DownloadError(f"{path} cannot be written: {error.strerror or error}") from error


def _fetch(
    file: RemoteFile, path: Path, tell: Callable[[int], None], stop: threading.Event
) -> None:
    part = path.with_name(f"{path.name}.{file.digest[:8]}.incomplete")
    for attempt in range(2):
        if _fetch_part(file, part, tell, stop):
            break
        part.unlink(missing_ok=True)
        tell(-file.nbytes)
        wrong = f"{file.name} of {file.repository} came damaged: its hash is not {file.digest}"
        if attempt:
            raise DownloadError(f"{wrong}, twice; {path} was not written")
        logger.warning("%s; fetched anew", wrong)
    part.replace(path)
    for other in path.parent.glob(f"{path.name}.*.incomplete"):  # of another version
        other.unlink(missing_ok=True)


def _fetch_part(
    file: RemoteFile, part: Path, tell: Callable[[int], None], stop: threading.Event
) -> bool:
    """Complete `part`; return whether it is the file."""
    failures = 0
    with part.open("ab") as target, _alone(target, part):
        hashed = _hashed(file, part)
        have = target.tell()
        tell(have)
        while have < file.nbytes:
            before = have
            try:
                for chunk in _stream(file, have):
                    if chunk is None:  # the whole file comes, not the rest
                        target.truncate(0)
                        tell(-have)
                        have, hashed = 0, file.begin_hash()
                        continue
                    if stop.is_set():
                        raise DownloadError(f"{file.name} was not finished; run it again to go on")
                    target.write(chunk)
                    hashed.update(chunk)
                    have += len(chunk)
                    tell(len(chunk))
            except _lost() as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            else:
                reason = f"the connection ended after {have:,} of {file.nbytes:,} bytes"
            if have >= file.nbytes:
                break
            failures = 0 if have > before else failures + 1
            if failures == TRIES or stop.is_set():
                raise DownloadError(
                    f"{file.name} of {file.repository} cannot be fetched: {reason}; what has come "
                    "is kept: run it again to go on"
                )
            logger.info("%s: %s; going on at %s bytes", file.name, reason, f"{have:,}")
            stop.wait(PAUSE * 2**failures)
        target.flush()
        os.fsync(target.fileno())
        return have == file.nbytes and bool(hashed.hexdigest() == file.digest)


def _stream(file: RemoteFile, begin: int) -> Iterator[bytes | None]:
    """Yield the bytes from `begin` on; None where the server begins at 0 instead."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    # a redirect to another host is followed without the login
    request = get_session().stream("GET", _url(file), headers=headers, timeout=_SILENCE)
    with _explained(file.repository, passing=True), request as response:
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            yield None
        yield from response.iter_bytes()  # as they come: what a buffer holds would be lost


def _url(file: RemoteFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(file.repository, file.name, revision=file.commit, endpoint=endpoint())


def _hashed(file: RemoteFile, path: Path) -> Any:
    hashed = file.begin_hash()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            hashed.update(chunk)
    return hashed


def _lost() -> tuple[type[Exception], ...]:
    """Return what the HTTP library raises where a connection fails."""
    from huggingface_hub.errors import HfHubHTTPError

    # its library has had several names; all of its errors are below the base of this one
    return tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)


@contextmanager
def _explained(repository: str, *, passing: bool = False) -> Iterator[None]:
    """Turn what the hub answers into an error that says what to do.

    Args:
        repository: that was asked for.
        passing: let pass what may be over in a moment: lost connections and faults of the server.

    Raises:
        DownloadError: the hub refuses.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"{PAGES}/{repository}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"HF_HUB_OFFLINE is set, so {repository} cannot be fetched") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 or (isinstance(error, GatedRepoError) and not _has_token()):
            gated = isinstance(error, GatedRepoError)
            why = "is gated" if gated else "is not there, or is not public"
            accept = f"accept its licence on {page}, " if gated else f"see {page}; "
            raise DownloadError(
                f"{repository} {why}: {accept}then log in with `hf auth login` (or set HF_TOKEN)"
            ) from error
        if status == 403 or isinstance(error, GatedRepoError):
            raise DownloadError(
                f"{repository} is gated: accept its licence on {page} with the account of your "
                "token (`hf auth whoami` shows it, `hf auth login` takes another; a fine-grained "
                "token needs read access to gated repositories)"
            ) from error
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            raise DownloadError(f"{endpoint()} has no {repository}, or not this file") from error
        if passing:
            raise
        raise DownloadError(f"{endpoint()} fails with status {status} for {repository}") from error
    except _lost() as error:
        if passing:
            raise
        raise DownloadError(
            f"{repository}: {endpoint()} cannot be reached: {error} (HF_ENDPOINT names a mirror)"
        ) from error


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


@contextmanager
def _alone(file: IO[bytes], path: Path) -> Iterator[None]:
    """Keep other programs from writing to a part; file systems without locks do without.

    Raises:
        DownloadError: another one does.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DownloadError(f"{path} is being written by another download") from error
    except OSError:
        logger.debug("no locks where %s lies", path)
    yield
