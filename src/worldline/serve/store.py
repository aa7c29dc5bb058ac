"""Store of jobs: their rows, and their input and result files beside them.

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
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from worldline.errors import InputError, brief, strerror
from worldline.files import digest, remove
from worldline.serve.errors import ApiError, unwritable
from worldline.serve.folder import check_local, locked, synchronise
from worldline.serve.records import ENDED, Job, Task
from worldline.serve.rows import COLUMNS, Rows, damage_named

logger = logging.getLogger(__name__)

RESULTS = ("video.mp4", "thumbnail.jpg", "report.json")
KEY_SECONDS = 24 * 3600.0  # for which an idempotency key names its job


class Store:
    """Jobs on the disk; of those that have not ended, a copy in memory.

    Every method may be called from any thread. Those that read answer in microseconds, those that
    write wait for the disk.

    Attributes:
        path: of the folder.
        rows: of all jobs, as they are on the disk.
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
        self._memory = threading.Lock()  # of the copies; never held while the disk is waited for
        self._numbers = itertools.count(1)
        self._live: dict[str, Job] = {}
        self._dirty: set[str] = set()
        self.used_bytes = 0
        try:
            database = self.path / "jobs.sqlite3"
            with damage_named(database):
                self.rows = Rows(database)
                live = self.rows.select("status IN ('queued', 'in_progress')")
                self._counts = self.rows.counts()
            synchronise(self.path)
            self._live = {job.id: job for job in live}
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Write what is not yet written, and let another server have the folder."""
        with self.rows.writing:
            with contextlib.suppress(ApiError):
                self.flush()
            self.rows.close()
            os.close(self._lock)

    # what is there

    def get(self, id: str, owner: str | None) -> Job:
        """A job; `owner` None is any.

        Raises:
            ApiError: video_not_found; another owner's too.
        """
        job = self._live.get(id) or next(iter(self.rows.select("id = ?", id)), None)
        if job is None or owner not in (None, job.owner):
            raise ApiError("video_not_found", f"no video has the id {brief(id)}", "id")
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
        for job in self.rows.select(where, owner, key, since):
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
        jobs = self.rows.select(f"{' AND '.join(conditions)} {order}", *values)
        return [self._live.get(job.id, job) for job in jobs[:limit]], len(jobs) > limit

    def live(self) -> list[Job]:
        """Jobs that have not ended, the oldest first."""
        jobs = [job for job in list(self._live.values()) if job.status not in ENDED]
        return sorted(jobs, key=lambda job: job.id)

    def ids(self, status: str) -> list[str]:
        """Ids of all jobs of a status."""
        return self.rows.ids("status = ?", status)

    def expired(self, keep_seconds: float) -> list[str]:
        """Ids of jobs that ended longer ago than this."""
        where = "status IN ('completed', 'failed', 'cancelled') AND completed_at < ?"
        return self.rows.ids(where, time.time() - keep_seconds)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Number of jobs by model and status."""
        with self._memory:
            return dict(+self._counts)

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
            with self.rows.writing:
                if earlier := self.find(job.owner, job.idempotency_key, job.body_sha256):
                    return earlier
                if input and target:
                    _make_folder(target.parent)
                    os.replace(input, target)
                    synchronise(target.parent)
                with self.rows.transaction():
                    self.rows.insert(job)
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
        with self.rows.writing:
            before = self.get(id, None)
            # what was noted is written with it
            changed = COLUMNS if id in self._dirty else tuple(columns)
            with self.rows.transaction():
                self.rows.update(replace(before, **columns), changed)
            return self._change(before, columns, noted=False)

    def note(self, id: str, **columns: Any) -> Job:
        """Change a job that has not ended, in memory; `flush` writes it. Never waits."""
        if id not in self._live:
            raise ApiError("video_not_found", f"The video {id!r:.60} has ended.", "id")
        return self._change(self._live[id], columns, noted=True)

    def flush(self) -> None:
        """Write all that was noted, in one transaction."""
        with self.rows.writing:
            with self._memory:
                jobs = [self._live[id] for id in self._dirty if id in self._live]
                self._dirty.clear()
            try:
                with self.rows.transaction():
                    for job in jobs:
                        self.rows.update(job, COLUMNS)
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
        with self.rows.writing:
            job = self.get(id, None)
            with self.rows.transaction():
                self.rows.delete(id)
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
        jobs = self.rows.select("id = ?", path.name.partition(".")[0])
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


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        synchronise(folder.parent)
