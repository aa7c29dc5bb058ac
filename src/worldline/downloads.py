"""Downloads: what a model needs, from public repositories to the checkpoint folder; no torch.

`catalog.toml` lists the files that are read; the released scripts fetch whole repositories, of T5
the weights for two frameworks (90 GB). Names, sizes, hashes, logins and mirrors (HF_ENDPOINT) are
the business of huggingface_hub. Its own download checks sizes alone and begins a broken file anew
in the next run, so bytes are fetched here: a file is written beside its place, goes on where it
stopped, and takes its name once its hash is the published one.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from pydantic import BaseModel, Field, ValidationError

from worldline.catalog import BUNDLED_PREFIX, ENTRIES, FLOW_MODELS, FLOW_TOKENIZER, Entry, find
from worldline.documents import MAX_TEXT
from worldline.errors import DownloadError, InputError, brief, did_you_mean, one_line, strerror

logger = logging.getLogger(__name__)

GROUPS = ("autoregressive", "diffusion", "predict2.5", "tokenizers", "guardrails")
_DATASETS = "datasets/"  # stands before "owner/name" of a data set
PAUSE = 1.0  # seconds before the second try; doubles
TRIES = 5  # without a byte in between
_PAGES = "https://huggingface.co"  # where licences are accepted, whatever mirror serves the files
_PARALLEL_FILES = 4
_TIMEOUT = HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte: a connection counts as lost
_PATIENCE = 30.0  # seconds for a list, and for each _LEAST bytes of a file
_LEAST = 10_000
_LONGEST_WAIT = 60.0  # seconds that a busy hub may ask for
# base of all errors of the HTTP library, which huggingface_hub has changed more than once
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]


class HubError(DownloadError):
    """The hub itself fails, whatever the repository."""


def select(
    models: Sequence[str],
    sizes: Collection[str] = (),
    types: Collection[str] = (),
    tokenizers: Collection[str] = (),
    generation: str | None = None,
) -> list[str]:
    """Names of models, from names, groups, and the flags of the released scripts.

    Args:
        models: names, and groups of `GROUPS`.
        sizes: sizes of autoregressive and diffusion models.
        types: types of diffusion models; by default Text2World and Video2World.
        tokenizers: types of tokenizers.
        generation: of groups: "1.0" leaves out what came later.

    Raises:
        InputError: nothing is named, or a size or type fits nothing.
    """
    names = [f"Cosmos-Tokenize1-{kind}" for kind in tokenizers]
    names += [name for name in models if name not in GROUPS]
    unused = {*sizes, *types}
    for entry in ENTRIES:
        groups = {entry.command.partition(" ")[0], f"{entry.family.rpartition(' ')[2]}s"}
        if groups & {*models} and (entry.first_generation or generation != "1.0"):
            names += [model.name for model in entry.models] or [entry.name]
        if not (match := re.fullmatch(r"Cosmos-Predict1-(\d+B)-?(.*)", entry.name)):
            continue
        size, kind = match.groups()
        chosen = size in sizes
        if not entry.by_size:
            wanted = types or (("Text2World", "Video2World") if sizes else ())
            chosen = kind in wanted and (chosen or not sizes)
        if chosen:
            names.append(entry.name)
            unused -= {size, kind}
    if unused:
        raise InputError(f"no released model is of {' and '.join([*sizes, *types])}; give others")
    if not names:
        raise InputError(
            "nothing is named; give a model, such as Cosmos-Predict1-4B, one of "
            f"{', '.join(GROUPS)}, or --model_sizes; `worldline models` lists them"
        )
    return list(dict.fromkeys(names))


def sources(
    names: Iterable[str], generation: str | None = None, without: Collection[str] = ()
) -> list[Entry]:
    """Entries of models and of all that they need, each once.

    Args:
        names: of the catalog, of either generation, or of `FLOW_MODELS`; others are refused.
        generation: of the parts; None is that of each name.
        without: families of parts that are left out.
    """
    entries: list[Entry] = []
    for name in names:
        era = generation or ("1.0" if "Cosmos-1.0-" in name else "Predict1")
        entries += _with_parts(_look_up(name), era, without)
    return list(dict.fromkeys(entries))


def _with_parts(entry: Entry, generation: str, without: Collection[str]) -> Iterator[Entry]:
    first = generation == "1.0"
    yield (first and entry.first_generation) or entry
    for part in ENTRIES:
        # Cosmos 1.0 keeps all of its guardrails in one repository
        later = first and part.family == "guardrail" and not part.first_generation
        if part.name in entry.needs and part.family not in without and not later:
            yield from _with_parts(part, generation, without)


def _look_up(name: str) -> Entry:
    short = name.removeprefix("nvidia/")
    for entry in ENTRIES:
        for model in entry.models:
            if short.removeprefix("Cosmos-Predict2.5-") in (model.name, model.name.split("/")[0]):
                # the entry's own files are the tokenizer of all models
                needs = (FLOW_TOKENIZER[0].removeprefix("nvidia/"), *entry.needs)
                update = {"fetch": ((model.file,),), "fetch_beside": ("config.json", "LICENSE*")}
                return entry.model_copy(
                    update={**update, "revision": model.revision, "needs": needs}
                )
    known = find(name) or find(short)
    if known is None and name.startswith(BUNDLED_PREFIX):
        raise InputError(f"{name}: models of that name come with the package; nothing is fetched")
    if known is None:
        names = [folder for entry in ENTRIES for folder in entry.folders]
        names += [*GROUPS, *(model.name for model in FLOW_MODELS)]
        hint = did_you_mean(name, names, 0.6) or "; `worldline models` lists them"
        raise InputError(f"no model {name} is known{hint}")
    if "_post-trained" in name:
        raise InputError(f"{name} is not released: it is what post-training makes of {known.name}")
    return known


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    repository: str  # "owner/name", of a data set "datasets/owner/name"
    commit: str  # that was listed
    name: str  # path below the repository
    nbytes: int
    digest: str  # published hash, in hexadecimal: SHA-256, or git's SHA-1 of a small file

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds this very file; reads all of it."""
        if not self.may_be_at(path):
            return False
        is_git = len(self.digest) == 40
        begun = hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, (lambda: begun) if is_git else "sha256")
        return digest.hexdigest() == self.digest

    def may_be_at(self, path: Path) -> bool:
        """Whether `path` is a file of the right size."""
        return path.is_file() and path.stat().st_size == self.nbytes

    def part(self, path: Path) -> Path:
        """Unfinished download of the file beside its place."""
        return path.with_name(f"{path.name}.{self.digest[:8]}.incomplete")

    @property
    def url(self) -> str:
        repository = self.repository.removeprefix(_DATASETS)
        kind = None if repository == self.repository else "dataset"
        return hf_hub_url(
            repository, self.name, repo_type=kind, revision=self.commit, endpoint=_endpoint()
        )


_Digest = Annotated[str, Field(pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")]


class _Lfs(BaseModel, strict=True):
    sha256: _Digest


class _Sibling(BaseModel, strict=True):
    rfilename: str
    size: Annotated[int, Field(ge=0)]
    blobId: _Digest | None = None
    lfs: _Lfs | None = None


class _Listing(BaseModel, strict=True):
    """The hub's description of a repository, as far as it is read."""

    sha: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    siblings: list[_Sibling]


def _endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else the public one."""
    address = (os.environ.get("HF_ENDPOINT") or _PAGES).rstrip("/")
    host = r"([^\s/@]*@)?([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?"
    if not re.fullmatch(rf"https?://{host}(/\S*)?", address, re.ASCII | re.IGNORECASE):
        raise HubError(f"HF_ENDPOINT is {brief(address)}; give an address such as {_PAGES}")
    return address


def _stream(url: str, method: str = "GET", **headers: str) -> Any:
    """Request to the hub, whose answer comes in pieces.

    A redirect to another host is followed without the login; of a HEAD none is followed.
    """
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    follow = method != "HEAD"
    return get_session().stream(
        method, url, headers=headers, timeout=_TIMEOUT, follow_redirects=follow
    )


def find_files(entry: Entry) -> list[RemoteFile]:
    """Files to download for an entry; why there are none is a DownloadError."""
    return _allowed(choose(entry, list_files(entry.repository, entry.revision)))


def find_dataset(name: str, patterns: Collection[str]) -> list[RemoteFile]:
    """Files of a data set that fit a pattern, in any folder; all where there is none.

    Raises:
        InputError: it is no "owner/name".
        DownloadError: there are no such files, or they cannot be had.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise InputError(f"--dataset {brief(name)}: give OWNER/NAME, as on {_PAGES}/datasets")
    listed = list_files(f"{_DATASETS}{name}")
    files = [f for f in listed if not patterns or any(fnmatchcase(f.name, p) for p in patterns)]
    if not files:
        wanted = f" --include {' '.join(patterns)}" if patterns else ""
        raise DownloadError(f"{name}: none of its {len(listed)} files fits{wanted}")
    return _allowed(files)


def _allowed(files: list[RemoteFile]) -> list[RemoteFile]:
    """Files of a repository, which shows its list to everybody, but if it is gated no file."""
    repository = files[0].repository
    try:
        with _stream(files[0].url, "HEAD") as response:
            _check(repository, files[0].name, response)
    except (_HTTPError, OSError, ValueError) as error:
        raise _unreachable(repository, error) from error
    return files


def list_files(repository: str, revision: str | None = None) -> list[RemoteFile]:
    """Files of a repository, by one request."""
    kind = "" if repository.startswith(_DATASETS) else "models/"
    url = f"{_endpoint()}/api/{kind}{repository}"
    url += f"/revision/{quote(revision, safe='')}" if revision else ""
    where, start, content = f"{repository}: {_endpoint()}", time.monotonic(), bytearray()
    try:
        with _stream(f"{url}?blobs=true") as response:
            _check(repository, "", response)
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_TEXT or time.monotonic() - start > _PATIENCE:
                    raise DownloadError(f"{where} sends its list without an end, or too slowly")
    except (_HTTPError, OSError, ValueError) as error:
        raise _unreachable(repository, error) from error
    try:
        listing = _Listing.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or brief(content.decode(errors="replace"))
        raise HubError(
            f"{where} sends no list of files ({place}: {problem['msg']}); HF_ENDPOINT names a hub"
        ) from None
    files: dict[str, RemoteFile] = {}
    for each in listing.siblings:
        name, path = each.rfilename, PurePosixPath(each.rfilename)
        if not name.isprintable() or str(path) != name or {"..", "/"} & {*path.parts}:
            raise DownloadError(f"{where} lists {brief(name)}, which is no name of a file")
        digest = each.lfs.sha256 if each.lfs else each.blobId
        if digest is None or name in files:
            reason = "without a hash" if digest is None else "twice"
            raise DownloadError(f"{where} lists {name} {reason}")
        files[name] = RemoteFile(repository, listing.sha, name, each.size, digest)
    return [*files.values()]


def choose(entry: Entry, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files to download for an entry, among all that its repository holds."""
    never = matching(files, entry.fetch_never)
    files = [file for file in files if file not in never]
    for patterns in entry.fetch:
        if all(matching(files, [pattern]) for pattern in patterns):
            return matching(files, [*patterns, *entry.fetch_beside])
    wanted = " or ".join(" and ".join(patterns) for patterns in entry.fetch)
    raise DownloadError(f"{entry.repository} holds no {wanted}")


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


def _check(repository: str, name: str, response: Any) -> None:
    """Raise what an answer means, and the remedy, unless it is the file or list asked for."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    page = "text/html" in response.headers.get("Content-Type", "")
    if status < 400 and (not page or name.endswith((".html", ".htm"))):
        return
    if status < 400:
        message = (
            f"{response.url!s:.200} sends a web page, not {name or 'its list'}; log in to the "
            "network, or check HF_ENDPOINT"
        )
    elif status == 403 or code == "GatedRepo":
        message = (
            f"it is gated; accept its licence on {_PAGES}/{repository} with the account that `hf "
            "auth login` or HF_TOKEN names, whose token needs access to gated repositories"
        )
    elif status == 401:
        message = "it is not there, or not public; log in with `hf auth login` or HF_TOKEN"
    elif status == 407:
        message = "the proxy asks for a login; HTTPS_PROXY may hold it"
    elif status == 429:
        wait = _seconds_to_wait(response)
        message = f"{_endpoint()} fails with 429; try again{f' in {wait:.0f} s' if wait else ''}"
    else:
        reason = "has no such repository or file" if status == 404 else f"fails with {status}"
        message = f"{_endpoint()} {reason}"
    anywhere = status < 400 or status in (407, 429) or status >= 500
    raise (HubError if anywhere else DownloadError)(f"{repository}: {message}")


def _seconds_to_wait(response: Any) -> float:
    """What a busy hub asks for, in seconds; 0 where it is a date or absent."""
    stated = response.headers.get("Retry-After", "")
    return float(stated) if re.fullmatch(r"[0-9]{1,9}", stated) else 0.0


def _unreachable(repository: str, error: Exception) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{repository}: HF_HUB_OFFLINE is set; unset it")
    return HubError(
        f"{repository}: {_endpoint()} cannot be reached: {one_line(error)}; HF_ENDPOINT names a "
        "mirror"
    )


def fetch_all(files: Mapping[Path, RemoteFile], report: Callable[[int], object]) -> Iterator[Path]:
    """Download files, several at once; yields the place of each once it is verified.

    A file that is whole at its place is not fetched again. After a DownloadError the others go on
    where they were in the next run. `report` is called, in any thread, with the bytes that came,
    negative where they were wrong.
    """
    stop = threading.Event()

    def work(path: Path, file: RemoteFile) -> Path:
        if file.is_at(path):
            report(file.nbytes)
        else:
            fetch(file, path, report, stop)
        return path

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        futures = [pool.submit(work, *each) for each in files.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # on an error, and on Ctrl-C
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def fetch(
    file: RemoteFile,
    path: Path,
    report: Callable[[int], object] = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Download a file to `path`; an unfinished download of an earlier run goes on.

    What is at `path` is replaced once the new file is verified. `stop` ends the download.
    """
    part, stop = file.part(path), stop or threading.Event()
    damage = f"{file.name} of {file.repository} came damaged: not the hash {file.digest}"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has its name")
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            if os.path.lexists(part) and (part.is_symlink() or not part.is_file()):
                raise DownloadError(f"{part} is not a regular file; remove it")
            with part.open("ab") as target:
                _lock(target, part)
                _receive(file, target, report, stop)
                if file.is_at(part):
                    part.replace(path)
                    return
                logger.warning("%s", damage)
                report(-target.tell())
                part.unlink()
    except OSError as error:  # the part stays, and is used in the next run
        raise DownloadError(f"{path} cannot be written: {strerror(error)}") from error
    raise DownloadError(f"{damage}, twice; {path} was not written")


def _lock(target: BinaryIO, part: Path) -> None:
    """Keep other downloads from a part; the lock ends with the process."""
    try:
        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it may have taken its place since it was opened
        alone = part.exists() and os.path.samestat(part.stat(), os.fstat(target.fileno()))
    except BlockingIOError:
        alone = False
    except OSError:
        alone = True  # no locks on this file system
    if not alone:
        raise DownloadError(f"{part} is being written by another download")


def _receive(
    file: RemoteFile, target: BinaryIO, report: Callable[[int], object], stop: threading.Event
) -> None:
    """Download what `target` lacks, through lost connections and faults of the server."""

    def begin_anew() -> None:
        report(-target.tell())
        target.seek(0)
        target.truncate()

    report(target.tell())
    if target.tell() > file.nbytes:
        begin_anew()
    failures, furthest = 0, target.tell()
    while (size := target.tell()) < file.nbytes:
        reason, wait, mark, level = "the connection ended", 0.0, time.monotonic(), size
        try:
            with _stream(file.url, Range=f"bytes={size}-") as response:
                if (status := response.status_code) >= 429 or (status == 416 and size):
                    reason, wait = f"the hub answers {status}", _seconds_to_wait(response)
                    if wait > _LONGEST_WAIT:
                        _check(file.repository, file.name, response)
                else:
                    _check(file.repository, file.name, response)
                if size and status in (200, 416):  # the whole file comes, or the part is too long
                    begin_anew()
                # of any size: a buffer's would be lost
                for chunk in response.iter_bytes() if status < 400 else ():
                    chunk = chunk[: file.nbytes - target.tell()]
                    target.write(chunk)
                    report(len(chunk))
                    if stop.is_set() or target.tell() == file.nbytes:
                        break
                    if (now := time.monotonic()) - mark > _PATIENCE:
                        if target.tell() < level + _LEAST:
                            reason = "it is too slow"
                            break
                        mark, level = now, target.tell()
        except OfflineModeIsEnabled as error:
            raise _unreachable(file.repository, error) from error
        except _HTTPError as error:
            reason = one_line(error)
        if target.tell() >= file.nbytes:
            break
        failures = 0 if target.tell() > furthest else failures + 1
        furthest = max(furthest, target.tell() + min(_LEAST, file.nbytes // 8))
        if failures == TRIES or stop.is_set():
            raise DownloadError(
                f"{file.name} of {file.repository} cannot be fetched: {reason}; run it again to go "
                "on from what has come"
            )
        logger.info("%s: %s; going on at %d bytes", file.name, reason, target.tell())
        stop.wait(max(PAUSE * 2**failures, wait))
    target.flush()
    os.fsync(target.fileno())
