"""Runs that are killed at any moment, also while they save, end as those that are not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MODEL, moving
from tests.states import read_state
from tests.tiny_diffusion import VIDEO2WORLD
from tests.tiny_predict2_5 import POST
from worldline.video.write import write_video

KILLS = int(os.environ.get("WORLDLINE_KILLS", 3))  # of each family
STEPS = 3 + 3 * KILLS
# model, its folder's fixture, and keys
RUNS = {
    "autoregressive": (MODEL, "small_world", "data.num_frames=17 trainer.reference_state=true"),
    "diffusion": (VIDEO2WORLD, "tiny_diffusion", "data.num_frames=9"),
    "predict2.5": (POST.name, "tiny_predict2_5", "data.num_frames=9"),
}
# imports what a run needs once, and forks for each line of words
SERVER = """
import json, os, sys
import torch._dynamo
from worldline.cli.main import main
from worldline.train import training
for line in sys.stdin:
    if not (child := os.fork()):
        main(["train", *json.loads(line)])
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Server:
    """Runs of the train command, one after the other."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTPUT_ROOT": str(root)}
        with (root.parent / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def start(self, words: list[str]) -> int:
        """Begin a run; the number of its process."""
        assert self.process.stdin is not None
        print(json.dumps(words), file=self.process.stdin, flush=True)
        return self.number()

    def number(self) -> int:
        """The next number: of a process, or its status once it has ended."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline().strip()).isdigit():
            assert self.process.poll() is None
        return int(line)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    root = tmp_path_factory.mktemp("killed") / "runs"
    root.mkdir()
    server = Server(root)
    yield server, root
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, frames in enumerate((17, 18, 19)):
        frames_of_clip = moving(frames)
        write_video(
            frames_of_clip[::-1] if number else frames_of_clip, folder / f"{number}.mp4", 24
        )
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of all lines of a log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def content(folder: Path) -> dict[str, Any]:
    """Names of all files of a run, hidden ones too, and bytes of those with tensors."""
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    kinds = (".pt", ".distcp", ".safetensors")
    files = {name: (folder / name).read_bytes() for name in names if name.suffix in kinds}
    return {**dict.fromkeys(map(str, names)), **{str(name): data for name, data in files.items()}}


def wait_for_a_moment(folder: Path, chance: random.Random, seconds: float) -> None:
    """Wait for the start of a run, or for a step of it: its end, or the middle of a file."""
    kind, deadline = chance.random(), time.monotonic() + 10 * seconds
    if kind < 0.2:
        time.sleep(chance.uniform(0, seconds / 3))
        return
    log = folder / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0
    while not log.exists() or log.stat().st_size == before:
        assert time.monotonic() < deadline, os.listdir(folder)
        time.sleep(0.002)
    if kind < 0.6:
        time.sleep(chance.uniform(0, seconds / STEPS))
        return
    while not any(name.startswith(".iter_") for name in os.listdir(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("family", RUNS)
def test_kills_at_any_moment(
    family: str,
    server: tuple[Server, Path],
    clips: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Loss curve, final state and all files are those of a run that nothing disturbed."""
    model, fixture, keys = RUNS[family]
    models = request.getfixturevalue(fixture)
    line = [model, "--videos", str(clips), "--checkpoint_dir", str(models), "--device", "cpu"]
    line += ["--caption", "a ball"] if family != "autoregressive" else []
    line += ["--max_steps", str(STEPS), "--"]
    line += ["trainer.precision=float32", "trainer.logging_iter=1", "data.num_workers=0"]
    line += ["checkpoint.save_iter=1", "checkpoint.keep_last=2", "checkpoint.format=reference"]
    line += ["average.enabled=true", "data.video_size=[32,48]", *keys.split()]
    whole, cut = (server[1] / "posttraining/worldline" / f"{family}-{n}" for n in ("whole", "cut"))
    begun = time.monotonic()
    server[0].start(["--name", whole.name, *line])
    assert server[0].number() == 0, (server[1].parent / "stderr").read_text()
    seconds = time.monotonic() - begun
    chance, folder, kills = random.Random(family), cut / "checkpoints", 0
    while kills < KILLS:
        number = server[0].start(["--name", cut.name, *line])
        wait_for_a_moment(folder, chance, seconds)
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        status = server[0].number()
        assert status == signal.SIGKILL, "the run ended before; give it more steps"
        kills += 1
    server[0].start(["--name", cut.name, *line])
    assert server[0].number() == 0, (server[1].parent / "stderr").read_text()
    expected = dict(losses(whole / "checkpoints"))
    assert expected.keys() == {*range(1, STEPS + 1)}
    found = losses(folder)
    assert {step for step, _ in found} == expected.keys()
    assert all(expected[step] == loss for step, loss in found)
    states = [read_state(each / "checkpoints") for each in (whole, cut)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    ours, theirs = (content(each / "checkpoints") for each in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == data for name, data in theirs.items())
