"""Store of jobs: rows in SQLite, and their input and result files beside it.

    DATA_DIR/  lock  jobs.sqlite3  incoming/  inputs/ab/ID.mp4  videos/ab/ID/

An answer or an event follows what it is about onto the disk: file (fsync, rename) -> row (COMMIT)
-> answer. A crash at any point leaves a row with whole files, or files without a row, which
`sweep` removes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from worldline.errors import InputError, strerror
from worldline.files import digest, remove
from worldline.serve.errors import ApiError, unwritable
from worldline.serve.folder import check_local, locked, synchronise
from worldline.serve.records import ENDED, Job, Task

logger = logging.getLogger(__name__)

VERSION = 1  # of the table
RESULTS = ("video.mp4", "thumbnail.jpg", "report.json")
KEY_SECONDS = 24 * 3600.0  # for which an idempotency key names its job
_JSON = ("request", "shape", "result", "metadata")
_COLUMNS = tuple(field.name for field in fields(Job))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM jobs"
_INSERT = f"INSERT INTO jobs ({', '.join(_COLUMNS)}, seed) VALUES ({'?, ' * len(_COLUMNS)}?)"
_TABLE = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, shape TEXT NOT NULL,
    seed INTEGER, owner TEXT NOT NULL, status TEXT NOT NULL, batch_key TEXT,
    input_kind TEXT, input_suffix TEXT NOT NULL, input_sha256 TEXT,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL, expires_at REAL,
    progress INTEGER NOT NULL, step_kind TEXT NOT NULL, step_done INTEGER NOT NULL,
    step_total INTEGER NOT NULL, attempts INTEGER NOT NULL,
    error_code TEXT, error_message TEXT, error_param TEXT, result TEXT NOT NULL,
    parent_id TEXT, idempotency_key TEXT, body_sha256 TEXT, metadata TEXT
) WITHOUT ROWID;
CREATE UNIQUE INDEX by_key ON jobs (owner, idempotency_key);
CREATE INDEX by_status ON jobs (status, id);
CREATE INDEX by_owner ON jobs (owner, id);
"""


class Store:
    """Jobs on the disk; of those that have not ended, a copy in memory.

    Every method may be called from any thread. Those that read answer in microseconds, those that
    write wait for the disk.

    Attributes:
        path: of the folder.
        used_bytes: size of all input and result files when `sweep` last looked.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder, which is made (mode 0700), and empty its incoming/.

        Raises:
            InputError: another server has it, or it is on a network file system, or it cannot be
                written, or the database is damaged or of another release.
        """
        self.path = Path(folder).absolute()
        check_local(self.path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = locked(self.path)
            remove(self.path / "incoming")
            for name in ("incoming", "inputs", "videos"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: it cannot be written: {strerror(error)}") from error
        self._writing, self._reading = threading.RLock(), threading.RLock()
        self._memory = threading.Lock()  # of the copies; never held while the disk is waited for
        self._numbers = itertools.count(1)
        self._live: dict[str, Job] = {}
        self._dirty: set[str] = set()
        self.used_bytes = 0
        try:
            self._writer = self._opened()
            self._reader = self._connect()
            self._live = {job.id: job for job in self.select("status IN ('queued', 'in_progress')")}
            rows = self._reader.execute("SELECT model, status, count(*) FROM jobs GROUP BY 1, 2")
            self._counts = Counter({(model, status): count for model, status, count in rows})
        except sqlite3.Error as error:
            os.close(self._lock)
            database = self.path / "jobs.sqlite3"
            raise InputError(
                f"{database}: it cannot be read as a database: {error}; "
                "restore it, or give another folder"
            ) from error
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Write what is not yet written, and let another server have the folder."""
        with self._writing, self._reading:
            with contextlib.suppress(ApiError):
                self.flush()
            self._reader.close()
            self._writer.close()
            os.close(self._lock)

    # what is there

    def get(self, id: str, owner: str | None) -> Job:
        """A job; `owner` None is any.

        Raises:
            ApiError: video_not_found; another owner's too.
        """
        job = self._live.get(id) or next(iter(self.select("id = ?", id)), None)
        if job is None or owner not in (None, job.owner):
            raise ApiError("video_not_found", f"There is no video with the id {id!r:.60}.", "id")
        return job

    def find(self, owner: str, key: str | None, body_sha256: str | None) -> Job | None:
        """The job that an idempotency key names.

        Raises:
            ApiError: idempotency_conflict; it was posted with another body.
        """
        if key is None:
            return None
        since = time.time() - KEY_SECONDS
        where = "owner = ? AND idempotency_key = ? AND created_at > ?"
        for job in self.select(where, owner, key, since):
            if job.body_sha256 != body_sha256:
                message = f"The key {key!r:.60} was used with another body; give a new key."
                raise ApiError("idempotency_conflict", message, "Idempotency-Key")
            return self._live.get(job.id, job)
        return None

    def page(
        self, owner: str | None, after: str | None, limit: int, descending: bool
    ) -> tuple[list[Job], bool]:
        """Jobs by id, at most `limit`, and whether there are more; `after` may be deleted."""
        conditions, values = ["1"], []
        if owner is not None:
            conditions, values = ["owner = ?"], [owner]
        if after is not None:
            conditions.append("id < ?" if descending else "id > ?")
            values.append(after)
        order = f"ORDER BY id {'DESC' if descending else 'ASC'} LIMIT {limit + 1:d}"
        jobs = self.select(f"{' AND '.join(conditions)} {order}", *values)
        return [self._live.get(job.id, job) for job in jobs[:limit]], len(jobs) > limit

    def live(self) -> list[Job]:
        """Jobs that have not ended, the oldest first."""
        jobs = [job for job in list(self._live.values()) if job.status not in ENDED]
        return sorted(jobs, key=lambda job: job.id)

    def ids(self, status: str) -> list[str]:
        """Ids of all jobs of a status."""
        with self._reading:
            rows = self._reader.execute("SELECT id FROM jobs WHERE status = ?", (status,))
            return [id for (id,) in rows]

    def expired(self, keep_seconds: float) -> list[str]:
        """Ids of jobs that ended longer ago than this."""
        where = "status IN ('completed', 'failed', 'cancelled') AND completed_at < ?"
        return [job.id for job in self.select(where, time.time() - keep_seconds)]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Number of jobs by model and status."""
        with self._memory:
            return dict(+self._counts)

    def select(self, where: str, *values: Any) -> list[Job]:
        """Jobs as they are on the disk, by a condition of SQL."""
        with self._reading:
            rows = self._reader.execute(f"{_SELECT} WHERE {where}", values).fetchall()
        return [*map(_job, rows)]

    @property
    def free_bytes(self) -> int:
        facts = os.statvfs(self.path)
        return facts.f_bavail * facts.f_frsize

    # files

    def incoming(self) -> Path:
        """A fresh name for an upload; never waits."""
        return self.path / "incoming" / f"{os.getpid()}-{next(self._numbers)}"

    def input_path(self, job: Job) -> Path | None:
        if job.input_kind is None:
            return None
        return self.path / "inputs" / job.id[-2:] / f"{job.id}{job.input_suffix}"

    def folder(self, id: str) -> Path:
        """Folder of the results."""
        return self.path / "videos" / id[-2:] / id

    def task(self, id: str) -> Task:
        """A job for a worker, with an empty folder for its results.

        Raises:
            ApiError: disk_full.
        """
        job, folder = self.get(id, None), self.folder(id)
        remove(folder)  # of an earlier attempt
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(error) from error
        path = self.input_path(job)
        return Task(id, job.request, str(path) if path else None, job.input_kind, str(folder))

    def seal(self, job: Job) -> bool:
        """Put results of a job onto the disk for good; whether they are whole."""
        folder = self.folder(job.id)
        try:
            for name in RESULTS:
                synchronise(folder / name)
                if not (folder / name).stat().st_size:
                    return False
            for path in (folder, folder.parent, folder.parent.parent):
                synchronise(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unwritable(error) from error
        return True

    def report(self, job: Job) -> Mapping[str, Any] | None:
        """The report of a job whose files are whole; None of any other."""
        folder = self.folder(job.id)
        try:
            report = json.loads((folder / "report.json").read_bytes())
            if not all((folder / name).stat().st_size for name in RESULTS):
                return None
            if expected := report.get("file_sha256"):
                whole = digest(folder / "video.mp4") == expected
            else:
                from worldline.video.read import check_written

                check_written(folder / "video.mp4", job.shape.get("num_frames"))
                whole = True
        except (OSError, ValueError, AttributeError):  # InputError is a ValueError
            return None
        return report if whole else None

    # changes

    def add(self, job: Job, input: Path | None) -> Job:
        """Keep a job and its input, which moves from incoming/, or is removed with an error.

        Returns:
            The job; or the earlier one that its idempotency key names.

        Raises:
            ApiError: idempotency_conflict, disk_full.
        """
        job = replace(job, created_at=job.created_at or time.time())
        target = self.input_path(job) if input else None
        try:
            if input:
                synchronise(input)
            with self._writing:
                if earlier := self.find(job.owner, job.idempotency_key, job.body_sha256):
                    return earlier
                if input and target:
                    _make_folder(target.parent)
                    os.replace(input, target)
                    synchronise(target.parent)
                with self._transaction() as database:
                    database.execute(  # a key of yesterday is free
                        "UPDATE jobs SET idempotency_key = NULL"
                        " WHERE owner = ? AND idempotency_key = ?",
                        (job.owner, job.idempotency_key),
                    )
                    database.execute(_INSERT, (*_values(job, _COLUMNS), job.request.get("seed")))
                with self._memory:
                    self._live[job.id] = job
                    self._counts[job.model, job.status] += 1
                return job
        except BaseException as error:
            if target:
                remove(target)
            if isinstance(error, OSError):
                raise unwritable(error) from error
            raise
        finally:
            if input:
                remove(input)

    def update(self, id: str, **columns: Any) -> Job:
        """Change a job on the disk.

        Raises:
            ApiError: video_not_found, disk_full.
        """
        with self._writing:
            before = self.get(id, None)
            # what was noted is written with it
            changed = _COLUMNS if id in self._dirty else tuple(columns)
            with self._transaction() as database:
                self._write(database, replace(before, **columns), changed)
            return self._change(before, columns, noted=False)

    def note(self, id: str, **columns: Any) -> Job:
        """Change a job that has not ended, in memory; `flush` writes it. Never waits."""
        if id not in self._live:
            raise ApiError("video_not_found", f"The video {id!r:.60} has ended.", "id")
        return self._change(self._live[id], columns, noted=True)

    def flush(self) -> None:
        """Write all that was noted, in one transaction."""
        with self._writing:
            with self._memory:
                jobs = [self._live[id] for id in self._dirty if id in self._live]
                self._dirty.clear()
            try:
                with self._transaction() as database:
                    for job in jobs:
                        self._write(database, job, _COLUMNS)
            except BaseException:
                with self._memory:
                    self._dirty.update(job.id for job in jobs)
                raise
            with self._memory:
                for id in {job.id for job in jobs} - self._dirty:
                    if self._live[id].status in ENDED:
                        del self._live[id]

    def delete(self, id: str) -> None:
        """Remove a job: its row, then its files."""
        with self._writing:
            job = self.get(id, None)
            with self._transaction() as database:
                database.execute("DELETE FROM jobs WHERE id = ?", (id,))
            with self._memory:
                job = self._live.pop(id, job)
                self._dirty.discard(id)
                self._counts[job.model, job.status] -= 1
        if path := self.input_path(job):
            remove(path)
        remove(self.folder(id))

    def sweep(self, older_than: float = 3600.0) -> list[Path]:
        """Remove files without a row that are older than this, in seconds; what was removed."""
        removed, used = [], 0
        for path in (*self.path.glob("inputs/*/*"), *self.path.glob("videos/*/*")):
            with contextlib.suppress(OSError):  # deleted meanwhile
                # not st_mtime: an input may be a link to an old file
                if path.stat().st_ctime > time.time() - older_than or self._is_used(path):
                    files = path.iterdir() if path.is_dir() else [path]
                    used += sum(file.stat().st_size for file in files)
                else:
                    remove(path)
                    removed.append(path)
        self.used_bytes = used
        return removed

    def _is_used(self, path: Path) -> bool:
        """Whether a row names a file or folder; results are of jobs that may yet have them."""
        jobs = self.select("id = ?", path.name.partition(".")[0])
        if not jobs or path == self.input_path(jobs[0]):
            return bool(jobs)
        return path == self.folder(jobs[0].id) and jobs[0].status not in ("failed", "cancelled")

    def _change(self, before: Job, columns: Mapping[str, Any], *, noted: bool) -> Job:
        """Change the copy in memory; what another thread changed meanwhile stays."""
        with self._memory:
            before = self._live.get(before.id, before)
            job = replace(before, **columns)
            self._counts[before.model, before.status] -= 1
            self._counts[job.model, job.status] += 1
            if job.status in ENDED and not noted:
                self._live.pop(job.id, None)
                self._dirty.discard(job.id)
            else:
                self._live[job.id] = job
                self._dirty.update([job.id] if noted else [])
            return job

    # the database

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path / "jobs.sqlite3", isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _opened(self) -> sqlite3.Connection:
        path = self.path / "jobs.sqlite3"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # its log gets the same mode
        database = self._connect()
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        synchronise(self.path)
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise InputError(
                f"{self.path}: its file system cannot hold a database with a write-ahead log; "
                "give a folder of a local disk"
            )
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            script = f"BEGIN IMMEDIATE; {_TABLE} PRAGMA user_version = {VERSION}; COMMIT;"
            database.executescript(script)
        elif version != VERSION:
            raise InputError(
                f"{self.path}: its jobs are of version {version}, and this release reads "
                f"{VERSION}; install the release that wrote them, or give another folder"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._commit()
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise unwritable(error) from error
                raise

    def _commit(self) -> None:
        self._writer.execute("COMMIT")

    def _write(self, database: sqlite3.Connection, job: Job, columns: Sequence[str]) -> None:
        names = ", ".join(f"{column} = ?" for column in columns)
        values = (*_values(job, columns), job.id)
        database.execute(f"UPDATE jobs SET {names} WHERE id = ?", values)


def _values(job: Job, columns: Sequence[str]) -> list[Any]:
    values = [(column, getattr(job, column)) for column in columns]
    return [
        json.dumps(value, allow_nan=False) if column in _JSON and value is not None else value
        for column, value in values
    ]


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(_COLUMNS, row, strict=True))
    for column in _JSON:
        if values[column] is not None:
            values[column] = json.loads(values[column])
    return Job(**values)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        synchronise(folder.parent)
