"""Weights & Biases, by a package that records what it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from worldline.errors import Error, InputError
from worldline.train.boards import Boards, TensorBoard, check_boards, open_boards
from worldline.train.experiment import Experiment, short_form

PACKAGE = """
calls = []

def init(**settings):
    if settings["mode"] == "online":
        raise RuntimeError("api_key not configured (no-tty)\\ncall wandb login")
    calls.append(("init", settings))

def log(figures, step):
    calls.append((step, figures))

def Video(path):
    return f"video {path}"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb.py").write_text(PACKAGE)


def experiment(mode: str) -> Experiment:
    return short_form("predict2.5", {"job": {"name": "mine", "wandb_mode": mode}})


def test_figures_and_videos(installed: None) -> None:
    """A run that goes on has the same identifier."""
    wanted = experiment("offline")
    check_boards(wanted)
    for _ in range(2):
        board = [*open_boards(wanted)][-1]
        board.figures(3, {"loss": 0.5})
        board.video(3, "sample 0", np.zeros((2, 4, 4, 3), np.uint8), Path("a.mp4"))
    calls: list[Any] = sys.modules["wandb"].calls
    (_, first), (_, second) = (call for call in calls if call[0] == "init")
    assert first == second
    assert (first["name"], first["config"]["model"]) == ("mine", wanted.model)
    assert calls[1:3] == [(3, {"loss": 0.5}), (3, {"sample 0": "video a.mp4"})]


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every figure by its name, and the last frame of a video."""
    writer = MagicMock()
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path)
    board.figures(3, {"loss": 0.5, "norm": 2.0})
    frames = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    board.video(3, "sample 0", frames, Path("a.mp4"))
    assert [call.args for call in writer.add_scalar.mock_calls] == [
        ("loss", 0.5, 3),
        ("norm", 2.0, 3),
    ]
    [(name, picture, step)] = [call.args for call in writer.add_image.mock_calls]
    assert (name, step) == ("sample 0", 3)
    assert (picture == frames[1]).all()


def test_one_that_does_not_begin(installed: None) -> None:
    with pytest.raises(Error, match=r"wandb_mode is online.*api_key not configured.*disabled"):
        [*open_boards(experiment("online"))]


def test_one_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldline.train.boards.find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed"):
        check_boards(experiment("offline"))
    check_boards(experiment("disabled"))
    assert not [*open_boards(experiment("disabled"))]


def test_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """It is named once and left out; the others go on, by figures and by videos."""
    bad, good = MagicMock(), MagicMock()
    bad.figures.side_effect = OSError(28, "No space left on device")
    other = MagicMock()
    other.video.side_effect = RuntimeError("queue is closed")
    boards = Boards([bad, other, good])
    for step in (1, 2):
        boards.figures(step, {"loss": 0.5})
        boards.video(step, "sample 0", np.zeros((2, 4, 4, 3), np.uint8), Path("a.mp4"))
    assert [board.figures.call_count for board in (bad, other, good)] == [1, 1, 2]
    assert [board.video.call_count for board in (bad, other, good)] == [0, 1, 2]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "No space left" in lines[0]
    assert "queue is closed" in lines[1]
