"""Exit statuses, one clear line for an error, and a quick --help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.metadata import version

import click
import pytest
import torch
from click.testing import CliRunner

from worldline.cli.main import Main, main
from worldline.errors import CheckpointError, Error, GuardrailRefusal, InputError

from .conftest import Run


def raising(error: BaseException) -> Main:
    @click.command()
    def fail() -> None:
        raise error

    group = Main("worldline")
    group.get_command = lambda ctx, cmd_name: fail  # type: ignore[method-assign]
    return group


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (Error("went wrong"), 1, "went wrong"),
        (InputError("wrong words"), 2, "wrong words"),
        (CheckpointError("damaged"), 2, "damaged"),
        (GuardrailRefusal("refused", "video"), 3, "refused"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.mp4"),
            1,
            "OSError: [Errno 28] No space left on device: 'a.mp4'",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "OutOfMemoryError: CUDA out of"),
        (MemoryError(), 1, "MemoryError"),
        (RuntimeError("odd\nthing"), 1, "unexpected RuntimeError: odd (--debug shows the trace)"),
        (click.UsageError("Bad words."), 2, "Bad words (see worldline"),
    ],
)
def test_exit_status(error: BaseException, status: int, line: str) -> None:
    result = CliRunner().invoke(raising(error), ["fail"])
    assert result.exit_code == status
    assert result.stderr.lstrip().startswith(f"worldline: {line}")  # ^C ends with a line's end
    assert result.stderr.strip().count("\n") == 0
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "traced"),
    [("--debug fail", True), ("fail --debug", True), ("fail -- --debug", False)],
)
def test_debug_shows_the_trace(words: str, traced: bool) -> None:
    result = CliRunner().invoke(raising(InputError("wrong words")), words.split())
    assert result.exit_code == 2
    assert ("Traceback" in result.stderr) == traced


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["autoregressive", "base", "--tempratur", "1"], "--temperature"),
        (["autoregressive", "base", "--temperature", "warm"], "not a valid float"),
        (["autoregressive", "base", "--input_type", "text"], "'image', 'video'"),
        (["autoregressive", "base", "--num_input_frames", "3"], "'1', '9'"),
        (["autoregressive", "base", "extra"], "extra"),
    ],
)
def test_usage_errors_exit_2(words: list[str], part: str, run: Run) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["autoregressive"]])
def test_no_command_shows_the_help(words: list[str], run: Run) -> None:
    result = run(*words)
    assert result.output.startswith("Usage: worldline")


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"worldline {version('worldline')}\n"


def test_every_command_is_found_and_documented(run: Run) -> None:
    assert isinstance(main, Main)
    context = click.Context(main)
    listed = run("--help").stdout.split("Commands:")[1].split("\n\n")[0]
    names = [
        line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] > " "
    ]
    assert names == main.list_commands(context)
    for name in names:
        command = main.get_command(context, name)
        assert command is not None
        assert command.help
        assert run(name, "--help").exit_code == 0


def test_a_closed_pipe_ends_quietly() -> None:
    result = CliRunner().invoke(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), ["fail"])
    assert (result.exit_code, result.stderr) == (1, "")


def test_help_is_quick_and_imports_no_torch() -> None:
    script = "import sys; sys.argv = ['worldline', '--help']\n"
    script += "from worldline.cli.main import main\n"
    script += "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
    script += "assert not {'torch', 'numpy', 'av'} & sys.modules.keys(), 'too much imported'"
    seconds = []
    for _ in range(3):  # the processor's time and the best of three: the machine may be busy
        begun = sum(os.times()[2:4])  # user and system time of children
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(sum(os.times()[2:4]) - begun)
        assert done.returncode == 0, done.stderr
        assert "autoregressive" in done.stdout
    assert min(seconds) <= 0.5


@pytest.mark.parametrize("command", ["diffusion text2world", "autoregressive base", "predict2.5"])
def test_a_command_imports_no_other_family(command: str) -> None:
    script = "import sys\nfrom worldline.cli.main import main\ntry: main()\n"
    script += "except SystemExit: print(*sys.modules)"
    words = [sys.executable, "-c", script, *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    requests = [name for name in done.stdout.split() if name.endswith(".request")]
    own = f"worldline.families.{command.split()[0].replace('.', '_')}.request"
    assert requests == ["worldline.request", own]


def test_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "worldline", "--version"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.startswith("worldline ")
