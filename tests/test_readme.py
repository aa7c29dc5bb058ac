"""The README and its pages: commands and Python run as written, links and paths lead somewhere.

Commands for released models are parsed with made-up weights under the released names.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from worldline.cli.demo import CLIP
from worldline.cli.generate import command_of
from worldline.cli.main import main
from worldline.video.read import probe, read_video
from worldline.video.write import write_video

from .tiny_diffusion import make_tiny_diffusion
from .tiny_predict2_5 import make_tiny_predict2_5

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
SHELL = "".join(block.replace("\\\n", "") for kind, block in BLOCKS if kind == "sh")
LINES = SHELL.splitlines()
BUNDLED = [line for line in LINES if " tiny-" in line]
RELEASED = [line for line in LINES if line.startswith("worldline ") and line not in BUNDLED]


def words_of(line: str) -> list[str]:
    """Words behind `worldline`."""
    program, *words = shlex.split(line, comments=True)
    assert program.removeprefix(".venv/bin/") == "worldline"
    return words


@pytest.fixture
def after_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, as `make demo` leaves it."""
    write_video(read_video(CLIP).frames[:9], tmp_path / "outputs" / "demo" / "input.mp4", 25.0)
    monkeypatch.chdir(tmp_path)


def test_every_line_is_tested() -> None:
    others = [line for line in LINES if line not in (*BUNDLED, *RELEASED)]
    assert [line.split()[:2] for line in others] == [["git", "clone"], ["make", "demo"]]
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    assert re.search(r"^demo: .*\n\t.*worldline demo$", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.usefixtures("after_demo")
@pytest.mark.parametrize("line", BUNDLED)
def test_bundled_world(line: str) -> None:
    words = words_of(line)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    if "-o" in words:
        video = Path(words[words.index("-o") + 1])
        assert probe(video).frames == 33
        assert video.with_suffix(".json").exists()
        again = CliRunner().invoke(main, [*words, "--resume"])
        assert "there before" in again.output


@pytest.mark.usefixtures("after_demo")
@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert probe(Path("another_future.mp4")).frames == 33


@pytest.mark.parametrize("line", RELEASED)
def test_released_model(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(line)
    if words[0] == "generate":
        make_tiny_diffusion(tmp_path / "checkpoints")
        make_tiny_predict2_5(tmp_path / "checkpoints")
        context = command_of(words[1], words[2:]).make_context("generate", words[2:])
        assert context.params["output"] == "out.mp4"
        return
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None
        command = found
    assert command.make_context(name, words, context).params["dry_run"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    if page.name in ("LOG.md", "CHANGELOG.md"):  # of what once was
        return
    for target in re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target


def test_two_screens() -> None:
    assert len(README.splitlines()) <= 90
