"""What commands leave: a video and its report, previews, events, and lines that may be lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worldline.cli.main import Interrupts
from worldline.cli.messages import Dropping
from worldline.cli.progress import Progress
from worldline.files import _MACHINE
from worldline.step import Step
from worldline.video.read import probe
from worldline.world import World

from ..conftest import MODEL, moving
from .conftest import WITHOUT_PARTS, Make, Run
from .results import check_mentions, check_refused, fail_at, files_in, write_lines

PROMPT = "a green cube turns"
FLAGS = ("--num_steps", 1)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers of signals as they were, after a test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- a video and its report


def test_a_report_of_another_video_counts_as_none(text2world: Make, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ("--prompt", PROMPT, *FLAGS)
    for name, seed in (("a", 1), ("b", 2)):
        assert text2world(*words, "--seed", seed, "--video_save_name", name).exit_code == 0
    shutil.copy(out / "b.mp4", out / "a.mp4")  # the report of seed 1 could not be replaced
    result = text2world(*words, "--seed", 1, "--video_save_name", "a", "--resume")
    assert "a.mp4 is made again" in result.stderr
    assert (out / "a.mp4").read_bytes() != (out / "b.mp4").read_bytes()
    (out / "a.json").write_text("[" * 200_000)
    assert (
        "a.mp4 is made again"
        in text2world(*words, "--seed", 1, "--video_save_name", "a", "--resume").stderr
    )


@pytest.mark.parametrize("ending", [".json", ".txt", ".mp4"])
def test_a_file_that_cannot_be_replaced(
    ending: str, text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("--prompt", PROMPT, *FLAGS)
    assert text2world(*words).exit_code == 0
    video, real = (out / "output.mp4").read_bytes(), Path.replace

    def replace(path: Path, target: Path) -> Path:
        if Path(target).suffix == ending:
            raise PermissionError(1, "Operation not permitted", str(path), None, str(target))
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        result = text2world(*words, "--seed", 3)
    assert result.exit_code != 0
    check_mentions(result.stderr.splitlines()[-1], f"output{ending} Operation not permitted")
    assert files_in(out) == {"output.mp4", "output.json", "output.txt"}
    assert (out / "output.mp4").read_bytes() == video
    assert "is made again" in text2world(*words, "--seed", 3, "--resume").stderr


def test_a_copied_checkpoint_is_the_same(
    text2world: Make, own_worlds: Path, tmp_path: Path
) -> None:
    words = ("--prompt", PROMPT, *FLAGS)
    assert text2world(*words, checkpoint_dir=own_worlds).exit_code == 0
    copy = Path(shutil.copytree(own_worlds, tmp_path / "elsewhere", copy_function=shutil.copy))
    assert "is finished" in text2world(*words, "--resume", checkpoint_dir=copy).stderr


def test_a_folder_of_frames_is_finished(
    run: Run, small_world: Path, image: Path, tmp_path: Path
) -> None:
    frames = tmp_path / "frames"
    words = ("generate", MODEL, image, "-o", frames, "--checkpoint_dir", small_world)
    words = (*words, *WITHOUT_PARTS, "--resume")
    assert run(*words).exit_code == 0
    assert "is finished" in run(*words).stderr
    (frames / "00000.png").write_bytes(b"")
    check_mentions(run(*words).stderr, f"{frames} made again not empty")


def test_replacing_is_mentioned_or_refused(text2world: Make, tmp_path: Path) -> None:
    words = ("--prompt", PROMPT, *FLAGS)
    assert "replaced" not in text2world(*words, "--no_overwrite").stderr
    before = (tmp_path / "out" / "output.json").read_bytes()
    result = text2world(*words, "--no_overwrite")
    assert (result.exit_code, result.stdout) == (2, "")
    check_mentions(result.stderr, "--no_overwrite output.mp4 output.json output.txt")
    assert (tmp_path / "out" / "output.json").read_bytes() == before
    assert text2world(*words, "--no_overwrite", "--resume").exit_code == 0
    result = text2world(*words)
    check_mentions(result.stderr, f"replaced {tmp_path / 'out' / 'output.mp4'}")


def test_an_evaluation_is_replaced_or_kept(run: Run, clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    assert run("evaluate", tmp_path, "--no_overwrite", "--quiet").stdout.count("\n") == 1
    check_mentions(run("evaluate", tmp_path).stderr, "replaced evaluation.json evaluation.png")
    result = run("evaluate", tmp_path, "--no_overwrite")
    assert (result.exit_code, result.stdout) == (2, "")
    check_mentions(result.stderr, "--no_overwrite evaluation.json evaluation.png")


def test_quality(text2world: Make, tmp_path: Path) -> None:
    words, path = ("--prompt", PROMPT, *FLAGS), tmp_path / "out" / "output.mp4"
    for flags in (("--crf", "40"), ("--lossless",)):
        assert text2world(*words, *flags).exit_code == 0
        encoding = json.loads(path.with_suffix(".json").read_text())["encoding"]
        assert encoding in (
            {"encoder": "libx264", "crf": 40},
            {"encoder": "libx264rgb", "lossless": True},
        )
        assert "is finished" in text2world(*words, *flags, "--resume").stderr
    assert "made again" in text2world(*words, "--resume").stderr


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ("--crf 52", "crf 52 51"),
        ("--crf 64", "--crf 64 63"),
        ("--crf 20 --lossless", "crf lossless"),
        ("--crf 20 --video_save_name a.gif", "a.gif .mp4 .webm"),
        ("--video_save_name ../../x", "--video_save_name ../../x"),
        ("--video_save_name /tmp/x", "--video_save_name /tmp/x"),
        ("--video_save_name ..", "--video_save_name '..'"),
        ("--device meta", "meta cpu"),
        ("--device hpu", "hpu cpu"),
        ("--quiet --log_json absent/log.jsonl", "--log_json absent/log.jsonl"),
    ],
)
def test_what_is_refused_before_work(
    words: str, mentioned: str, text2world: Make, tmp_path: Path, forbid_weights: None
) -> None:
    result = text2world("--prompt", PROMPT, *words.split())
    check_refused(result, mentioned, tmp_path)
    assert result.stderr.count("\n") == 1


# --- interrupts, and what killed runs leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_clean_up(
    number: signal.Signals,
    text2world: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_signals: None,
) -> None:
    real = World.run_batch

    def run_batch(world: World, jobs: Any) -> Iterator[tuple[int, Step]]:
        for index, step in real(world, jobs):
            yield index, step
            if step.preview is not None:
                assert (tmp_path / "out" / "output.preview.mp4").exists()
                os.kill(os.getpid(), number)

    monkeypatch.setattr(World, "run_batch", run_batch)
    result = text2world("--prompt", PROMPT, "--num_steps", 4, "--preview_every", 1)
    assert result.exit_code == 128 + number
    assert "worldline: interrupted" in result.stderr.splitlines()[-1]
    assert files_in(tmp_path / "out") == set()


def test_an_ignored_signal_stays_ignored(
    text2world: Make, monkeypatch: pytest.MonkeyPatch, own_signals: None
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    real = World.prepare

    def prepare(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return real(*args, **named)

    monkeypatch.setattr(World, "prepare", prepare)
    assert text2world("--prompt", PROMPT, *FLAGS).exit_code == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, own_signals: None) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    assert (interrupts.signal, ended) == (signal.SIGHUP, [129])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_drops_comes_again(
    number: signal.Signals,
    text2world: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    own_signals: None,
) -> None:
    real, drops = World.prepare, []

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def drop() -> None:
        try:
            time.sleep(30)
        except BaseException as error:
            circle = error  # whose trace refers to it
            drops.append(type(circle).__name__)

    def prepare(*args: Any, **named: Any) -> Any:
        Finalized()
        drops.append("finalizer")
        drop()
        try:
            time.sleep(30)
        except BaseException as error:
            raise ImportError("an optional module") from error
        return real(*args, **named)

    monkeypatch.setattr(World, "prepare", prepare)
    begin = time.monotonic()
    result = text2world("--prompt", PROMPT, *FLAGS)
    assert time.monotonic() - begin < 15
    assert drops == ["finalizer", "Interrupt"]
    assert result.exit_code == 128 + number
    assert "worldline: interrupted" in result.stderr.splitlines()[-1]
    assert "Interrupt" not in result.stderr + capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_removed(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stale = {
        f".output.{e}.{process.pid}-{_MACHINE}0a1b.tmp" for e in ("mp4", "json", "preview.mp4")
    }
    alive = f".output.mp4.{os.getpid()}-{_MACHINE}0a1b.tmp"
    for name in (*stale, alive):
        (out / name).touch()
    with Progress("", out / "output.mp4", 8) as progress:
        progress.report(Step("denoise", 1, 2, preview=moving(3)))
        shutil.copy(out / "output.preview.mp4", tmp_path / "kept.mp4")
    shutil.copy(tmp_path / "kept.mp4", out / "output.preview.mp4")
    assert probe(out / "output.preview.mp4").frames == 3
    result = text2world("--prompt", PROMPT, "--num_steps", 3, "--preview_every", 1)
    assert result.exit_code == 0
    assert "preview, replaced" in result.stderr
    assert files_in(out) == {alive, "output.mp4", "output.json", "output.txt"}


# --- lines that nobody reads, and events


def test_lost_lines_end_no_run(small_world: Path, image: Path, tmp_path: Path) -> None:
    words = f"{sys.executable} -m worldline autoregressive base --checkpoint_dir {small_world}"
    words += f" {' '.join(WITHOUT_PARTS)} --input_type image --input_image_or_video_path {image}"
    words += f" --video_save_folder {tmp_path} --ar_model_dir {MODEL}"
    for number, streams in enumerate(("2>&- >/dev/full", "2>&1 | head -1")):
        script = f"set -o pipefail; {words} --video_save_name {number} {streams}"
        subprocess.run(["bash", "-c", script], check=True, capture_output=True)
        report = json.loads((tmp_path / f"{number}.json").read_text())
        assert report["request"]
    script = f"{sys.executable} -m worldline --help >/dev/full"  # the output is the product
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_stream_that_fails_goes_nowhere() -> None:
    with open("/dev/full", "w") as full:
        stream = Dropping(full)
        print("a line", file=stream, flush=True)
        assert stream.write("more") == 4
        stream.flush()


def test_quiet(text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    words = ("--batch_input_path", batch, *FLAGS, "--quiet")
    result = text2world(*words)
    assert (result.stdout, result.stderr) == (f"2 of 2 videos are in {tmp_path / 'out'}\n", "")
    fail_at(monkeypatch, ValueError("odd"), 1)
    result = text2world(*words)
    assert result.stdout == f"1 of 2 videos are in {tmp_path / 'out'}\n"
    assert result.stderr.count("\n") == 2
    check_mentions(result.stderr, "2/2 odd 1 of 2 inputs failed")


def test_events(text2world: Make, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert text2world("--prompt", PROMPT, *FLAGS, f"--log-json={log}").exit_code == 0
    assert text2world("--log_json", log, "--prompt", " ").exit_code == 2
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds.count("end") == 2
    assert {"note", "result", "error"} <= set(kinds)
    assert [event["status"] for event in events if event["event"] == "end"] == [0, 2]
    stages = [(e["stage"], e["state"]) for e in events if e["event"] == "stage"]
    assert ("denoise", "started") in stages
    assert ("denoise", "ended") in stages
    assert sorted(event["time"] for event in events) == [event["time"] for event in events]
    assert logging.getLogger("worldline").handlers == []
    log.write_text("a file of the user\n")
    result = text2world("--prompt", PROMPT, "--log_json", log)
    assert result.exit_code == 2
    assert log.read_text() == "a file of the user\n"


def test_a_notice_appears_once(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = World.prepare

    def prepare(*args: Any, **named: Any) -> Any:
        logging.getLogger("worldline.guards").warning("a notice of each load")
        return real(*args, **named)

    monkeypatch.setattr(World, "prepare", prepare)
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    for _ in range(2):
        result = text2world("--batch_input_path", batch, *FLAGS)
        assert result.stderr.count("a notice of each load") == 1
