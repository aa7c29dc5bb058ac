"""The number of workers follows the seconds that wait, within bounds, and spares the busy."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from worldline.errors import Error, InputError
from worldline.serve.jobs import Queue
from worldline.serve.records import ENDED
from worldline.serve.scaling import Autoscaler, RayOptions, import_cluster

from .fake_worker import Script
from .test_jobs import job, queue, run, until

QUICK = {"target_wait_s": 0.2, "idle_s": 0.1}


@asynccontextmanager
async def scaled(
    folder: Path, script: Script, *, down_s: float = 0.05, wait: bool = True, **options: float
) -> AsyncIterator[Queue]:
    """A queue with one worker, and an autoscaler."""
    async with queue(folder, script, wait=wait) as q:
        chosen = RayOptions.parse({**QUICK, **options})
        scaler = Autoscaler(q, chosen, look_s=0.01, down_s=down_s)
        scaler.start()
        try:
            yield q
        finally:
            await scaler.close()


def count(q: Queue) -> int:
    return len(q.pool.slots["w"])


@pytest.mark.parametrize(
    ("queued", "seconds", "workers"),
    [(0, 60, 1), (1, 60, 1), (1, 61, 2), (20, 6, 2), (20, 9, 3), (20, 9.1, 4), (500, 60, 8)],
)
def test_workers_that_are_wanted(queued: int, seconds: float, workers: int) -> None:
    assert RayOptions().wanted(queued, seconds) == workers
    assert RayOptions.parse({"min_workers": 3}).wanted(queued, seconds) == max(3, workers)


def test_bounds_are_checked() -> None:
    with pytest.raises(InputError, match=r"max_workers.*1.*min_workers.*2"):
        RayOptions.parse({"min_workers": 2, "max_workers": 1})
    for name, value in (("min_workers", 0), ("target_wait_s", 0.0)):
        with pytest.raises(InputError, match=name):
            RayOptions.parse({name: value})


def test_a_burst_brings_workers_that_leave_once_idle(tmp_path: Path) -> None:
    async def test() -> None:
        async with scaled(tmp_path, Script(steps=4, seconds=0.02), max_workers=2) as q:
            ids = [(await q.submit(job(), None)).id for _ in range(20)]
            await until(lambda: count(q) == 2)
            assert [slot.name for slot in q.pool.slots["w"]] == ["w/0", "w/1"]
            most = 0
            while any(q.store.get(id, None).status not in ENDED for id in ids):
                most = max(most, count(q))
                await asyncio.sleep(0.005)
            assert most == 2
            assert q.store.counts() == {("w", "completed"): 20}
            await until(lambda: count(q) == 1)
            await asyncio.sleep(0.2)
            assert count(q) == 1

    run(test())


def test_the_first_job_counts_by_the_time_it_runs(tmp_path: Path) -> None:
    async def test() -> None:
        async with scaled(tmp_path, Script(steps=1000, seconds=0.02), max_workers=3) as q:
            await q.submit(job(), None)
            await q.submit(job(), None)
            assert count(q) == 1
            await until(lambda: count(q) == 2)  # one that waits for longer than the target

    run(test())


def test_earlier_jobs_count_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=4, seconds=0.1)) as q:
            await q.wait((await q.submit(job(), None)).id)
        loading = Script(load_seconds=60)
        async with scaled(tmp_path, loading, wait=False, max_workers=4) as q:
            for _ in range(3):
                await q.submit(job(), None)
            await until(lambda: count(q) == 4)

    run(test())


def test_a_busy_worker_stays_and_one_leaves_at_a_time(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(steps=4, seconds=0.02)
        async with scaled(tmp_path, script, max_workers=4, down_s=0.3, idle_s=0.05) as q:
            ids = [(await q.submit(job(), None)).id for _ in range(30)]
            await until(lambda: count(q) == 4)
            script.steps = 1000
            for id in ids:
                await q.cancel(id)
            long = [(await q.submit(job(), None)).id for _ in range(2)]
            await until(lambda: all(q.store.get(id, None).step_done for id in long))
            await until(lambda: count(q) == 3)
            await asyncio.sleep(0.15)
            assert count(q) == 3
            await until(lambda: count(q) == 2)
            await asyncio.sleep(0.5)
            assert count(q) == 2
            assert [q.store.get(id, None).status for id in long] == ["in_progress"] * 2
            assert ("kill", "w/0") not in script.log

    run(test())


def test_ray_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("worldline.serve.ray_workers", "worldline.fleet.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Error, match=r"worldline\[ray\]") as caught:
        import_cluster()
    assert "\n" not in str(caught.value)
