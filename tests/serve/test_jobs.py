"""Jobs are made in order, once, and end as they should, whatever workers and clients do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from worldline.serve.errors import ApiError
from worldline.serve.jobs import Queue, Settings
from worldline.serve.records import ENDED, Checked, Job, new_id
from worldline.serve.store import RESULTS, Store
from worldline.serve.streams import Event

from .fake_worker import FakeWorker, Script

FAST = {"watch_seconds": 0.02, "batch_window": 0.02, "load_backoff": 0.02, "min_free_bytes": 0.0}


def job(prompt: str = "a ball", *, batch_key: str | None = None, **columns: Any) -> Job:
    request = {"prompt": prompt, "seed": 7, "num_steps": 4}
    shape = {"num_frames": 9, "height": 64, "width": 96, "fps": 24.0}
    return Job(new_id(), columns.pop("model", "w"), request, shape, batch_key=batch_key, **columns)


@asynccontextmanager
async def queue(
    folder: Path,
    script: Script | None = None,
    *,
    workers: int = 1,
    wait: bool = True,
    **settings: Any,
) -> AsyncIterator[Queue]:
    script = script or Script()
    store = Store(folder)
    made = [FakeWorker("w", f"w/{i}", script) for i in range(workers)]

    def make_worker(world: str, name: str) -> FakeWorker:
        return FakeWorker(world, name, script)

    queue = Queue(store, {"w": made}, make_worker, Settings(**(FAST | settings)))
    await queue.start()
    try:
        if wait:
            await until(lambda: queue.health()[0] == "ready")
        yield queue
    finally:
        await asyncio.gather(queue.drain(0), queue.drain(0))  # the second one ends it at once
        store.close()


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def refused(work: Coroutine[Any, Any, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


def runs(script: Script) -> list[Any]:
    return [ids for name, ids in script.log if name == "run"]


def test_three_jobs_on_one_worker(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(seconds=0.03)) as q:
            ids = [(await q.submit(job(), None)).id for _ in range(3)]
            order = []
            while True:
                jobs = [q.store.get(id, None) for id in ids]
                places = [q.position(job) for job in jobs]
                queued = [place for place in places if place is not None]
                assert queued == [*range(len(queued))]
                for one, place in zip(jobs, places, strict=True):
                    assert (place is None) == (one.status != "queued")
                makes = [one for one in jobs if one.status == "in_progress"]
                # files of one are written while the next is begun
                assert sum(one.step_kind != "decode" for one in makes) <= 1
                order.append([one.status for one in jobs])
                if all(one.status in ENDED for one in jobs):
                    break
                await asyncio.sleep(0.002)
            assert [one.status for one in jobs] == ["completed"] * 3
            assert all(one.attempts == 1 and one.progress == 100 for one in jobs)
            assert all(one.result["media_type"] == "video/mp4" for one in jobs)
            starts = [one.started_at for one in jobs]
            assert starts == sorted(starts)
            for id in ids:
                assert all((q.store.folder(id) / name).stat().st_size for name in RESULTS)
            assert q.store.counts() == {("w", "completed"): 3}

    run(test())


def test_progress_rises_to_99_then_100(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=10, seconds=0.01)) as q:
            for _ in range(2):  # by default shares, then by what the first one took
                id = (await q.submit(job(), None)).id
                seen = []
                while (one := q.store.get(id, None)).status not in ENDED:
                    seen.append(one.progress)
                    assert one.progress <= 99
                    await asyncio.sleep(0.002)
                assert seen == sorted(seen)
                assert len(set(seen)) > 5
                assert one.progress == 100
            first = await q.submit(job(), None)
            second = await q.submit(job(), None)
            await until(lambda: q.store.get(first.id, None).step_done == 5)
            eta, later = q.eta(q.store.get(first.id, None)), q.eta(second)
            assert eta is not None
            assert later is not None
            assert 0 < eta < 0.2 < 10 * later
            assert eta < later
            assert 250 <= q.poll_milliseconds(second) <= 5000
            assert 250 <= q.poll_milliseconds(first) <= 5000

    run(test())


def test_a_cancelled_job_lets_the_next_begin(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(steps=1000, seconds=0.05)
        async with queue(tmp_path, script) as q:
            first = await q.submit(job(), None)
            second, third = await q.submit(job(), None), await q.submit(job(), None)
            await until(lambda: q.store.get(first.id, None).step_done > 1)
            cancelled = await q.cancel(third.id)
            assert (cancelled.status, cancelled.attempts) == ("cancelled", 0)
            began = time.monotonic()
            assert (await q.cancel(first.id)).status == "cancelled"
            await until(lambda: q.store.get(second.id, None).status == "in_progress")
            assert time.monotonic() - began < 0.05 + 1
            assert (await q.cancel(first.id)).status == "cancelled"  # again: unchanged
            assert (await q.cancel(second.id)).status == "cancelled"
            assert not q.store.folder(first.id).exists()
            assert (await refused(q.cancel(new_id()))).code == "video_not_found"
            assert [name for name, _ in script.log].count("load") == 1  # no worker was killed

    run(test())


def test_a_worker_deaf_to_cancel_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(seconds=0.01)
        async with queue(tmp_path, script, cancel_grace=0.1, cancel_wait=0.01) as q:
            first, second = await q.submit(job("hang on"), None), await q.submit(job(), None)
            await until(lambda: q.store.get(first.id, None).step_kind == "text")
            assert (await q.cancel(first.id)).status == "in_progress"
            assert (await q.wait(first.id)).status == "cancelled"
            assert (await q.wait(second.id)).status == "completed"
            assert ("kill", "w/0") in script.log

    run(test())


def test_a_batch_is_made_together(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(max_batch_size=4, seconds=0.05, steps=6)
        async with queue(tmp_path, script, batch_window=2) as q:
            prompts = ["a", "refuse b", "c", "d"]
            jobs = [await q.submit(job(prompt, batch_key="k"), None) for prompt in prompts]
            await until(lambda: q.store.get(jobs[2].id, None).status == "in_progress")
            await q.cancel(jobs[2].id)
            ended = [await q.wait(one.id) for one in jobs]
            statuses = ["completed", "failed", "cancelled", "completed"]
            assert [one.status for one in ended] == statuses
            assert ended[1].error_code == "guardrail_refused"
            assert ended[1].error_param == "prompt"
            assert runs(script) == [tuple(one.id for one in jobs)]

    run(test())


def test_the_oldest_waits_no_longer_than_the_window(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(max_batch_size=100, steps=1, seconds=0)
        async with queue(tmp_path, script, batch_window=1) as q:
            began = time.monotonic()
            ids = [(await q.submit(job(batch_key="k"), None)).id]
            while not runs(script):  # others come all the time
                await asyncio.sleep(0.1)
                ids.append((await q.submit(job(batch_key="k"), None)).id)
            assert 0.9 < time.monotonic() - began < 10
            assert 2 <= len(runs(script)[0]) <= 12
            for id in ids:
                await q.wait(id)
        async with queue(tmp_path, script, batch_window=1000) as q:
            await q.wait((await q.submit(job(), None)).id)  # one that cannot be batched

    run(test())


def test_jobs_of_one_key_pass_those_between(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(max_batch_size=2, seconds=0.1)
        async with queue(tmp_path, script) as q:
            first = await q.submit(job(), None)
            keys = ["a", "b", "a", None, "b", "b"]
            ids = [(await q.submit(job(batch_key=key), None)).id for key in keys]
            for id in ids:
                await q.wait(id)
            batches = [(0, 2), (1, 4), (3,), (5,)]
            expected = [tuple(ids[i] for i in batch) for batch in batches]
            assert runs(script) == [(first.id,), *expected]

    run(test())


def test_a_batch_out_of_memory_is_halved(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(max_batch_size=4, largest_batch=1)
        async with queue(tmp_path, script, batch_window=2) as q:
            ids = [(await q.submit(job(batch_key="k"), None)).id for _ in range(4)]
            ended = [await q.wait(id) for id in ids]
            assert [one.status for one in ended] == ["completed"] * 4
            assert [one.attempts for one in ended] == [1] * 4
            sizes = [len(batch) for batch in runs(script)]
            assert sizes[0] == 4
            assert max(sizes[1:]) == 2
            assert [id for batch in runs(script) for id in batch][-1] == ids[3]
            alone = await q.submit(job("memory", batch_key="k"), None)
            assert (await q.wait(alone.id)).error_code == "out_of_memory"

    run(test())


def test_a_job_whose_worker_died_is_made_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path) as q:
            restarts = []
            q.observers.append(lambda name, facts: restarts.append(name))
            once, twice = await q.submit(job("die_once"), None), await q.submit(job("die"), None)
            third = await q.submit(job(), None)
            assert ((await q.wait(once.id)).status, q.store.get(once.id, None).attempts) == (
                "completed",
                2,
            )
            failed = await q.wait(twice.id)
            assert (failed.status, failed.error_code) == ("failed", "worker_died")
            assert failed.attempts == 2
            assert (await q.wait(third.id)).status == "completed"
            assert restarts.count("restart") == 3

    run(test())


def test_one_that_kills_a_batch_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(max_batch_size=3)
        async with queue(tmp_path, script, batch_window=2) as q:
            prompts = ["a", "die", "c"]
            jobs = [await q.submit(job(prompt, batch_key="k"), None) for prompt in prompts]
            ended = [await q.wait(one.id) for one in jobs]
            assert [one.status for one in ended] == ["completed", "failed", "completed"]
            assert ended[1].error_code == "worker_died"
            assert [len(batch) for batch in runs(script)] == [3, 1, 1, 1]

    run(test())


def test_a_cancel_while_a_dead_workers_batch_waits_again(tmp_path: Path) -> None:
    """What is written of the others then does not bring it back."""

    async def test() -> None:
        script = Script(max_batch_size=4)
        async with queue(tmp_path, script, batch_window=2) as q:
            prompts = ["die_once", "b", "c", "d"]
            jobs = [await q.submit(job(prompt, batch_key="k"), None) for prompt in prompts]
            slow_down(q.store)
            first, last = jobs[0].id, jobs[3].id
            await until(lambda: last in {e.id for e in q._outcomes.line("w").waiting})
            ends = [asyncio.create_task(q.cancel(id)) for id in (first, last)]
            await asyncio.gather(*ends)
            for one in jobs:
                ended = await q.wait(one.id)
                expected = "cancelled" if one.id in (first, last) else "completed"
                assert ended.status == expected
            assert q.store.counts() == {("w", "cancelled"): 2, ("w", "completed"): 2}

    run(test())


def slow_down(store: Store, seconds: float = 0.03) -> None:
    """Let each write take its time."""
    commit = store.rows._commit

    def slowly() -> None:
        time.sleep(seconds)
        commit()

    store.rows._commit = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize("settings", [{"stuck_seconds": 0.1}, {"heartbeat_seconds": 0.1}])
def test_a_stuck_worker_is_replaced(tmp_path: Path, settings: dict[str, float]) -> None:
    async def test() -> None:
        script = Script(seconds=0.001)
        async with queue(tmp_path, script, **settings) as q:
            stuck = await q.submit(job("hang"), None)
            await until(lambda: q.store.get(stuck.id, None).status == "in_progress")
            script.deaf_heart = "heartbeat_seconds" in settings
            await until(lambda: ("kill", "w/0") in script.log)
            script.deaf_heart = False
            await until(lambda: q.health()[0] == "ready")
            if "stuck_seconds" in settings:
                assert (await q.wait(stuck.id)).error_code == "worker_died"

    run(test())


def test_a_worker_that_ends_while_idle_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script()
        async with queue(tmp_path, script) as q:
            worker = q.pool.slots["w"][0].worker
            assert isinstance(worker, FakeWorker)
            worker.die()
            await until(lambda: q.pool.slots["w"][0].worker is not worker)
            assert (await q.wait((await q.submit(job(), None)).id)).status == "completed"

    run(test())


def test_a_world_that_cannot_load_is_tried_again(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(load_failures=3, load_seconds=0.05)
        async with queue(tmp_path, script, wait=False, load_backoff=0.05) as q:
            assert q.health()[0] == "loading"
            assert q.facts("w") is None
            error = await refused(q.check("w", {}, None, None))
            assert (error.code, error.status) == ("loading", 503)
            assert error.retry_after
            one = await q.submit(job(), None)  # it waits
            await until(lambda: q.health()[0] == "no_worker")
            error = await refused(q.check("w", {}, None, None))
            assert (error.code, error.status) == ("no_worker", 503)
            assert (await q.wait(one.id)).status == "completed"
            assert [name for name, _ in script.log].count("load") == 4
            assert (await refused(q.check("v", {}, None, None))).code == "model_not_found"
            checked = await q.check("w", {"prompt": "x", "seed": 3}, None, None)
            assert checked.request["seed"] == 3
            assert (await refused(q.check("w", {"promt": "x"}, None, None))).param == "promt"

    run(test())


def test_few_inputs_are_opened_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        opened, most = 0, 0

        async def check(stated: Any, input: str | None, kind: Any) -> Checked:
            nonlocal opened, most
            opened += input is not None
            most = max(most, opened)
            await asyncio.sleep(0.01)
            opened -= input is not None
            return Checked({}, {}, None)

        async with queue(tmp_path) as q:
            q.pool.slots["w"][0].worker.check = check  # type: ignore[method-assign]
            limit = max(4, os.cpu_count() or 1)
            checks = [q.check("w", {}, tmp_path / "a", "image") for _ in range(2 * limit)]
            held = asyncio.gather(*checks)
            await until(lambda: opened == limit)
            await q.check("w", {}, None, None)  # one without input waits for none
            await held
            assert most == limit

    run(test())


def test_workers_of_a_world_share_one_line(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(seconds=0.05)
        async with queue(tmp_path, script, workers=2) as q:
            await until(lambda: len(q.pool.free("w")) == 2)
            jobs = [await q.submit(job(), None) for _ in range(3)]
            await until(lambda: q.store.counts().get(("w", "in_progress")) == 2)
            assert q.pool.add("w") == "w/2"
            await until(lambda: q.store.counts().get(("w", "in_progress")) == 3)
            assert await q.pool.remove("w") is None  # all are busy
            for one in jobs:
                assert (await q.wait(one.id)).status == "completed"
            await until(lambda: all(slot.is_idle for slot in q.pool.slots["w"]))
            assert await q.pool.remove("w") == "w/2"
            assert [slot.name for slot in q.pool.slots["w"]] == ["w/0", "w/1"]
            assert ("stop", "w/2") in script.log
            assert q.pool.add("w") == "w/2"

    run(test())


def test_each_world_has_its_own_line(tmp_path: Path) -> None:
    async def test() -> None:
        scripts = {"slow": Script(seconds=0.2, steps=100), "quick": Script()}

        def make_worker(world: str, name: str) -> FakeWorker:
            return FakeWorker(world, name, scripts[world])

        store = Store(tmp_path)
        worlds = {world: [make_worker(world, f"{world}/0")] for world in scripts}
        q = Queue(store, worlds, make_worker, Settings(**FAST))
        assert q.worlds == ("slow", "quick")
        await q.start()
        slow = [await q.submit(job(model="slow"), None) for _ in range(3)]
        quick = [await q.submit(job(model="quick"), None) for _ in range(3)]
        for one in quick:
            assert (await q.wait(one.id)).status == "completed"
        assert [q.position(store.get(one.id, None)) for one in slow] == [None, 0, 1]
        await asyncio.gather(q.drain(0), q.drain(0))
        assert store.counts() == {("slow", "queued"): 3, ("quick", "completed"): 3}
        store.close()

    run(test())


def test_a_job_that_takes_too_long(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=10000), job_timeout=0.1) as q:
            ended = await q.wait((await q.submit(job(), None)).id)
            assert (ended.status, ended.error_code) == ("failed", "timeout")

    run(test())


@pytest.mark.parametrize(
    ("prompt", "code"), [("break", "internal_error"), ("unfinished", "internal_error")]
)
def test_failures(tmp_path: Path, prompt: str, code: str) -> None:
    async def test() -> None:
        async with queue(tmp_path) as q:
            ended = await q.wait((await q.submit(job(prompt), None)).id)
            assert (ended.status, ended.error_code) == ("failed", code)
            assert ended.error_message
            assert not q.store.folder(ended.id).exists()

    run(test())


def test_limits(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(seconds=0.5, steps=1000)
        async with queue(tmp_path, script, queue_size=3, queue_per_key=2) as q:
            running = await q.submit(job(owner="a"), None)
            await until(lambda: q.store.get(running.id, None).status == "in_progress")
            upload = q.store.incoming()
            for _ in range(2):
                await q.submit(job(owner="a"), None)
            upload.write_bytes(b"x")
            excess = job(owner="a", input_kind="image", input_suffix=".png")
            error = await refused(q.submit(excess, upload))
            assert (error.code, error.status) == ("key_limit", 429)
            assert not upload.exists()
            keyed = job(owner="b", idempotency_key="k", body_sha256="1")
            await q.submit(keyed, None)
            error = await refused(q.submit(job(owner="b"), None))
            assert (error.code, error.status) == ("queue_full", 429)
            assert error.retry_after
            assert 1 <= error.retry_after <= 120
            again = job(owner="b", idempotency_key="k", body_sha256="1")
            assert (await q.submit(again, None)).id == keyed.id  # though the queue is full
            other = job(owner="b", idempotency_key="k", body_sha256="2")
            assert (await refused(q.submit(other, None))).code == "idempotency_conflict"
            error = await refused(q.submit(job(model="v"), None))
            assert error.code == "model_not_found"
            crowd = await asyncio.gather(
                *(q.submit(job(owner="c"), None) for _ in range(9)), return_exceptions=True
            )
            assert all(isinstance(one, ApiError) for one in crowd)

    run(test())


def test_the_clock_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of jobs are those that passed."""

    async def test() -> None:
        async with queue(tmp_path, Script(steps=10)) as q:
            finished: list[Any] = []
            q.observers.append(lambda name, facts: finished.append((name, facts)))
            usual = time.time
            for shift in (-3600, 3600):
                finished.clear()
                one = await q.submit(job(), None)
                await until(lambda one=one: q.store.get(one.id, None).step_done > 2)
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda shift=shift: usual() + shift)
                    await q.wait(one.id)
                [facts] = [facts for name, facts in finished if name == "finished"]
                assert 0 < facts["job_seconds"] < 30
                [facts] = [facts for name, facts in finished if name == "started"]
                assert 0 <= facts["queue_seconds"] < 30

    run(test())


def test_a_full_disk(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path) as q:
            pages = q.store.rows._writer.execute("PRAGMA page_count").fetchone()[0]
            q.store.rows._writer.execute(f"PRAGMA max_page_count = {pages + 8}")
            accepted: list[Job] = []

            async def fill() -> None:
                while True:
                    accepted.append(await q.submit(job("x" * 2000), None))

            error = await refused(fill())
            assert (error.code, error.status) == ("disk_full", 503)
            assert accepted
            for one in accepted:
                assert (await q.wait(one.id)).status == "completed"
            q.store.rows._writer.execute(f"PRAGMA max_page_count = {1000 * pages}")
            await q.wait((await q.submit(job(), None)).id)
        async with queue(tmp_path, min_free_bytes=1e18, wait=False) as q:
            assert q.health()[0] == "disk_full"
            assert (await refused(q.submit(job(), None))).code == "disk_full"

    run(test())


def test_delete(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=1000)) as q:
            upload = q.store.incoming()
            upload.write_bytes(b"x")
            kept = job(input_kind="image", input_suffix=".png")
            running = await q.submit(kept, upload)
            path = q.store.input_path(running)
            assert path
            assert path.read_bytes() == b"x"
            waiting = await q.submit(job(), None)
            await until(lambda: q.store.get(running.id, None).step_done > 1)
            events = q.subscribe(None, None)
            await q.delete(waiting.id)
            await q.delete(running.id)
            assert not path.exists()
            for one in (running, waiting):
                assert (await refused(q.delete(one.id))).code == "video_not_found"
                assert (await refused(q.wait(one.id))).code == "video_not_found"
                assert not q.store.folder(one.id).exists()
            gone = [e.data["id"] async for e in some(events) if is_deleted(e)]
            assert gone == [waiting.id, running.id]
            last = await q.submit(job(), None)
            await until(lambda: q.store.get(last.id, None).status == "in_progress")

    run(test())


def test_a_delete_that_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has ended for good all the same."""

    def refuse(id: str) -> None:
        raise ApiError("disk_full", "The disk is full.")

    async def test() -> None:
        async with queue(tmp_path, Script(steps=1000)) as q:
            running = await q.submit(job(), None)
            await until(lambda: q.store.get(running.id, None).step_done > 1)
            with monkeypatch.context() as patch:
                patch.setattr(q.store, "delete", refuse)
                assert (await refused(q.delete(running.id))).code == "disk_full"
            assert q.store.get(running.id, None).status == "cancelled"
        async with queue(tmp_path) as q:
            assert q.store.get(running.id, None).status == "cancelled"
            await q.delete(running.id)

    run(test())


def is_deleted(event: Event) -> bool:
    return event.name == "status" and event.data["status"] == "deleted"  # type: ignore[index]


async def some(events: AsyncIterator[Event], seconds: float = 0.2) -> AsyncIterator[Event]:
    """Events until the stream ends or is silent."""
    while True:
        try:
            yield await asyncio.wait_for(anext(events), seconds)
        except (TimeoutError, StopAsyncIteration):
            return


def test_events_of_a_job(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=100, previews=True)) as q:
            blocker = await q.submit(job(), None)
            one = await q.submit(job(), None)
            mine = q.subscribe("", one.id)
            seen = [event async for event in mine]
            names = [event.name for event in seen]
            assert names[0] == "status"
            assert seen[0].data["queue_position"] in (0, 1)  # type: ignore[index]
            assert names[-1] == "completed"
            assert names.count("completed") == 1
            assert isinstance(seen[-1].data, Job)
            assert seen[-1].data.progress == 100
            states = [e.data["status"] for e in seen if e.name == "status"]  # type: ignore[index]
            assert states == sorted(states, key=["queued", "in_progress"].index)
            ids = [int(event.id) for event in seen]
            assert ids == sorted(set(ids))
            progress = [e.data for e in seen if e.name == "progress"]
            took = (q.store.get(one.id, None).completed_at or 0) - (one.created_at)
            assert 2 <= len(progress) <= 4 * took + 2
            assert names.count("preview") <= took + 2
            assert progress[-1].keys() == {"id", "progress", "step", "eta_s"}  # type: ignore
            # one that has ended: one event, then the end
            assert [e.name async for e in q.subscribe("", blocker.id)] == ["completed"]
            assert (await refused(subscribed(q, "other", one.id))).code == "video_not_found"
            json.dumps([event.data for event in seen[:-1]])

    run(test())


async def subscribed(q: Queue, owner: str, id: str) -> None:
    q.subscribe(owner, id)


def test_no_preview_of_what_guardrails_check(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=9, previews=True, guardrails=True)) as q:
            one = await q.submit(job(), None)
            names = [event.name async for event in q.subscribe(None, one.id)]
            assert "preview" not in names
            assert names[-1] == "completed"

    run(test())


def test_a_slow_listener_gets_the_latest_state(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(steps=1, seconds=0.0)) as q:
            slow = q.subscribe("a", None)
            other = q.subscribe("b", None)
            jobs = [await q.submit(job(owner="a"), None) for _ in range(20)]
            for one in jobs:
                await q.wait(one.id)
            seen = [event async for event in some(slow)]
            assert [event.name for event in seen] == ["completed"] * 20
            assert [event async for event in some(other, 0.05)] == []
            await q.drain(0)
            assert [event.name async for event in slow] == ["shutdown"]
            assert [event.name async for event in q.subscribe("a", None)] == ["shutdown"]

    run(test())


def test_drain_lets_a_job_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path, Script(seconds=0.03)) as q:
            first, second = await q.submit(job(), None), await q.submit(job(), None)
            await until(lambda: q.store.get(first.id, None).status == "in_progress")
            await q.drain(10)
            assert q.store.get(first.id, None).status == "completed"
            assert q.store.get(second.id, None).status == "queued"
            assert (await refused(q.submit(job(), None))).code == "shutting_down"
            assert (await refused(q.check("w", {}, None, None))).code == "shutting_down"
            assert (await refused(q.delete(second.id))).code == "shutting_down"
            assert q.health()[0] == "shutting_down"

    run(test())


@pytest.mark.parametrize("prompt", ["a", "deaf a"])
def test_a_drained_job_is_made_after_the_next_start(
    tmp_path: Path, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worldline.serve.outcomes")

    async def test() -> None:
        script = Script(steps=500, seconds=0.01)
        async with queue(tmp_path, script) as q:
            first, second = await q.submit(job(prompt), None), await q.submit(job(), None)
            await until(lambda: q.store.get(first.id, None).step_done > 2)
            waiting = asyncio.create_task(refused(q.wait(first.id)))
            await asyncio.sleep(0)
            began = time.monotonic()
            draining = asyncio.create_task(q.drain(0.05))
            if prompt == "deaf a":
                await asyncio.sleep(0.2)
                await q.drain(0)  # the second signal
            await draining
            assert time.monotonic() - began < 3
            assert (await waiting).code == "shutting_down"
            one = q.store.get(first.id, None)
            assert (one.status, one.attempts) == ("queued", 0)
            stops = [text for text in caplog.messages if "next start" in text]
            assert [text.partition(":")[0] for text in stops] == [first.id] * (prompt != "deaf a")
        script.steps = 2
        async with queue(tmp_path, script) as q:
            for id in (first.id, second.id):
                assert (await q.wait(id)).status == "completed"
            assert runs(script)[-2:] == [(first.id,), (second.id,)]
        async with queue(tmp_path, script) as q:  # what the last jobs took is known
            third = await q.submit(job(), None)
            assert q._outcomes.estimates.seconds(third) is not None

    run(test())


def test_what_a_killed_server_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    states = [
        job("was queued"),
        job("begun once", status="in_progress", attempts=1),
        job("begun twice", status="in_progress", attempts=2),
        job("whole", status="in_progress", attempts=1),
        job("lost", status="completed", attempts=1),
        job("no input", input_kind="image", input_suffix=".png"),
    ]
    for one in states:
        store.add(one, None)
    task = store.task(states[3].id)
    FakeWorker("w", "w/0")._write(task)
    store.close()

    async def test() -> None:
        script = Script()
        async with queue(tmp_path, script, keep_hours=1.0) as q:
            jobs = [q.store.get(one.id, None) for one in states]
            assert jobs[3].status == "completed"
            for one in jobs[2:]:
                assert one.expires_at == one.completed_at + 3600
            assert jobs[3].result["media_type"] == "video/mp4"
            ended = [(await q.wait(one.id)) for one in states]
            assert [one.error_code for one in ended] == [
                *(None, None, "interrupted", None, "internal_error", "internal_error")
            ]
            assert runs(script) == [(states[1].id,), (states[0].id,)]

    run(test())


def test_jobs_of_a_world_that_is_no_longer_served(tmp_path: Path) -> None:
    store = Store(tmp_path)
    states = [
        job(model="before"),
        job(),
        job(model="before", status="in_progress", attempts=1),
        job(model="before", status="in_progress", attempts=1),
    ]
    for one in states:
        store.add(one, None)
    FakeWorker("before", "before/0")._write(store.task(states[3].id))
    store.close()

    async def test() -> None:
        script = Script()
        async with queue(tmp_path, script, queue_size=1) as q:
            ended = [await q.wait(one.id) for one in states]
            # files of the last one were whole
            statuses = ["failed", "completed", "failed", "completed"]
            assert [one.status for one in ended] == statuses
            for one in (ended[0], ended[2]):
                assert (one.error_code, one.error_param) == ("model_not_found", "model")
                assert "before" in str(one.error_message)
            assert runs(script) == [(states[1].id,)]

    run(test())


def test_old_jobs_are_removed(tmp_path: Path) -> None:
    async def test() -> None:
        settings = {"keep_hours": 0.5 / 3600, "flush_seconds": 0.05}
        async with queue(tmp_path, **settings) as q:  # type: ignore[arg-type]
            one = await q.wait((await q.submit(job(), None)).id)
            assert one.expires_at
            assert one.completed_at
            assert one.expires_at == pytest.approx(one.completed_at + 0.5)
            await until(lambda: not q.store.ids("completed"))
            await until(lambda: not q.store.folder(one.id).exists())

    run(test())


def test_a_client_that_hangs_up_leaves_a_job_that_is_made(tmp_path: Path) -> None:
    async def test() -> None:
        async with queue(tmp_path) as q:
            one = job()
            request = asyncio.create_task(q.submit(one, None))
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await until(lambda: q.store.counts())
            assert (await q.wait(one.id)).status == "completed"

    run(test())


@pytest.mark.slow
def test_a_hundred_jobs_with_deaths_and_cancels(tmp_path: Path) -> None:
    async def test() -> None:
        script = Script(seconds=0.001, max_batch_size=4)
        async with queue(tmp_path, script, workers=2, queue_size=1000) as q:
            prompts = ["a", "die_once", "refuse", "a", "die", "break", "a"]
            ids = []
            for i in range(100):
                key = "k" if i % 3 else None
                ids.append((await q.submit(job(prompts[i % 7], batch_key=key), None)).id)
                if i % 10 == 9:
                    await q.cancel(ids[i - 3])
                if i % 25 == 24:
                    await q.delete(ids[i])
            kept = [id for i, id in enumerate(ids) if i % 25 != 24]
            ended = [await q.wait(id) for id in kept]
            codes = {one.error_code for one in ended if one.status == "failed"}
            assert codes == {"worker_died", "guardrail_refused", "internal_error"}
            for id, one in zip(kept, ended, strict=True):
                if prompts[ids.index(id) % 7] == "a":  # though another killed its batch
                    assert one.status in ("completed", "cancelled")
                assert one.attempts <= 3
            assert not q._outcomes.entries
            await until(lambda: not q._dispatcher._batches)
            assert q.store.sweep(older_than=-1) == []
            assert sum(q.store.counts().values()) == 96

    run(test())
