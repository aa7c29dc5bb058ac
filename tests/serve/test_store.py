"""A store keeps each job and its files together, whatever happens between two of its steps."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worldline.errors import InputError
from worldline.serve.errors import ApiError
from worldline.serve.folder import check_local, file_system
from worldline.serve.records import ENDED, Job, new_id
from worldline.serve.store import RESULTS, Store

from . import crashes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data")
    yield store
    store.close()


def job(**columns: Any) -> Job:
    return Job(
        new_id(), columns.pop("model", "w"), {"prompt": "é\0\u2028'", "seed": 1}, {}, **columns
    )


def refused(function: Any, *args: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*args)
    return caught.value


def upload(store: Store, data: bytes = b"data") -> Path:
    path = store.incoming()
    path.write_bytes(data)
    return path


def files(store: Store) -> list[Path]:
    return [path for path in store.path.glob("*/*/*") if path.parts[-3] in ("inputs", "videos")]


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    whole = Job(
        new_id(),
        "w",
        {
            "prompt": "a\ud7ff\U0001d54f",
            "seed": 2**32 - 1,
            "guidance": 7.5,
            "negative_prompt": None,
        },
        {"num_frames": 9, "fps": 23.976},
        owner="0123456789abcdef",
        batch_key="k",
        input_kind="video",
        input_suffix=".mp4",
        input_sha256="ab",
        created_at=1.5,
        metadata={"a": "b"},
        result={"stage_durations": {"text": 1.0}},
        idempotency_key="x" * 255,
        body_sha256="cd",
        parent_id=new_id(),
    )
    assert store.add(whole, upload(store)) == whole
    store.update(whole.id, status="failed", error_code="timeout", error_message="m")
    store.close()
    store = Store(tmp_path / "data")
    ended = replace(whole, status="failed", error_code="timeout", error_message="m")
    assert store.get(whole.id, None) == ended
    path = store.input_path(whole)
    assert path
    assert path.name == f"{whole.id}.mp4"
    assert path.read_bytes() == b"data"
    store.close()


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1_800_000_000_000_000_000, 1_800_000_000_002_000_000, 250))
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    ids = [new_id() for _ in range(8000)]  # of two milliseconds
    assert ids == sorted(set(ids))
    for id in (ids[0], ids[-1]):
        parsed = uuid.UUID(id.removeprefix("video_"))
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert parsed.int >> 80 == int(id[6:18], 16)
    assert int(ids[-1][6:18], 16) - int(ids[0][6:18], 16) == 1


def test_folders_are_private(store: Store) -> None:
    for path in (store.path, *(p for p in store.path.iterdir() if p.is_dir())):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    paths = [*store.path.glob("jobs.sqlite3*"), store.path / "lock"]
    assert len(paths) == 4  # with those of the write-ahead log
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    settings = {
        name: store.rows._writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "busy_timeout", "user_version")
    }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,
        "busy_timeout": 5000,
        "user_version": 1,
    }


def test_owners_see_their_own_jobs_alone(store: Store) -> None:
    mine, other = store.add(job(owner="a"), None), store.add(job(owner="b"), None)
    assert store.get(mine.id, "a") == store.get(mine.id, None) == mine
    for id, owner in ((other.id, "a"), (mine.id, ""), (new_id(), None), ("' OR 1", None)):
        assert refused(store.get, id, owner).code == "video_not_found"
    assert store.page("a", None, 10, True) == ([mine], False)
    assert store.page(None, None, 10, False) == ([mine, other], False)


def test_pages(store: Store) -> None:
    ids = sorted(store.add(job(), None).id for _ in range(45))
    for descending in (False, True):
        expected, seen, after = ids[::-1] if descending else list(ids), [], None
        while True:
            page, more = store.page("", after, 20, descending)
            seen += [one.id for one in page]
            if not more:
                break
            after = seen[-1]
            if len(seen) == 20:
                store.delete(after)  # the cursor of the next page
                ids.remove(after)
        assert seen == expected
    assert store.page("", ids[-1], 20, False) == ([], False)
    noted = store.note(ids[0], progress=5)
    assert store.page("", None, 1, False)[0] == [noted]


def test_idempotency_keys(store: Store) -> None:
    keyed = {"idempotency_key": "k", "body_sha256": "1"}
    first = store.add(job(**keyed), None)
    spare = upload(store)
    assert store.add(job(**keyed, input_kind="image", input_suffix=".png"), spare) == first
    assert not spare.exists()
    assert files(store) == []
    conflict = refused(store.add, job(idempotency_key="k", body_sha256="2"), None)
    assert (conflict.code, conflict.status) == ("idempotency_conflict", 422)
    assert store.add(job(**keyed, owner="b"), None).id != first.id
    store.update(first.id, status="completed")
    assert store.add(job(**keyed), None).id == first.id
    store.update(first.id, created_at=time.time() - 24 * 3600 - 1)
    later = store.add(job(idempotency_key="k", body_sha256="2"), None)
    assert later.id != first.id  # a day later the key is free
    assert store.get(first.id, None).idempotency_key is None
    store.delete(later.id)
    assert store.add(job(**keyed), None).id not in (first.id, later.id)


def test_one_of_many_threads_adds_a_key(store: Store) -> None:
    kept: list[Job] = []
    threads = [
        threading.Thread(
            target=lambda: kept.append(
                store.add(job(idempotency_key="k", body_sha256="1"), upload(store))
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.id for one in kept}) == 1
    assert store.counts() == {("w", "queued"): 1}
    assert not [*(store.path / "incoming").iterdir()]


def test_names_and_counts_wait_for_no_write(store: Store) -> None:
    """The event loop asks for them while another thread waits for the disk."""
    names: list[Path] = []
    asker = threading.Thread(target=lambda: names.append(store.incoming()))
    with store.rows.writing:
        asker.start()
        asker.join(5)
        assert names
        assert store.counts() == {}
    assert store.incoming() not in names


def test_counts_while_worlds_are_added(store: Store) -> None:
    problems: list[Exception] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                store.counts()
            except RuntimeError as error:
                problems.append(error)

    asker = threading.Thread(target=ask)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asker.start()
        for number in range(100):
            store.add(job(model=f"w{number}"), None)
    finally:
        sys.setswitchinterval(usual)
        ended.set()
        asker.join()
    assert not problems


def test_progress_is_in_memory_until_it_is_written(store: Store) -> None:
    one = store.add(job(), None)
    store.note(one.id, progress=40, step_kind="denoise")
    assert store.get(one.id, None).progress == 40
    assert store.rows.select("id = ?", one.id)[0].progress == 0
    store.flush()
    assert store.rows.select("id = ?", one.id)[0].step_kind == "denoise"
    store.note(one.id, progress=50)
    store.update(one.id, status="in_progress")
    assert store.rows.select("id = ?", one.id)[0].progress == 50  # with what changes the row anyway
    store.update(one.id, status="completed")
    assert refused(lambda: store.note(one.id, progress=1)).code == "video_not_found"
    assert refused(lambda: store.update(new_id(), progress=1)).code == "video_not_found"


def test_delete_and_sweep(store: Store) -> None:
    one = store.add(job(input_kind="image", input_suffix=".png"), upload(store))
    folder = Path(store.task(one.id).folder)
    (folder / "video.mp4").write_bytes(b"v")
    orphan = store.path / "inputs" / "ab" / f"{new_id()}.mp4"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"o")
    assert store.sweep() == []  # it may be of a job that is being added
    assert store.used_bytes == len(b"data") + len(b"v") + len(b"o")
    os.utime(orphan, (0, 0))
    assert store.sweep(older_than=10) == []
    assert store.sweep(older_than=-1) == [orphan]
    assert store.sweep(older_than=-1) == []
    store.delete(one.id)
    assert files(store) == []
    assert store.counts() == {}
    assert refused(store.delete, one.id).code == "video_not_found"


def test_results_are_sealed_when_they_are_whole(store: Store) -> None:
    one = store.add(job(), None)
    assert not store.seal(one)
    folder = Path(store.task(one.id).folder)
    for name in RESULTS:
        assert not store.seal(one)
        assert store.report(one) is None
        (folder / name).write_bytes(b'{"file_sha256": "0"}')
    assert store.seal(one)
    assert store.report(one) is None  # the video is not that of the report
    (folder / "thumbnail.jpg").write_bytes(b"")
    assert not store.seal(one)


def test_a_second_server(store: Store) -> None:
    with pytest.raises(InputError) as caught:
        Store(store.path)
    assert str(os.getpid()) in str(caught.value)
    assert caught.value.exit_code == 2


def test_uploads_of_an_earlier_server_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    upload(store)
    store.close()
    store = Store(tmp_path)
    assert not [*(tmp_path / "incoming").iterdir()]
    store.close()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file"):
        Store(tmp_path / "file")
    with pytest.raises(InputError, match="file"):
        Store(tmp_path / "file" / "below")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "jobs.sqlite3").write_bytes(b"no database at all" * 100)
    for _ in range(2):  # and no lock is left behind
        with pytest.raises(InputError, match=r"damaged/jobs\.sqlite3"):
            Store(damaged)
    inside = tmp_path / "inside"
    store = Store(inside)
    store.add(job(), None)
    store.close()
    database = sqlite3.connect(inside / "jobs.sqlite3")
    database.execute("UPDATE jobs SET request = '{'")
    database.commit()
    database.close()
    with pytest.raises(InputError, match=r"inside/jobs\.sqlite3"):
        Store(inside)
    newer = tmp_path / "newer"
    Store(newer).close()
    database = sqlite3.connect(newer / "jobs.sqlite3")
    database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(InputError, match="version 2") as refusal:
        Store(newer)
    assert str(refusal.value).count("jobs.sqlite3") == 1  # it is not damaged, too


MOUNTS = r"""
22 1 0:20 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / /home rw - nfs4 host:/home rw
24 23 0:22 / /home/local\040disk rw shared:1 - xfs /dev/vdb rw
25 22 0:23 / /mnt rw - ext4 /dev/vdc rw
26 22 0:24 / /mnt rw master:1 - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data", "ext4"),
        ("/homes", "ext4"),
        ("/home", "nfs4"),
        ("/home/a/b", "nfs4"),
        ("/home/local disk/a", "xfs"),
        ("/mnt/x", "fuse.sshfs"),
    ],
)
def test_file_systems(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs4", "nfs", "cifs", "smb3", "fuse.sshfs", "lustre"])
def test_network_file_systems_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("worldline.serve.folder.file_system", lambda *_: kind)
    with pytest.raises(InputError, match=kind):
        Store(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr("worldline.serve.folder.file_system", lambda *_: "ext4")
    check_local(tmp_path)


def test_a_full_disk_leaves_nothing(store: Store) -> None:
    (pages,) = store.rows._writer.execute("PRAGMA page_count").fetchone()
    store.rows._writer.execute(f"PRAGMA max_page_count = {pages}")
    kept = 0

    def fill() -> None:
        nonlocal kept
        while True:
            one = job(input_kind="image", input_suffix=".png", metadata={"a": "x" * 3000})
            store.add(one, upload(store))
            kept += 1

    error = refused(fill)
    assert (error.code, error.status) == ("disk_full", 503)
    assert len(files(store)) == kept
    assert sum(store.counts().values()) == kept
    assert not [*(store.path / "incoming").iterdir()]


def test_gets_are_cheap_among_ten_thousand(store: Store) -> None:
    ids = []
    with store.rows.transaction():
        for i in range(10_000):
            one = job(status="queued" if i % 100 == 0 else "completed", created_at=1.0)
            store.rows.insert(one)
            ids.append(one.id)
    began = time.process_time()
    for id in ids[::10]:
        store.get(id, "")
    assert time.process_time() - began < 0.5  # of 1,000


@pytest.mark.slow
def test_kills_at_fifty_points(tmp_path: Path) -> None:
    """What was answered holds after a kill between any two durable operations."""
    command = [sys.executable, "-m", "tests.serve.crashes", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "check": True}
    count = int(subprocess.run([*command, "0"], **options, capture_output=True).stdout)
    assert count > 100
    points = sorted({1 + i * (count - 1) // 49 for i in range(50)})
    subprocess.run([*command, *map(str, points)], **options)
    killed = 0
    for point in points:
        answers = (tmp_path / f"{point}.answers").read_text().split("\n")
        killed += len([line for line in answers if line.startswith("deleted")]) < 2
        asyncio.run(check_recovery(tmp_path / str(point), [line.split() for line in answers]))
    assert killed > 40


async def check_recovery(folder: Path, answers: list[list[str]]) -> None:
    store = Store(folder)
    facts = {words[0]: words for words in answers if words}
    accepted = {words[2]: words[1] for words in answers if words and words[0] == "accepted"}
    deleted = {words[1] for words in answers if words and words[0] == "deleted"}
    ended = {words[1]: words[0] for words in answers if words and words[0] in ENDED}
    for key, id in accepted.items():
        if id in deleted or (key == "delete") or (key == "c" and len(ended) == 5):
            continue  # a deletion may be done though it was not yet answered
        status = store.get(id, None).status
        assert id not in ended or status == ended[id]
    queue = crashes.make_queue(store)
    await queue.start()
    for key in crashes.KEYS:
        one = await crashes.submit(queue, key)
        gone = key == "delete" or (key == "c" and len(ended) == 5)
        assert one.id == accepted.get(key, one.id) or gone, facts
        one = await queue.wait(one.id)
        expected = {"completed"} | ({"cancelled"} if key == "cancel" else set())
        assert one.status in expected | ({"failed"} if one.error_code == "interrupted" else set())
    jobs = store.page(None, None, 100, False)[0]
    assert sorted(str(one.idempotency_key) for one in jobs) == sorted(crashes.KEYS)
    assert not deleted & {one.id for one in jobs}
    store.sweep(older_than=-1)
    inputs = {store.input_path(one) for one in jobs}
    completed = {one.id for one in jobs if one.status == "completed"}
    assert {*files(store)} == inputs | {store.folder(id) for id in completed}
    for id in completed:
        assert store.report(store.get(id, None)) is not None
        assert {path.name for path in store.folder(id).iterdir()} == {*RESULTS}
    assert not [*(folder / "incoming").iterdir()]
    await queue.drain(0)
    store.close()
