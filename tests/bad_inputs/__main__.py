"""Run bad inputs: python -m tests.bad_inputs [TEXT]; those whose name holds TEXT.

A process that has imported everything forks a child for each command line. Asked of each: the
right exit status, a message that names what is wrong, no trace, less than LIMIT seconds, text
characters and bytes of memory, and no file where the video would be.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from pkgutil import walk_packages
from typing import NamedTuple

import torch

import worldline

from .cases import AR, CV, DIT, FLOW, Case, clip, generate, make_worlds
from .documents import blocklist, document_cases, serving_answers
from .media import media_cases
from .weights import MARK, weights_cases

SECONDS, CHARACTERS, BYTES = 30, 2000, 10**9
TRACES = ("Traceback (most recent", "unexpected ")


def good_cases() -> Iterator[Case]:
    """Good inputs, which must succeed: without them a command that refuses all would pass."""

    def run(model: str) -> list[str]:
        make_worlds(model)
        return generate(model)

    def reconstruct() -> list[str]:
        root = make_worlds()
        words = ["tokenize", "reconstruct", "--checkpoint", str(root / CV)]
        return [*words, "--video_pattern", clip()]

    def inspect() -> list[str]:
        return ["checkpoints", "inspect", str(make_worlds() / FLOW), "--values"]

    for model in (FLOW, DIT, AR):
        yield Case(f"good, {model}", lambda model=model: run(model), ("made.mp4",), (0,))
    yield Case("good, guardrails", lambda: blocklist(lambda folder: None), ("made.mp4",), (0,))
    yield Case("good, tokenizer", reconstruct, ("dB",), (0,))
    yield Case("good, inspect", inspect, (FLOW,), (0,))


def run_case(case: Case, folder: Path) -> list[str]:
    """What is wrong with the way in which a command ends."""
    work, output = folder / "work", folder / "output.log"
    work.mkdir()
    begin = time.monotonic()
    making = run_child(partial(make, case, work, folder / "words.json"), output)
    if making.status:
        return [f"its files could not be made: {output.read_text()}"]
    ended = run_child(partial(command, case, work, folder / "words.json"), output)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.read_bytes().decode("utf-8", "replace"))
    text = "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))
    wrong = []
    if ended.killed:
        wrong.append(f"it ran for more than {SECONDS} s")
    elif ended.status not in case.statuses:
        wrong.append(f"exit status {ended.status}")
    wrong += [f"it prints {trace!r}" for trace in TRACES if trace in text]
    wrong += [f"{name!r} is not named" for name in case.names if name not in text]
    if len(text) > CHARACTERS:
        wrong.append(f"{len(text):,} characters")
    if ended.peak > BYTES:
        wrong.append(f"peak memory {ended.peak / 1e9:.2f} GB")
    if 0 not in case.statuses and any(path.suffix != ".json" for path in work.glob("out/made*")):
        wrong.append("a video is left")
    if (work / MARK).exists():
        wrong.append("code of the file was executed")
    last = text.strip().splitlines()[-1:] or [""]
    took = f"{time.monotonic() - begin:4.1f} s {ended.peak / 1e9:.2f} GB"
    print(f"{'WRONG' if wrong else 'ok   '} {took}  {case.name}: {last[0][:160]}", flush=True)
    if wrong:
        print(f"      {'; '.join(wrong)}\n{text[:1500]}", flush=True)
    return wrong


def make(case: Case, work: Path, words: Path) -> None:
    os.chdir(work)
    words.write_text(json.dumps(case.make()))


def command(case: Case, work: Path, words: Path) -> None:
    os.chdir(work)
    os.environ |= case.environment
    from worldline.cli.main import main

    main(json.loads(words.read_text()))


class Ended(NamedTuple):
    """Exit status of a child, whether it was killed after SECONDS, and its peak memory, bytes."""

    status: int
    killed: bool
    peak: int


def start_child(work: Callable[[], None]) -> int:
    """Fork of this process that does `work`."""
    child = os.fork()
    if child == 0:
        status = 99  # of an exception that a command let through
        try:
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def run_child(work: Callable[[], None], output: Path) -> Ended:
    """Run `work` in a fork of this process, its outputs in a file."""

    def redirected() -> None:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = (
            os.fdopen(stream, "w", errors="backslashreplace") for stream in (1, 2)
        )
        # torch renews its pool at first use in a fork, and two threads at once do it wrong
        torch.set_num_threads(1)
        work()

    child = start_child(redirected)
    end, killed = time.monotonic() + SECONDS, False
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end and not killed:
            killed = True
            with suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return Ended(os.waitstatus_to_exitcode(ended[1]), killed, ended[2].ru_maxrss * 1024)


def start_case(case: Case, problems: Path) -> int:
    """Process that runs a case and leaves in a file what is wrong."""

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
            problems.write_text(json.dumps(run_case(case, Path(folder))))

    return start_child(work)


def run_cases(cases: Iterator[Case]) -> dict[str, list[str]]:
    """Name of each case -> what is wrong; two at a time.

    A fork waits for each case, with no locks between them: a pool of processes may hang at its end.
    """
    results: dict[str, list[str]] = {}
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
        for number, case in enumerate(chain(cases, [None])):
            while running and (len(running) == 2 or case is None):
                process, status = os.wait()
                if process in running:  # the server of answers is a child, too
                    name, problems = running.pop(process)
                    ended = problems.exists() and not status
                    lost = [f"its process ended with {os.waitstatus_to_exitcode(status)}"]
                    results[name] = json.loads(problems.read_text()) if ended else lost
            if case is not None:
                assert case.name not in results, f"two cases are named {case.name}"
                problems = Path(folder, f"{number}.json")
                running[start_case(case, problems)] = case.name, problems
    return results


def main(chosen: str) -> int:
    """Run the cases whose name holds a text, two at a time."""
    for module in walk_packages(worldline.__path__, "worldline."):
        if not module.name.endswith(("__main__", "kernels")):
            with suppress(ModuleNotFoundError):  # of an extra that is not installed
                import_module(module.name)
    torch.set_num_threads(1)
    os.environ |= {"WORLDLINE_CACHE": tempfile.mkdtemp(prefix="bad-inputs-"), "HF_HUB_OFFLINE": ""}
    begin = time.monotonic()
    with serving_answers() as hub:
        every = chain(good_cases(), weights_cases(), media_cases(), document_cases(hub))
        results = run_cases(case for case in every if chosen in case.name)
    wrong = {name: problems for name, problems in results.items() if problems}
    for name, problems in sorted(wrong.items()):
        print(f"wrong: {name}: {'; '.join(problems)}")
    took = time.monotonic() - begin
    print(f"{len(results) - len(wrong)} of {len(results)} are right; {took:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
