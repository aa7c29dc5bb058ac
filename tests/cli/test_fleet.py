"""`worldline fleet` but for Ray: what it refuses, counts, writes and resumes."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import worldline.cli.fleet
from worldline.cli.fleet import Fleet, FleetFlags, spawn
from worldline.errors import Error, GuardrailRefusal, InputError
from worldline.fleet.queue import Queue, Work

from .conftest import WITHOUT_PARTS, Run
from .results import check_mentions, files_in, write_lines


class InProcess:
    """A driver whose one actor is this process.

    Attributes:
        shared: whether the actor's disk is the driver's.
        losses: calls whose process ends, and whether they had begun.
        interrupt: call after which Ctrl-C is pressed.
    """

    shared = True
    losses: dict[int, bool] = {}  # noqa: RUF012
    interrupt = -1

    def __init__(self, *_: object) -> None:
        self.calls = self.restarts = 0

    def first(self, function: Callable[..., Any], *values: Any) -> Any:
        return function(*values)

    def work(self, work: Work, queue: Queue) -> Iterator[Any]:
        assert work.marks.is_dir()
        make, size = work.open(self.shared)
        actor = SimpleNamespace(name="here")
        while queue.open and (unit := queue.take(size)):
            number, self.calls = self.calls, self.calls + 1
            if number == self.interrupt:
                raise KeyboardInterrupt
            if number not in self.losses:
                yield actor, unit, make(unit.lines)
            elif self.losses[number]:
                yield actor, unit, Error("it ended")
            else:
                queue.give_back(unit)
            yield None

    def state(self) -> str:
        return "1 of 1 actors"

    def restart(self, actor: object) -> None:
        self.restarts += 1

    def close(self) -> None:
        pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """The driver of fleets; a test sets its attributes."""
    made = type("Own", (InProcess,), {})
    monkeypatch.setattr(worldline.cli.fleet, "import_driver", lambda: made)
    return made


@dataclass(frozen=True)
class Toy:
    """A task that makes a file."""

    output: Path

    def __str__(self) -> str:
        return self.output.stem


class Toys:
    """Tasks, and what each attempt at one does: makes it, or raises."""

    def __init__(self, folder: Path, count: int, errors: dict[str, Sequence[Exception]]) -> None:
        self.tasks = [Toy(folder / f"{number}.mp4") for number in range(count)]
        self.errors = {name: list(each) for name, each in errors.items()}
        self.made: list[str] = []

    def load(self, tasks: Sequence[Toy]) -> Any:
        return self.run, 1

    def run(self, task: Toy, label: str, group: Sequence[Toy]) -> str:
        if errors := self.errors.get(label):
            raise errors.pop(0)
        self.made.append(label)
        task.output.write_bytes(label.encode())
        task.output.with_suffix(".json").write_text('{"fingerprint": "same"}')
        return f"{task.output}: it is made"

    def start(self, driver: type[InProcess], **flags: Any) -> None:
        stated = {"no_overwrite": False, "resume": False, **flags}
        fleet = Fleet(FleetFlags.parse({"words": ("toy",), "attempts": 2}), driver)
        fleet.driver = self.driver = driver()
        fleet.run_tasks(self.tasks, self.load, lambda task: "same", SimpleNamespace(**stated))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_ray(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worldline.fleet.driver", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("fleet", "predict2.5", "-i", "samples.json", "-o", "out")
    assert result.exit_code == 1
    check_mentions(result.stderr, 'pip install "worldline[ray]"')
    assert run("fleet", "--help").exit_code == 0


def test_two_modules_import_ray() -> None:
    source = Path(worldline.cli.fleet.__file__).parents[1]
    pattern = re.compile(r"^\s*(import|from) ray\b", re.MULTILINE)
    found = {path for path in source.rglob("*.py") if pattern.search(path.read_text())}
    assert found == {source / "fleet" / "driver.py", source / "serve" / "ray_workers.py"}


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["models"], "models predict2.5 tokenize"),
        (["generate", "world"], "generate predict2.5 tokenize"),
        (["predict2.5", "--gpus_per_actor", "-1"], "--gpus_per_actor -1"),
        (["predict2.5", "--num-gpus=2"], "2 --gpus_per_actor"),
        (["predict2.5", "--context_parallel_size", 4], "4 --gpus_per_actor"),
        (["tokenize", "encode", "a.mp4", "--gpus_per_actor", 2], "--gpus_per_actor 2 tokenize"),
        (["predict2.5", "--min_actors", 4, "--max_actors", 3], "--max_actors 3 --min_actors 4"),
        (["predict2.5", "--attempts", 0], "--attempts 0"),
        (["predict2.5", "--address", ""], "--address"),
        (["predict2.5", "--sooner"], "--sooner predict2.5"),
        (["diffusion", "text2world", "--prompt", "rain"], "fleet one input"),
    ],
)
@pytest.mark.usefixtures("driver")
def test_refused(words: list[object], mentioned: str, run: Run) -> None:
    result = run("fleet", *words)
    assert result.exit_code == 2, result.output
    check_mentions(result.stderr, mentioned)


def test_a_wrong_line_is_named_before_a_cluster_starts(
    driver: type[InProcess], run: Run, small_world: Path, image: Path, tmp_path: Path
) -> None:
    driver.first = None  # type: ignore[assignment]
    lines = [{"visual_input": str(image)}, {"visual_input": "absent.png"}]
    words = ("--checkpoint_dir", small_world, *WITHOUT_PARTS, "--input_type", "image")
    batch = write_lines(tmp_path / "batch.jsonl", *lines)
    result = run("fleet", "autoregressive", "base", *words, "--batch_input_path", batch)
    assert result.exit_code == 2
    check_mentions(result.stderr, "absent.png line 2")


@pytest.mark.parametrize("shared", [True, False])
def test_files_are_those_of_the_command(
    shared: bool, driver: type[InProcess], run: Run, small_world: Path, image: Path, tmp_path: Path
) -> None:
    """Also where actors have another disk: what they make is sent, and written here."""
    driver.shared = shared
    batch = write_lines(tmp_path / "batch.jsonl", *[{"visual_input": str(image)}] * 5)
    words = (
        *("autoregressive", "base", "--checkpoint_dir", small_world, "--batch_input_path", batch),
        *("--input_type", "image", "--batch_size", 2, *WITHOUT_PARTS, "--video_save_folder"),
    )
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert run(*words, plain, "--shard", "0/2").exit_code == 0
    result = run("fleet", "--attempts", 2, *words, out, "--shard", "0/2")
    assert result.exit_code == 0, result.output
    names = {f"{line}.{end}" for line in (0, 2, 4) for end in ("mp4", "json")}
    assert files_in(out) == names | {"done.jsonl", "fleet.json"}
    for line in (0, 2, 4):
        assert (out / f"{line}.mp4").read_bytes() == (plain / f"{line}.mp4").read_bytes()
        reports = [json.loads((f / f"{line}.json").read_text()) for f in (plain, out)]
        for name in ("request", "frames_sha256", "fingerprint", "clips_at_once", "encoding"):
            assert reports[0][name] == reports[1][name]
    for other in (run, lambda *words: run("fleet", *words)):
        result = other(*words, out, "--resume")
        assert result.exit_code == 0, result.output
        before = 3 if other is run else 5
        check_mentions(result.stdout, f"{before} there before")
    result = run("fleet", *words, out, "--resume", "--seed", 5)
    check_mentions(result.stdout, "5 of 5")
    assert "before" not in result.stdout


def test_a_hint_spares_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def is_finished(output: Path, *_: object) -> bool:
        read.append(output.stem)
        return output.exists()

    monkeypatch.setattr(worldline.cli.fleet, "is_finished", is_finished)
    toys = Toys(tmp_path, 4, {})
    toys.start(InProcess)
    with (tmp_path / "done.jsonl").open("a") as file:
        file.write('{"output": "3.mp4", "ma\n')  # its driver was killed
    (tmp_path / "2.mp4").write_bytes(b"another")
    (tmp_path / "1.json").unlink()
    toys.start(InProcess, resume=True)
    assert sorted(read) == ["1", "2"]
    toys.start(InProcess, resume=True)
    assert len(toys.made) == 4
    assert len(read) == 2  # now they are hints, too


def test_attempts_are_counted_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once, often = RuntimeError("of the device"), OSError("of the disk")
    errors = {"1": [once], "2": [often] * 2, "4": [InputError("its clip is cut")]}
    toys = Toys(tmp_path, 6, errors)
    with pytest.raises(Error, match="2 of 6") as failed:
        toys.start(InProcess)
    assert failed.value.exit_code == 1
    assert toys.made == ["0", "3", "5", "1"]
    assert toys.driver.restarts == 3  # not after an input that is wrong
    found = {row["output"]: row for row in rows(tmp_path / "failures.jsonl")}
    assert {name: (row["attempts"], row["code"]) for name, row in found.items()} == {
        str(tmp_path / "2.mp4"): (2, 1),
        str(tmp_path / "4.mp4"): (1, 2),
    }
    state = json.loads((tmp_path / "fleet.json").read_text())
    assert (state["made"], state["failed"], state["total"]) == (4, 2, 6)
    toys.start(InProcess, resume=True)
    assert not (tmp_path / "failures.jsonl").exists()


def test_no_report_has_the_name_of_the_progress(tmp_path: Path) -> None:
    toys = Toys(tmp_path, 2, {})
    toys.tasks.append(Toy(tmp_path / "fleet.mp4"))
    with pytest.raises(InputError, match=r"fleet\.json"):
        toys.start(InProcess)
    assert toys.made == []


def test_refusals_alone_have_their_own_status(tmp_path: Path) -> None:
    toys = Toys(tmp_path, 3, {"1": [GuardrailRefusal("it is refused", "prompt")]})
    with pytest.raises(GuardrailRefusal, match="1 of 3"):
        toys.start(InProcess)
    assert toys.made == ["0", "2"]


def test_what_every_line_would_meet_ends_the_run(tmp_path: Path) -> None:
    toys = Toys(tmp_path, 3, {"1": [OSError(errno.ENOSPC, "no space")]})
    with pytest.raises(OSError, match="no space"):
        toys.start(InProcess)
    assert toys.made == ["0"]
    toys = Toys(tmp_path, 3, {"1": [InputError("its clip is cut")]})
    with pytest.raises(Error, match="is cut"):
        toys.start(InProcess, keep_going=False)
    assert toys.made == ["0"]


def test_a_lost_call_is_charged_if_it_had_begun(driver: type[InProcess], tmp_path: Path) -> None:
    driver.losses = {0: False, 1: False, 2: False, 3: True}  # of lines 0, 0, 0 and 0
    toys = Toys(tmp_path, 1, {})
    toys.start(driver)
    assert toys.made == ["0"]
    assert toys.driver.restarts == 0  # Ray has done that
    driver.losses = {0: True, 1: True}
    with pytest.raises(Error, match="1 of 1"):
        Toys(tmp_path / "again", 1, {}).start(driver)
    [failure] = rows(tmp_path / "again" / "failures.jsonl")
    assert (failure["attempts"], failure["message"], failure["node"]) == (2, "it ended", "here")


def test_an_interrupt_leaves_a_record(driver: type[InProcess], tmp_path: Path) -> None:
    driver.interrupt = 2
    toys = Toys(tmp_path, 5, {})
    with pytest.raises(KeyboardInterrupt):
        toys.start(driver)
    assert toys.made == ["0", "1"]
    assert json.loads((tmp_path / "fleet.json").read_text())["made"] == 2
    assert not [*tmp_path.glob(".begun*")]


COMMAND = """#!{python}
import os, sys
from worldline.cli import run
from worldline.errors import GuardrailRefusal, InputError
from worldline.parallel.mesh import ALONE

def make(task, *_):
    if task == 4:
        print("worldline: rank 1 has ended", file=sys.stderr, flush=True)
        os._exit(2)
    if task:
        raise [GuardrailRefusal("refused", "video"), InputError("cut"), OSError("gone")][task - 1]
    return "it is made"

if "wrong" in sys.argv:
    print("worldline:", *sys.argv[3:], os.environ[run.ASKED], file=sys.stderr)
    sys.exit(2)
run._PATIENCE_S = 0.001
print("NCCL version 2")
run.answer_tasks(range(5), lambda tasks: (make, 1), mesh=ALONE)
"""


def test_several_gpus_run_the_command_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for one line after another: its model is loaded once."""
    script = tmp_path / "python"
    script.write_text(COMMAND.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    tasks = [Toy(tmp_path / f"{number}.mp4") for number in range(5)]
    places = {task.output: number for number, task in enumerate(tasks)}
    with pytest.raises(InputError, match=r"^wrong --shard 1/2 --num_gpus 4 --data_parallel 1 1$"):
        spawn(("wrong", "--shard", "1/2"), 4, places, tasks)
    make, size = spawn(("diffusion", "text2world"), 2, places, tasks)
    assert size == 1
    # of the last, the process is wrong, not the line: it is tried again
    errors = {1: (3, "refused"), 2: (2, "cut"), 3: (1, "OSError: gone"), 4: (1, "rank 1 has ended")}
    for number, (status, message) in errors.items():
        assert make(tasks[0], "", ()) == "it is made"
        with pytest.raises(Error) as raised:
            make(tasks[number], "", ())
        assert (raised.value.exit_code, str(raised.value)) == (status, message)
