"""Fleets on a cluster of two CPUs: the files of a plain batch, whatever dies in between.

`.ci/run fleet` runs them, in an environment with Ray.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
WORLD = (
    *("diffusion", "text2world", "--diffusion_transformer_dir"),
    *("tiny-Cosmos-Predict1-7B-Video2World", "--num_video_frames", "9", "--num_steps", "1"),
    *("--disable_guardrail", "--disable_prompt_upsampler"),
)
IN_STEP = (
    *("autoregressive", "base", "--ar_model_dir", "tiny-Cosmos-Predict1-4B", "--batch_size", "2"),
    *("--input_type", "image", "--disable_diffusion_decoder", "--disable_guardrail"),
)
# of a report, what differs from run to run
MEASURED = ("load", "run", "seconds_per_step", "seconds_of_steps", "tokens_per_second")


class Commands:
    """Runs command lines in processes of their own, in a folder."""

    def __init__(self, folder: Path, environment: dict[str, str], address: str) -> None:
        self.folder, self.environment, self.address = folder, environment, address

    def start_python(self, *words: str) -> subprocess.Popen[str]:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *words]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return self.start_python("-m", "worldline", *words)

    def plain(self, *words: str) -> str:
        """Standard output of a command that succeeds."""
        return self.end(self.start(*words), 0)[0]

    def fleet(self, *words: str, gpus: int = 0) -> subprocess.Popen[str]:
        where = ("--address", self.address, "--gpus_per_actor", str(gpus), "--max_actors", "2")
        return self.start("fleet", *where, *words)

    def end(self, process: subprocess.Popen[str], status: int) -> tuple[str, str]:
        """Standard output and error of a command that ends with this status."""
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == status, out + err
        return out, err

    def batch(self, count: int, poison: Sequence[int] = ()) -> tuple[str, ...]:
        """Words of a batch of short videos, some of which kill the process that makes them."""
        prompts = ["poison" if line in poison else f"a ball {line}" for line in range(count)]
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (self.folder / "batch.jsonl").write_text("\n".join(lines))
        return (*WORLD, "--batch_input_path", "batch.jsonl", "--video_save_folder")

    def failures(self, out: str) -> list[dict[str, Any]]:
        path = self.folder / out / "failures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def check_whole(self, out: str, lines: Sequence[int]) -> None:
        """Fail unless these lines alone are made, and no file is half."""
        folder = self.folder / out
        beside = {"done.jsonl", "fleet.json", "failures.jsonl"}
        names = {path.name for path in folder.iterdir()} - beside
        assert names == {f"{line}.{end}" for line in lines for end in ("mp4", "json", "txt")}
        state = json.loads((folder / "fleet.json").read_text())
        assert state["made"] + state["there_before"] == len(lines)
        assert state["failed"] == len(self.failures(out))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """Environment and address of a cluster with two CPUs."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"} | {
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, HERE / "poison"))),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WORLDLINE_CACHE": str(home / "cache"),
    }
    script = [sys.executable, str(HERE / "cluster.py")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, env=environment, stderr=subprocess.DEVNULL, **pipes) as head:
        assert head.stdout is not None
        yield environment, head.stdout.readline().strip()
        head.communicate("")


@pytest.fixture
def commands(cluster: tuple[dict[str, str], str], tmp_path: Path) -> Commands:
    return Commands(tmp_path, *cluster)


def check_equal(first: Path, second: Path, unlike: Sequence[str] = ()) -> None:
    """Fail unless two folders hold the same videos and reports, but for seconds and memory.

    Reports of those that are `unlike` differ in the number of clips in step.
    """
    paths = sorted(first.glob("*.mp4"))
    assert {path.name for path in second.glob("*.mp4")} == {path.name for path in paths}
    for path in paths:
        other = second / path.name
        assert path.read_bytes() == other.read_bytes(), path.name
        if path.name in unlike:
            continue
        reports = [json.loads(one.with_suffix(".json").read_text()) for one in (path, other)]
        for report in reports:
            for name in MEASURED:
                report.pop(name, None)
        assert reports[0] == reports[1]


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    """Files of a pattern, once there are so many."""
    until = time.monotonic() + 60
    while len(found := [*folder.glob(pattern)]) < count and time.monotonic() < until:
        time.sleep(0.02)
    assert len(found) >= count
    return found


def test_files_are_those_of_a_plain_batch(commands: Commands) -> None:
    words = commands.batch(60)
    commands.plain(*words, "plain")
    out, _ = commands.end(commands.fleet(*words, "made"), 0)
    assert len(out.splitlines()) == 61
    commands.check_whole("made", range(60))
    check_equal(commands.folder / "plain", commands.folder / "made")
    assert "0 made now, 60 there before" in commands.plain(*words, "made", "--resume")
    for more, read in (((), 60), ((), 0), (("--verify",), 60)):
        out, err = commands.end(commands.fleet(*words, "plain", "--resume", *more), 0)
        assert "0 made now, 60 there before" in out
        assert err.count("is finished") == read


def test_a_batch_that_dies_is_made_line_by_line(commands: Commands) -> None:
    names = ["0.png", "1.png", "2.png", "poison.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (192, 128), (60 * number, 90, 60)).save(commands.folder / name)
    lines = [json.dumps({"visual_input": name}) for name in names]
    (commands.folder / "batch.jsonl").write_text("\n".join(lines))
    words = (*IN_STEP, "--batch_input_path", "batch.jsonl", "--video_save_folder")
    commands.plain(*words, "plain")
    commands.end(commands.fleet(*words, "made", "--attempts", "1"), 1)
    [failure] = commands.failures("made")  # the other one of its batch is not charged
    assert (failure["output"], failure["attempts"]) == ("made/3.mp4", 1)
    (commands.folder / "plain" / "3.mp4").unlink()
    check_equal(commands.folder / "plain", commands.folder / "made", unlike=["2.mp4"])


def test_killed_actors_cost_no_line(commands: Commands) -> None:
    dice, folder = random.Random(7), commands.folder / "made"
    process = commands.fleet(*commands.batch(60), "made", "--attempts", "4")
    killed: set[int] = set()
    while len(killed) < 10 and process.poll() is None:
        for mark in folder.glob(".begun.*/*"):
            try:
                pid = int(mark.read_text())
            except (FileNotFoundError, ValueError):  # its call has ended, or is just beginning
                continue
            if pid not in killed:
                time.sleep(dice.uniform(0, 0.3))
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                time.sleep(dice.uniform(0, 0.5))
    commands.end(process, 0)
    assert len(killed) == 10
    commands.check_whole("made", range(60))
    assert commands.failures("made") == []


def test_one_poison_line_is_given_up(commands: Commands) -> None:
    words = commands.batch(60, poison=[11])
    out, err = commands.end(commands.fleet(*words, "made"), 1)
    commands.check_whole("made", [line for line in range(60) if line != 11])
    [failure] = commands.failures("made")
    assert failure["attempts"] == 3
    assert failure["line"].endswith("line 12 (11.mp4)")
    assert len(out.splitlines()) == 60  # none is of Ray, about the dead
    assert "59 of 60" in out
    assert "1 of 60" in err.splitlines()[-1]


def test_many_poison_lines_cost_no_other(commands: Commands) -> None:
    poison, folder = [*range(0, 60, 3)], commands.folder / "made"
    script = (str(HERE / "toys.py"), commands.address, "made", "60", *map(str, poison))
    _, err = commands.end(commands.start_python(*script), 1)
    assert "20 of 60 inputs failed" in err
    assert {path.stem for path in folder.glob("*.mp4")} == {
        str(line) for line in range(60) if line not in poison
    }
    failures = {failure["line"]: failure["attempts"] for failure in commands.failures("made")}
    assert failures == {str(line): 2 for line in poison}


def test_an_interrupted_driver_resumes(commands: Commands) -> None:
    words, folder = (*commands.batch(40), "made", "--resume"), commands.folder / "made"
    process = commands.fleet(*words)
    wait_for(folder, "*.mp4", 3)
    process.send_signal(signal.SIGTERM)
    _, err = commands.end(process, 143)
    assert "--drain_s 60" in err
    made = [int(path.stem) for path in folder.glob("*.mp4")]
    assert 3 <= len(made) < 40
    commands.check_whole("made", made)
    process = commands.fleet(*words)
    wait_for(folder, "*.mp4", len(made) + 3)
    process.kill()
    process.communicate()
    out, err = commands.end(commands.fleet(*words), 0)
    assert "40 of 40" in out
    assert "is made again" not in err
    commands.check_whole("made", range(40))


def test_an_actor_of_several_gpus_runs_the_command(commands: Commands) -> None:
    words = (*commands.batch(8, poison=[5]), "made", "--device", "cpu", "--shard", "1/2")
    out, _ = commands.end(commands.fleet(*words, "--attempts", "1", gpus=2), 1)
    assert out.splitlines()[0].startswith("made/1.mp4: 9 frames")
    commands.check_whole("made", [1, 3, 7])
    reports = [json.loads((commands.folder / f"made/{n}.json").read_text()) for n in (1, 3, 7)]
    [failure] = commands.failures("made")
    assert failure["message"].endswith("status 7")
    assert reports[0]["load"] == reports[1]["load"]  # by one process after another, once
    assert reports[0]["load"] != reports[2]["load"]
