"""A worker: requests that it checks, batches that it makes, and its process."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldline import memory
from worldline.errors import GuardrailRefusal, InputError, NonFiniteError
from worldline.memory import Memory
from worldline.serve import making
from worldline.serve.checks import check, facts
from worldline.serve.errors import ApiError
from worldline.serve.making import Maker
from worldline.serve.records import Task, WorkerDied, new_id
from worldline.serve.workers import LocalWorker
from worldline.video.read import MediaInfo, check_written
from worldline.video.write import write_video
from worldline.world import World, load

DENOISING, DRAWING = "tiny-Cosmos-Predict1-7B-Video2World", "tiny-Cosmos-Predict1-4B"
SHORT = {"prompt": "a ball", "num_steps": 2, "num_video_frames": 9, "seed": 3}
DRAWN = {"batch_size": 4, "disable_diffusion_decoder": True}


@pytest.fixture(scope="module")
def denoising() -> World:
    return load(DENOISING)


@pytest.fixture(scope="module")
def drawing() -> World:
    return load(DRAWING, **DRAWN)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8)
    write_video(frames, path, 25)
    return path


INFO = MediaInfo("video", 12, 64, 96, 25.0, ())._asdict()


class Events(list[dict[str, Any]]):
    """What a maker sends."""

    def of(self, id: str) -> list[dict[str, Any]]:
        return [event for event in self if event.get("id") == id]

    def last(self, id: str) -> dict[str, Any]:
        return self.of(id)[-1]


def tasks_of(
    world: World, folder: Path, count: int, stated: Any, clip: Path | None = None
) -> list[Task]:
    """Tasks of one request, each with a seed of its own."""
    kind = "video" if clip else None
    made = []
    for number in range(count):
        info = INFO if clip else None
        checked = check(world, {**stated, "seed": number}, kind, clip, info)  # type: ignore[arg-type]
        id = new_id()
        place = str(folder / id)
        made.append(Task(id, checked.request, str(clip) if clip else None, kind, place))  # type: ignore[arg-type]
    return made


def run(world: World, tasks: Sequence[Task], react: Any = None) -> Events:
    """Events of a batch that a maker of its own makes; `react` gets the maker and each event."""
    events = Events()

    def send(event: dict[str, Any]) -> None:
        events.append(event)
        if react:
            react(maker, event)

    maker = Maker(world, send)
    maker.add(tasks)
    maker.run(1, tasks)
    maker.finish()
    assert not maker.known | maker.cancelled
    return events


def refused(world: World, stated: Any, kind: Any = None, path: Path | None = None) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        check(world, stated, kind, path, INFO if path else None)
    assert "\0" not in refusal.value.message
    assert str(world.opened.folder.parent) not in refusal.value.message
    return refusal.value


# what is checked


def test_a_request_is_resolved(denoising: World) -> None:
    checked = check(denoising, {"prompt": "a ball"}, None, None, None)
    assert 0 <= checked.request["seed"] < 1 << 32
    assert checked.request["sampler"] == "edm_euler"
    assert not {name for name in checked.request if name.endswith("_embeddings")}
    assert checked.shape == {"num_frames": 33, "height": 128, "width": 192, "fps": 25.0}
    assert checked.batch_key is None
    again = check(denoising, json.loads(json.dumps(checked.request)), None, None, None)
    assert again == checked
    seeds = {check(denoising, {"prompt": "a"}, None, None, None).request["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("stated", "code", "param", "word"),
    [
        ({"prompt": "a", "num_step": 3}, "unknown_parameter", "num_step", "num_steps"),
        ({"prompt": "a", "Seed ": 3}, "unknown_parameter", "Seed", "seed"),
        ({"prompt": "a", "zzz": 3}, "unknown_parameter", "zzz", "guidance"),
        ({"prompt": "a", "a\0b": 3}, "unknown_parameter", "a\\x00b", "no such field"),
        ({"prompt": "a", "temperature": 3}, "unknown_parameter", "temperature", "autoregressive"),
        (
            {"prompt_embeddings": "/etc/passwd"},
            "unknown_parameter",
            "prompt_embeddings",
            "no such field",
        ),
        ({"prompt": "a", "seed": -1}, "invalid_value", "seed", "-1"),
        ({"prompt": "a", "seed": "7"}, "invalid_value", "seed", "integer"),
        ({"prompt": "a", "seed": True}, "invalid_value", "seed", "True"),
        ({"prompt": "a", "num_steps": 2.5}, "invalid_value", "num_steps", "2.5"),
        ({"prompt": "a", "guidance": float("nan")}, "invalid_value", "guidance", "finite"),
        ({"prompt": "a", "guidance": 1e308}, "invalid_value", "guidance", "100"),
        ({"prompt": "a", "num_video_frames": 10}, "invalid_value", "num_video_frames", "9"),
        ({"prompt": "a", "height": 100}, "invalid_value", "height", "96"),
        ({"prompt": "a", "fps": 0}, "invalid_value", "fps", "1"),
        ({"prompt": "a", "sampler": "x"}, "invalid_value", "sampler", "edm_euler"),
        ({"prompt": "a", "num_input_frames": 1}, "invalid_value", "num_input_frames", "input"),
        ({"prompt": "  "}, "invalid_value", "prompt", "empty"),
        ({"prompt": ["a"]}, "invalid_value", "prompt", "string"),
        ({"prompt": "\ud800"}, "invalid_value", "prompt", "string"),
        ({}, "missing_parameter", "prompt", "prompt"),
        ({"prompt": None}, "missing_parameter", "prompt", "prompt"),
    ],
)
def test_fields_are_named(denoising: World, stated: Any, code: str, param: str, word: str) -> None:
    refusal = refused(denoising, stated)
    assert (refusal.code, refusal.param) == (code, param)
    assert word in refusal.message
    assert "embeddings" not in refusal.message or param == "prompt_embeddings"


def test_inputs_are_checked(denoising: World, drawing: World, clip: Path) -> None:
    missing = refused(drawing, {})
    assert (missing.code, missing.param) == ("missing_parameter", "input_reference")
    prompt = refused(drawing, {"prompt": "a ball"}, "video", clip)
    assert (prompt.code, prompt.param) == ("invalid_value", "prompt")
    with pytest.raises(ApiError, match="3 frames") as short:
        check(drawing, {}, "video", clip, {**INFO, "frames": 3})
    assert (short.value.code, short.value.param) == ("invalid_value", "input_reference")
    assert str(clip) not in short.value.message
    with pytest.raises(ApiError) as wide:
        check(drawing, {}, "video", clip, {**INFO, "width": 4000, "height": 10})
    assert wide.value.param == "input_reference"


def test_a_world_of_one_size(drawing: World, clip: Path) -> None:
    own = {"width": 192, "height": 128, "fps": 25}
    checked = check(drawing, own, "video", clip, INFO)
    assert "width" not in checked.request
    for name, value in (("width", 64), ("height", "128"), ("fps", 24), ("fps", True)):
        refusal = refused(drawing, {**own, name: value}, "video", clip)
        assert (refusal.code, refusal.param) == ("invalid_value", name)
    assert "192x128" in refused(drawing, {"width": 64}, "video", clip).message


def test_too_little_memory(denoising: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(0, 10**9))
    monkeypatch.setattr("worldline.world.held_bytes", lambda device: 0)
    refusal = refused(denoising, SHORT)
    assert refusal.code == "invalid_value"
    assert "memory" in refusal.message
    # what this process holds will be free again
    monkeypatch.setattr("worldline.world.held_bytes", lambda device: 10**9)
    assert check(denoising, SHORT, None, None, None).request["seed"] == 3


def test_jobs_of_a_batch_have_one_key(drawing: World, clip: Path) -> None:
    def key(**stated: Any) -> str | None:
        return check(drawing, stated, "video", clip, INFO).batch_key

    assert key(seed=1) == key(seed=2) == key() is not None
    assert (
        len({key(), key(temperature=0.5), key(num_input_frames=1), key(num_video_frames=41)}) == 4
    )
    image = MediaInfo("image", 1, 64, 96, 0.0, ())._asdict()
    assert check(drawing, {}, "image", clip, image).batch_key != key(num_input_frames=1)


def test_facts(denoising: World, drawing: World) -> None:
    one, two = facts(denoising, 1.5), facts(drawing, 2)
    assert json.loads(json.dumps(vars(one)))["load_seconds"] == 1.5
    assert (one.inputs, two.inputs) == (["none", "image", "video"], ["image", "video"])
    assert (one.limits["prompt"], two.limits["prompt"]) == ("required", "none")
    assert "prompt" in one.fields
    assert not {"prompt", "step_cache", "prompt_embeddings"} & {*two.fields}
    assert one.fields["num_steps"]["default"] == 20
    assert one.fields["num_steps"]["minimum"] == 1
    assert one.fields["seed"].keys() & {"default"} == set()
    limits = {name: one.limits[name] for name in ("frames_multiple", "min_frames", "max_frames")}
    assert limits == {"frames_multiple": 8, "min_frames": 1, "max_frames": 33}
    assert (two.limits["min_frames"], two.limits["sizes"]) == (33, [[192, 128]])
    assert (one.max_batch_size, two.max_batch_size) == (1, 4)
    assert (one.guardrails, one.previews) == (False, True)
    assert two.defaults["fps"] == 25


# what is made


def test_a_video_and_its_files(denoising: World, tmp_path: Path) -> None:
    [task] = tasks_of(denoising, tmp_path, 1, {**SHORT, "preview_every": 1})
    events = run(denoising, [task])
    names = [event["event"] for event in events.of(task.id)]
    assert names[0] == "begun"
    assert names[-1] == "done"
    assert [event for event in events if event["event"] == "free"] == [
        {"event": "free", "batch": 1}
    ]
    steps = [e for e in events if e["event"] == "step"]
    assert ("denoise", 2, 2) in {(e["kind"], e["done"], e["total"]) for e in steps}
    [preview, *_] = [e for e in events if e["event"] == "preview"]
    with Image.open(io.BytesIO(base64.b64decode(preview["jpeg_base64"]))) as picture:
        assert picture.size == (320, 213)
    folder, result = Path(task.folder), events.last(task.id)["result"]
    assert {*os.listdir(folder)} == {"video.mp4", "thumbnail.jpg", "report.json"}
    check_written(folder / "video.mp4", 9)
    with Image.open(folder / "thumbnail.jpg") as picture:
        assert picture.size == (192, 128)
    text = (folder / "report.json").read_text()
    report = json.loads(text)
    assert report["file_sha256"] == result["file_sha256"]
    assert report["request"]["prompt"] == "a ball"
    assert result["media_type"] == "video/mp4"
    assert result["inference_time_s"] > 0
    assert {"denoise", "decode", "save"} <= result["stage_durations"].keys()
    assert result["peak_memory_mb"] > 0
    # the same bytes as of Python
    video = denoising.generate(**{k: v for k, v in task.request.items() if v is not None})
    path = video.save(tmp_path / "same.mp4")
    assert path.read_bytes() == (folder / "video.mp4").read_bytes()


def test_reports_hold_no_paths(denoising: World, clip: Path, tmp_path: Path) -> None:
    [task] = tasks_of(denoising, tmp_path, 1, SHORT, clip)
    assert run(denoising, [task]).last(task.id)["event"] == "done"
    text = (tmp_path / task.id / "report.json").read_text()
    for path in (clip.parent, tmp_path, denoising.opened.folder, Path.home()):
        assert str(path) not in text
    assert json.loads(text)["input"] == "input_reference"


def test_cancelling_the_only_video(denoising: World, tmp_path: Path) -> None:
    [task] = tasks_of(denoising, tmp_path, 1, {**SHORT, "num_steps": 500})

    def react(maker: Maker, event: dict[str, Any]) -> None:
        if event.get("kind") == "denoise":
            maker.cancel(task.id)
            maker.cancel("unknown")

    events = run(denoising, [task], react)
    assert events.last(task.id)["event"] == "cancelled"
    assert max(e["done"] for e in events if e.get("kind") == "denoise") < 3
    assert not (tmp_path / task.id).exists()
    [again] = tasks_of(denoising, tmp_path, 1, SHORT)
    assert run(denoising, [again]).last(again.id)["event"] == "done"


def test_a_task_that_is_cancelled_before_it_begins(denoising: World, tmp_path: Path) -> None:
    first, second = tasks_of(denoising, tmp_path, 2, SHORT)

    def react(maker: Maker, event: dict[str, Any]) -> None:
        if event["event"] == "begun" and event["id"] == first.id:
            maker.cancel(second.id)

    events = run(denoising, [first, second], react)
    assert events.last(first.id)["event"] == "done"
    assert [event["event"] for event in events.of(second.id)] == ["cancelled"]


@pytest.mark.slow
def test_a_batch(
    drawing: World, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four, one is refused and one is cancelled; the others are what they are alone."""
    from worldline.guards import Checks

    tasks = tasks_of(drawing, tmp_path, 4, {}, clip)
    untouched = Checks.before

    def before(self: Checks, request: Any, clip: Any) -> Any:
        if request.seed == 1:
            raise GuardrailRefusal("a secret word was refused", "prompt")
        return untouched(self, request, clip)

    def react(maker: Maker, event: dict[str, Any]) -> None:
        if event.get("kind") == "tokens" and event["done"] > 1:
            maker.cancel(tasks[2].id)

    monkeypatch.setattr(Checks, "before", before)
    events = run(drawing, tasks, react)
    ends = [events.last(task.id)["event"] for task in tasks]
    assert ends == ["done", "failed", "cancelled", "done"]
    assert not (tmp_path / tasks[2].id).exists()
    failed = events.last(tasks[1].id)
    assert (failed["code"], failed["param"]) == ("guardrail_refused", "prompt")
    assert failed["message"] == "A guardrail refused the prompt."
    for task in (tasks[0], tasks[3]):
        assert any(event.get("kind") == "tokens" for event in events.of(task.id))
        video = drawing.generate(clip, seed=task.request["seed"])
        written = (tmp_path / task.id / "video.mp4").read_bytes()
        assert video.save(tmp_path / "alone.mp4").read_bytes() == written


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_halved(
    drawing: World, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run_batch = list[int](), drawing.run_batch

    def small(jobs: Sequence[Any]) -> Iterator[Any]:
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise MemoryError
        return run_batch(jobs)

    monkeypatch.setattr(drawing, "run_batch", small)
    tasks = tasks_of(drawing, tmp_path, 3, {}, clip)
    events = run(drawing, tasks)
    assert sizes == [3, 2, 1, 1, 1]
    for task in tasks:
        assert events.last(task.id)["event"] == "done"
        assert [event["event"] for event in events.of(task.id)].count("begun") == 1


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (MemoryError(), "out_of_memory", "memory"),
        (GuardrailRefusal("a secret", "video"), "guardrail_refused", "the video"),
        (NonFiniteError("step 3: latents are not finite"), "internal_error", "finite"),
        (InputError("num_steps is 3; give more"), "invalid_value", "num_steps"),
        (RuntimeError("/secret/path"), "internal_error", "log"),
    ],
)
def test_failures(
    denoising: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: str,
    word: str,
) -> None:
    def fail(jobs: Sequence[Any]) -> Iterator[Any]:
        raise error
        yield

    [task] = tasks_of(denoising, tmp_path, 1, SHORT)
    monkeypatch.setattr(denoising, "run_batch", fail)
    failed = run(denoising, [task]).last(task.id)
    assert (failed["event"], failed["code"]) == ("failed", code)
    assert word in failed["message"]
    assert "secret" not in failed["message"]


def test_a_file_that_has_changed(denoising: World, clip: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "input.mp4"
    damaged.write_bytes(clip.read_bytes()[:400])
    good, bad = (
        *tasks_of(denoising, tmp_path, 1, SHORT),
        *tasks_of(denoising, tmp_path, 1, SHORT, clip),
    )
    bad = Task(bad.id, bad.request, str(damaged), "video", bad.folder)
    events = run(denoising, [bad])
    failed = events.last(bad.id)
    assert (failed["code"], failed["param"]) == ("unreadable_media", "input_reference")
    assert str(tmp_path) not in failed["message"]
    assert run(denoising, [good]).last(good.id)["event"] == "done"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EACCES, "internal_error")]
)
def test_files_that_cannot_be_written(
    denoising: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def write(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "/secret")

    [task] = tasks_of(denoising, tmp_path, 1, SHORT)
    monkeypatch.setattr(making, "write_frames", write)
    failed = run(denoising, [task]).last(task.id)
    assert failed["code"] == code
    assert "/secret" not in failed["message"]
    assert os.listdir(tmp_path / task.id) == []


def resident() -> int:
    return memory._number(Path("/proc/self/status"), "VmRSS:") * 1024


@pytest.mark.slow
def test_memory_does_not_grow_over_cancels(denoising: World, tmp_path: Path) -> None:
    def cancelled(count: int) -> None:
        for _ in range(count):
            [task] = tasks_of(denoising, tmp_path, 1, {**SHORT, "num_video_frames": 33})

            def react(maker: Maker, event: dict[str, Any], id: str = task.id) -> None:
                if event.get("kind") == "denoise" and event["done"]:
                    maker.cancel(id)

            assert run(denoising, [task], react).last(task.id)["event"] == "cancelled"

    cancelled(10)
    before = resident()
    cancelled(50)
    assert resident() - before < 20e6


# the process


def worker(log: list[str] | None = None, **options: Any) -> LocalWorker:
    lines = [] if log is None else log
    return LocalWorker(DENOISING, f"{DENOISING}/0", options, log=lines.append)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive(pid):
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.slow
def test_a_worker_process(clip: Path, tmp_path: Path) -> None:
    log: list[str] = []

    async def use() -> int:
        one = worker(log)
        assert one.state == "loading"
        with pytest.raises(WorkerDied):
            await one.check(SHORT, None, None)
        await one.start()
        assert one.state == "ready"
        assert one.facts is not None
        assert one.facts.name == DENOISING
        checked = await one.check(SHORT, str(clip), "video")
        assert checked.request["num_input_frames"] == 1
        with pytest.raises(ApiError, match="num_steps") as refusal:
            await one.check({"prompt": "a", "num_step": 3}, None, None)
        assert refusal.value.param == "num_step"

        def task(**stated: Any) -> Task:
            id = new_id()
            request = {**checked.request, **stated}
            return Task(id, request, str(clip), "video", str(tmp_path / id))

        long, short = task(num_steps=900), task()
        events = one.run([long])
        assert one.state == "busy"
        names = []
        async for event in events:
            names.append(event["event"])
            if event.get("kind") == "denoise" and "cancelled" not in names:
                again = await one.check(SHORT, None, None)  # while it makes a video
                assert again.request["seed"] == 3
                os.killpg(one.pid or 0, signal.SIGINT)  # of a terminal
                os.killpg(one.pid or 0, signal.SIGTERM)
                one.cancel(long.id)
        assert names[0] == "begun"
        assert {"cancelled", "free"} == {*names[-2:]}
        assert one.state == "ready"
        names = [event["event"] async for event in one.run([short])]
        assert {"done", "free"} <= {*names}
        assert one.peak_bytes > 10**7
        assert time.monotonic() - one.heartbeat < 5
        # a reader that goes away cancels
        events = one.run([task(num_steps=900)])
        async for event in events:
            if event.get("kind") == "denoise":
                break
        await events.aclose()  # type: ignore[attr-defined]
        assert [e["event"] async for e in one.run([task()])][-1] in ("done", "free")
        pid = one.pid or 0
        await one.stop()
        assert one.state == "dead"
        return pid

    pid = asyncio.run(use())
    assert not alive(pid)
    assert not any("ball" in line for line in log)


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    async def use() -> None:
        one = worker()
        await one.start()
        checked = await one.check({**SHORT, "num_steps": 900}, None, None)
        task = Task(new_id(), checked.request, None, None, str(tmp_path / "x"))

        async def killed() -> None:
            async for event in one.run([task]):
                if event.get("kind") == "denoise":
                    os.kill(one.pid or 0, signal.SIGKILL)

        with pytest.raises(WorkerDied, match="signal 9"):
            await killed()
        assert one.state == "dead"
        with pytest.raises(WorkerDied):
            async for _ in one.run([task]):
                pass
        with pytest.raises(WorkerDied):
            await one.check(SHORT, None, None)
        await one.start()  # again
        assert one.state == "ready"
        events = one.run([task])
        async for event in events:
            if event.get("kind") == "denoise":
                await one.stop()  # after a step
                break
        with pytest.raises(WorkerDied, match="exit status 0"):
            async for _ in events:
                pass
        assert not alive(one.pid or 0)

    asyncio.run(use())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options", "word"),
    [("tiny-nothing", {}, "tiny-nothing"), (DENOISING, {"devise": "cpu"}, "devise")],
)
def test_a_world_that_cannot_load(world: str, options: dict[str, Any], word: str) -> None:
    async def use() -> None:
        one = LocalWorker(world, "a/0", options, log=lambda line: None)
        with pytest.raises(WorkerDied, match=word):
            await one.start()
        assert one.state == "dead"
        assert not alive(one.pid or 0)

    asyncio.run(use())


PARENT = """
import asyncio, sys
from worldline.serve.workers import LocalWorker
assert "torch" not in sys.modules
async def main():
    one = LocalWorker(sys.argv[1], "a/0", {}, log=lambda line: None)
    task = asyncio.create_task(one.start())
    while one.pid is None:
        await asyncio.sleep(0.01)
    if sys.argv[2] == "ready":
        await task
    print(one.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["ready", "loading"])
def test_a_worker_ends_with_its_parent(when: str) -> None:
    words = [sys.executable, "-c", PARENT, DENOISING, when]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert gone(pid, 5)
