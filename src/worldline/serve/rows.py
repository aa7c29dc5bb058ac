"""Rows of jobs in SQLite."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from worldline.errors import InputError
from worldline.serve.errors import unwritable
from worldline.serve.records import Job

VERSION = 1  # of the table
_JSON = ("request", "shape", "result", "metadata")
COLUMNS = tuple(field.name for field in fields(Job))
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
_INSERT = f"INSERT INTO jobs ({', '.join(COLUMNS)}, seed) VALUES ({'?, ' * len(COLUMNS)}?)"
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


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Name the file where its contents cannot be read.

    Raises:
        InputError: there is damage, perhaps inside a row, which is no JSON then.
    """
    try:
        yield
    except (sqlite3.Error, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: it cannot be read as a database: {error}; restore it, or give another folder"
        ) from error


class Rows:
    """Table of jobs; every method may be called from any thread.

    Looks take microseconds, also while another thread waits for the disk.

    Attributes:
        writing: lock of who changes rows; whoever looks before a change holds it over both.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, which is made if need be.

        Raises:
            InputError: it is of another release, or its file system cannot hold it.
            sqlite3.Error: it is damaged; so may the first look find it.
        """
        self.path = path
        self.writing, self._reading = threading.RLock(), threading.RLock()
        self._writer, self._reader = self._opened(), self._connect()

    def close(self) -> None:
        with self.writing, self._reading:
            self._reader.close()
            self._writer.close()

    def select(self, where: str, *values: Any) -> list[Job]:
        """Jobs as they are on the disk, by a condition of SQL."""
        with self._reading:
            rows = self._reader.execute(f"{_SELECT} WHERE {where}", values).fetchall()
        return [*map(_job, rows)]

    def ids(self, where: str, *values: Any) -> list[str]:
        """Ids of jobs, by a condition of SQL."""
        with self._reading:
            rows = self._reader.execute(f"SELECT id FROM jobs WHERE {where}", values)
            return [id for (id,) in rows]

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of jobs by model and status."""
        with self._reading:
            rows = self._reader.execute("SELECT model, status, count(*) FROM jobs GROUP BY 1, 2")
            return Counter({(model, status): count for model, status, count in rows})

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Changes that are on the disk together, or not at all.

        Raises:
            ApiError: disk_full, internal_error.
        """
        with self.writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield
                self._commit()
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise unwritable(error) from error
                raise

    def _commit(self) -> None:
        self._writer.execute("COMMIT")

    # within a transaction

    def insert(self, job: Job) -> None:
        """Add a row, which takes its idempotency key from an earlier one."""
        self._writer.execute(
            "UPDATE jobs SET idempotency_key = NULL WHERE owner = ? AND idempotency_key = ?",
            (job.owner, job.idempotency_key),
        )
        self._writer.execute(_INSERT, (*_values(job, COLUMNS), job.request.get("seed")))

    def update(self, job: Job, columns: Sequence[str]) -> None:
        names = ", ".join(f"{column} = ?" for column in columns)
        values = (*_values(job, columns), job.id)
        self._writer.execute(f"UPDATE jobs SET {names} WHERE id = ?", values)

    def delete(self, id: str) -> None:
        self._writer.execute("DELETE FROM jobs WHERE id = ?", (id,))

    # the connections

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _opened(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # its log gets the same mode
        database = self._connect()
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
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


def _values(job: Job, columns: Sequence[str]) -> list[Any]:
    values = [(column, getattr(job, column)) for column in columns]
    return [
        json.dumps(value, allow_nan=False) if column in _JSON and value is not None else value
        for column, value in values
    ]


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(COLUMNS, row, strict=True))
    for column in _JSON:
        if values[column] is not None:
            values[column] = json.loads(values[column])
    return Job(**values)
