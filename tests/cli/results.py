"""What a command line leaves behind, and videos that fail on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from worldline.step import Step
from worldline.video.write import write_video
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.world import Job, World

from ..conftest import moving


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def videos(*names: str) -> set[str]:
    """Files of finished videos."""
    return {f"{name}.{end}" for name in names for end in ("mp4", "txt", "json")}


def report_of(folder: Path, name: str = "output") -> dict[str, Any]:
    """Report of a video in `folder / "out"`."""
    report: dict[str, Any] = json.loads((folder / "out" / f"{name}.json").read_text())
    return report


def write_lines(path: Path, *lines: object) -> Path:
    """Write JSON, one value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def check_mentions(text: str, words: str) -> None:
    """Fail unless a message has all of these names and numbers."""
    for word in words.split():
        assert word in text, f"{word!r} is not in: {text}"


def check_refused(result: Result, words: str, folder: Path) -> None:
    """Fail unless a command ended with status 2, mentioned `words`, and made nothing."""
    assert result.exit_code == 2, result.output
    check_mentions(result.stderr, words)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (folder / "out").exists()


def alter(path: Path) -> None:
    """Change the contents of a video, of weights or of settings, which stay readable."""
    if path.suffix == ".mp4":
        write_video(moving()[::-1], path, 25)
    elif path.suffix == ".json":
        path.write_text(f"{path.read_text()}\n")
    else:
        source = open_checkpoint(path)
        tensors = {name: source.read(name) for name in source.entries}
        first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        save({**tensors, first: tensors[first] * 2}, path, source.metadata)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, number: int, kind: str = "denoise"
) -> None:
    """Make the video of this number raise an error after its first step of a kind."""
    real, numbers = World.run_batch, count()

    def run_batch(world: World, jobs: Sequence[Job]) -> Iterator[tuple[int, Step]]:
        fails = next(numbers) == number
        for index, step in real(world, jobs):
            yield index, step
            if fails and step.kind == kind and step.done:
                raise error

    monkeypatch.setattr(World, "run_batch", run_batch)
