"""Processes start together, print once, and end together, whatever ends one of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import worldline
from tests.cli.results import check_mentions
from tests.conftest import frames_of
from tests.ranks import Together
from worldline.errors import Error, InputError
from worldline.parallel import job
from worldline.parallel.job import Place
from worldline.parallel.mesh import Axis

from .jobs import TORCHRUN, WORLDLINE, start

# --- this process among others, by its environment


def test_what_names_processes_that_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "y"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    [alone] = job.environments(1, 5)
    assert not alone.keys() & {*inherited, "OMP_NUM_THREADS"}
    several = job.environments(3, 5)
    for rank, one in enumerate(several):
        assert (one["RANK"], one["WORLD_SIZE"], one["MASTER_PORT"]) == (str(rank), "3", "5")
        assert "TORCHELASTIC_RUN_ID" not in one
        assert 1 <= 3 * int(one["OMP_NUM_THREADS"]) <= max(3, os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert job.environments(3, 5)[2]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("names", "mentioned"),
    [
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE is 3 RANK torchrun"),
        ({"WORLD_SIZE": "3", "RANK": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "x"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "y"}, "'y'"),
        ({"WORLD_SIZE": "many", "RANK": "1"}, "WORLD_SIZE is many 'many' is no number"),
        ({"WORLD_SIZE": "many"}, "'many' is no number"),
        ({"WORLD_SIZE": "3", "RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 3 3"),
    ],
)
def test_an_environment_set_by_halves(
    names: dict[str, str], mentioned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        job.place()
    check_mentions(str(error.value), mentioned)


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.place() == Place()
    names = {"RANK": 11, "WORLD_SIZE": 16, "MASTER_ADDR": "head", "MASTER_PORT": 29500}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    assert job.place() == Place(11, 16, (11,))
    assert not job.place().speaks


@pytest.mark.parametrize(
    ("machines", "deputies"),
    [("aaaaaaaabbbbbbbb", [1, 8]), ("abababab", [1, 2]), ("abbcc", [1, 3]), ("aa", [1])],
)
def test_where_the_store_is_lost_one_of_each_machine_reports(
    machines: str, deputies: list[int]
) -> None:
    near = {name: tuple(n for n, other in enumerate(machines) if other == name) for name in "abc"}
    places = [Place(n, len(machines), near[name]) for n, name in enumerate(machines)]
    assert [place.rank for place in places if place.deputises] == deputies


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Devices of processes that have met, each of which sees the GPUs of these letters."""

    def devices(visible: Sequence[str], name: str | None = None) -> list[Any]:
        def own(rank: int) -> str | None:
            here = Place(rank, len(visible))
            gpus = [SimpleNamespace(uuid=letter) for letter in visible[rank]]
            monkeypatch.setattr(job, "_here", here)
            monkeypatch.setattr(job, "_alone", False)
            monkeypatch.setattr(job, "meet", lambda: here)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
            monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
            exchanged = [[*each] if name != "cpu" else [] for each in visible]
            monkeypatch.setattr(
                job, "_every", lambda _, __, own: exchanged if own == exchanged[rank] else None
            )
            return job.own_device(name)

        return [own(rank) for rank in range(len(visible))]

    return devices


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (["stuvwxyz"] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (["ab", "cd", "ab", "cd"], [0, 0, 1, 1]),  # two machines in turns, or two halves of one
        (["z", "x", "y"], [0, 0, 0]),  # as --gpus-per-task=1
        (["abc", "bc", "abc"], [0, 0, 2]),
    ],
)
def test_each_process_has_its_own_gpu(
    visible: list[str], devices: list[int], seeing: Callable[..., list[Any]]
) -> None:
    for name in (None, "cuda"):
        assert seeing(visible, name) == [f"cuda:{index}" for index in devices]
    assert seeing(visible, "cpu") == ["cpu"] * len(visible)
    for wrong in ("cuda:1", "mps", "meta"):
        with pytest.raises(InputError, match=f"device='{wrong}': {len(visible)} processes"):
            seeing(visible, wrong)


@pytest.mark.parametrize(
    ("visible", "name", "numbers"),
    [
        (["abcdef"] * 8, None, "8 6"),
        (["a", "b", "a"], None, "2 1"),
        (["ab", "b", "ab"], "cuda", "3 2"),
        ([""] * 5, "cuda", "5 0"),
        (["a", "", ""], None, "2 of 3"),
    ],
)
def test_processes_that_would_share_a_gpu(
    visible: list[str], name: str | None, numbers: str, seeing: Callable[..., list[Any]]
) -> None:
    for order in (visible, visible[::-1]):
        with pytest.raises(InputError) as error:
            seeing(order, name)
        check_mentions(str(error.value), f"{numbers} --device cpu")


def test_devices_of_one_process_and_of_those_to_start(
    seeing: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seeing(["", "", ""]) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(job, "_here", Place())
    monkeypatch.delattr(torch.cuda, "get_device_properties")  # which would use the GPU
    assert job.own_device(None, 6) == "cuda:0"
    with pytest.raises(InputError, match=r"8 processes .* 6;"):
        job.own_device(None, 8)
    monkeypatch.undo()
    assert job.own_device("cuda:5") == "cuda:5"


def test_gpus_that_differ(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        job.compare_devices(["A", "A"])
        assert not caplog.messages
        job.compare_devices(["A", "B", "A"])
    check_mentions(caplog.messages[0], "2 x A 1 x B")


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make this the process of a rank of two that meet at a port; it meets none."""

    def become(rank: int, port: int) -> None:
        names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(job, "_watch", None)
        monkeypatch.setattr(job, "_store", None)
        monkeypatch.setattr(job, "_here", Place())
        monkeypatch.setattr(job, "RENDEZVOUS_S", 1.0)

    return become


def test_processes_that_do_not_meet(
    second: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second(0, port)
        with pytest.raises(Error, match=f"2 processes do not meet at 127.0.0.1:{port}: .*in use"):
            job.meet()
    assert job._watch is not None
    job._watch.stopped.set()
    second(1, port)
    with pytest.raises(Error, match=f"2 processes do not meet at 127.0.0.1:{port}"):
        job.meet()
    assert job._watch is not None
    job._watch.stopped.set()
    second(1, port)
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    with pytest.raises(InputError, match="this torch has no gloo"):
        job.meet()
    job._watch.stopped.set()


def test_several_processes_need_torchrun() -> None:
    for stated, number in (({"num_gpus": 3}, 3), ({"context_parallel_size": 2}, 2)):
        [name] = stated
        with pytest.raises(InputError, match=rf"{name}={number}.*--nproc_per_node={number}"):
            worldline.load("tiny-Cosmos-Predict2.5-2B", **stated)


# --- two processes

slow = pytest.mark.slow


def neighbours(world: Axis) -> tuple[tuple[int, ...], int]:
    return job._here.near, job.neighbours()


@slow
def test_processes_find_their_machine(two: Together) -> None:
    assert two(neighbours) == [((0, 1), 2)] * 2


@pytest.fixture(scope="module")
def samples(
    tmp_path_factory: pytest.TempPathFactory, tiny_predict2_5: Path, image: Path
) -> list[object]:
    """Words that make five small videos, a to e, in out."""
    file = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    common = {"inference_type": "image2world", "prompt": "a ball", "input_path": str(image)}
    lines = [json.dumps({**common, "name": name, "seed": ord(name)}) for name in "abcde"]
    file.write_text("\n".join(lines))
    size = ("--resolution", "32,48", "--num_output_frames", 9, "--num_steps", 2)
    fixed = ("--checkpoint_dir", tiny_predict2_5, "-i", file, "-o", "out", "--device", "cpu")
    return ["predict2.5", *fixed, *size, "--disable_guardrails", "--quiet"]


@slow
def test_killed_in_each_stage_and_resumed(samples: list[object], tmp_path: Path) -> None:
    whole = start(tmp_path, [*samples, "-o", "whole", "--num_gpus", 2])
    assert whole.end() == 0, whole.messages
    made: dict[str, bytes] = {}
    kills = ("text 1", "encode 0", "denoise 1", "decode 0")
    for number, (stage, name) in enumerate(zip(kills, "abcd", strict=True)):
        fail = f"{stage} {1 + min(number, 1)} SIGKILL"  # after one more video, but for the first
        run = start(tmp_path, [*samples, "--num_gpus", 2, "--resume"], FAIL=fail)
        run.wait_for("FAILING")
        begin = time.monotonic()
        assert run.end(60) == 1
        assert time.monotonic() - begin < 40
        assert len(run.messages) == 1
        check_mentions(run.messages[0], f"rank {stage[-1]} SIGKILL --resume")
        videos = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")}
        assert videos.keys() == {f"{other}.mp4" for other in "abcde" if other < name}
        assert made.items() <= videos.items()
        made = videos
    assert start(tmp_path, [*samples, "--num_gpus", 2, "--resume"]).end() == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{name}.{end}" for name in "abcde" for end in ("mp4", "json", "txt")}
    for name in "abcde":
        assert frames_of(tmp_path / "out" / f"{name}.mp4") == frames_of(
            tmp_path / "whole" / f"{name}.mp4"
        )


@slow
def test_killed_between_tokens_and_resumed(small_world: Path, clip: Path, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"visual_input": str(clip), "seed": n}) for n in (4, 5))
    (tmp_path / "lines.jsonl").write_text(lines)
    words = ["autoregressive", "base", "--checkpoint_dir", small_world, "--num_gpus", 2]
    words += ["--batch_input_path", "lines.jsonl", "--video_save_folder", "out", "--device", "cpu"]
    words += ["--disable_guardrail", "--disable_diffusion_decoder", "--quiet"]
    words += ["--batch_size", 1]
    # each draws three frames
    run = start(tmp_path, words, FAIL="tokens 0 5 SIGKILL")
    assert run.end() == 1
    check_mentions(" ".join(run.messages), "rank 0 SIGKILL")
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["0.mp4"]
    assert start(tmp_path, [*words, "--resume"]).end() == 0
    assert start(tmp_path, [*words, "--video_save_folder", "whole"]).end() == 0
    for name in ("0.mp4", "1.mp4"):
        assert frames_of(tmp_path / "out" / name) == frames_of(tmp_path / "whole" / name)


@slow
@pytest.mark.parametrize(
    ("fail", "status", "mentioned", "made"),
    [
        ("decode 1 2 raise", 1, "rank 1: RuntimeError a bug --debug", "a"),
        ("denoise 0 1 memory", 1, "MemoryError: no room", ""),
        ("denoise 1 2 diverge", 1, "rank 1: not finite", "a"),  # and rank 0 would wait for it
        ("denoise - 2 diverge", 1, "1 of 5 inputs failed --resume", "acde"),
    ],
)
def test_an_error_ends_all(
    fail: str, status: int, mentioned: str, made: str, samples: list[object], tmp_path: Path
) -> None:
    words = [*samples, "--num_gpus", 2, "--log_json", "events.jsonl"]
    run = start(tmp_path, words, FAIL=fail)
    assert run.end() == status
    lines = [line for line in run.messages if "2/5" not in line]
    assert len(lines) == 1
    check_mentions(lines[0], mentioned)
    assert {path.stem for path in (tmp_path / "out").glob("*.mp4")} == {*made}
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in events]
    assert [kind for kind in kinds if kind in ("start", "end")] == ["start", "end"]
    assert kinds[-2:] == ["error", "end"]


@slow
def test_refused_by_all(samples: list[object], tmp_path: Path) -> None:
    run = start(tmp_path, [*samples, "--num_gpus", 2, "--data_parallel", 3])
    assert run.end() == 2
    assert len(run.messages) == 1
    check_mentions(run.messages[0], "--data_parallel 3 2")


@slow
@pytest.mark.parametrize(
    ("number", "status", "mentioned"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "SIGHUP"),
        (signal.SIGKILL, -9, "started --resume"),
    ],
)
def test_a_signal_ends_all(
    number: signal.Signals, status: int, mentioned: str, samples: list[object], tmp_path: Path
) -> None:
    run = start(tmp_path, [*samples, "--num_gpus", 2], FAIL="denoise 0 1 busy60")
    run.wait_for("FAILING")
    run.process.send_signal(number)
    assert run.end(30) == status
    assert len(run.messages) == 1
    check_mentions(run.messages[0], mentioned)
    assert not [*(tmp_path / "out").glob("*")]


@slow
@pytest.mark.parametrize("delay_s", [0.8, 1.6, 2.6])
def test_a_signal_while_processes_start(
    delay_s: float, samples: list[object], tmp_path: Path
) -> None:
    """Which a library that is imported may drop, and each process may report."""
    for number, count in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        run = start(tmp_path, [*samples, "--num_gpus", count])
        time.sleep(delay_s)
        run.process.send_signal(number)
        status = run.end(15)
        if status != -number:  # it came before Python had begun
            assert (status, len(run.messages)) == (128 + number, 1)
        assert not [*(tmp_path / "out").glob("*")]


@slow
@pytest.mark.parametrize(
    ("fail", "status"), [("denoise 0 1 SIGSTOP", 1), ("denoise 0 1 busy10", 0)]
)
def test_a_silent_process_ends_all_a_busy_one_none(
    fail: str, status: int, samples: list[object], tmp_path: Path
) -> None:
    """As a machine that is gone: its connections stay, and rank 0 holds the store."""
    run = start(tmp_path, [*samples, "--num_gpus", 2], FAIL=fail, SILENCE=6)
    assert run.end() == status
    assert len(run.messages) == status


@slow
def test_processes_that_run_different_commands(samples: list[object], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        start(tmp_path, [*samples, "--seed", rank], **names, RANK=rank, LOCAL_RANK=rank)
        for rank in (0, 1)
    ]
    assert [run.end() for run in runs] == [2, 2]
    [message] = runs[0].messages + runs[1].messages
    check_mentions(message, "rank 1: rank 0")


SCRIPT = """
import sys, worldline
world = worldline.load("2B/post-trained", checkpoint_dir=sys.argv[1], disable_guardrail=True)
video = world.generate(prompt="a ball", num_video_frames=9, height=32, width=48, num_steps=2)
video.save(f"{world.processes.rank}.mp4")
if world.processes.rank == 1:
    raise RuntimeError("of this program")
world.generate(prompt="a ball", num_steps=1)
"""


@slow
def test_a_program_below_torchrun(tiny_predict2_5: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    run = start(tmp_path, ["program.py", tiny_predict2_5], TORCHRUN)
    assert run.end() == 1
    assert "RuntimeError: of this program" in run.errors.read_text()
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["0.mp4"]


STOPPED = """
import sys, worldline
from worldline.parallel import job

job.GRACE_S = 2.0
world = worldline.load("2B/post-trained", checkpoint_dir=sys.argv[1], disable_guardrail=True)

def read(last):
    for step in world.stream(prompt="a cube", num_video_frames=9, height=32, width=48, num_steps=3):
        if last(step):
            return step

read(lambda step: (step.kind, step.done) == ("denoise", 2))
if whole := read(lambda step: step.video):
    whole.video.save("whole.mp4")
read(lambda step: world.processes.first and step.kind == "denoise")
world.generate(prompt="a cube", num_steps=1)
"""


@slow
def test_a_stream_that_one_process_stops(tiny_predict2_5: Path, tmp_path: Path) -> None:
    """All may stop at the same step, and whoever has the video at it."""
    (tmp_path / "program.py").write_text(STOPPED)
    run = start(tmp_path, ["program.py", tiny_predict2_5], TORCHRUN)
    assert run.end(60) == 1
    assert len(run.messages) == 1
    check_mentions(run.messages[0], "rank 0 denoise 0")
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["whole.mp4"]


@slow
def test_torchrun_is_killed_or_contradicted(samples: list[object], tmp_path: Path) -> None:
    program = [*TORCHRUN, *WORLDLINE]
    run = start(tmp_path, [*samples, "--num_gpus", 3], program)
    assert run.end() == 1
    assert len(run.messages) == 1
    check_mentions(run.messages[0], "--num_gpus 3 2")
    run = start(tmp_path, samples, program, FAIL="denoise 0 1 busy60")
    run.wait_for("FAILING")
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    assert len(run.messages) == 1
    run = start(tmp_path, samples, program, FAIL="denoise 1 1 SIGKILL")
    assert run.end() == 1
    assert run.messages == ["rank 1 has ended; --resume makes what is missing"]


@slow
def test_a_command_that_does_not_split_runs_once() -> None:
    words = [sys.executable, *TORCHRUN, *WORLDLINE, "models", "--json"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)
