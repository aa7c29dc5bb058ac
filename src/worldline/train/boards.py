"""Boards on which a run can be watched: TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from worldline.errors import Error, InputError, one_line
from worldline.train.experiment import Experiment
from worldline.video.read import Frames

log = logging.getLogger(__name__)


class Board(Protocol):
    """Board of a run."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step."""

    def video(self, step: int, name: str, frames: Frames, path: Path) -> None:
        """Add a video (T, H, W, 3), which is in a file."""


class Boards:
    """Several boards as one; what fails, for want of room or of a network, is left out from then.

    The run goes on, in all processes.
    """

    def __init__(self, boards: Sequence[Board] = ()) -> None:
        self.boards = [*boards]

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._each(lambda board: board.figures(step, figures))

    def video(self, step: int, name: str, frames: Frames, path: Path) -> None:
        self._each(lambda board: board.video(step, name, frames, path))

    def _each(self, add: Callable[[Board], None]) -> None:
        for board in [*self.boards]:
            try:
                add(board)
            except Exception as error:  # of many classes
                self.boards.remove(board)
                log.warning("%s: %s; going on without it", type(board).__name__, one_line(error))


class TensorBoard:
    """Files in a folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def video(self, step: int, name: str, frames: Frames, path: Path) -> None:
        # its last frame: videos would need a further package
        self.writer.add_image(name, frames[-1], step, dataformats="HWC")
        self.writer.flush()


class WandB:
    """A run of Weights & Biases, which a continued run goes on with."""

    def __init__(self, experiment: Experiment) -> None:
        self.wandb: Any = import_module("wandb")
        job, named = experiment.job, experiment.folder / "wandb_id.txt"
        if not named.exists():
            named.parent.mkdir(parents=True, exist_ok=True)
            named.write_text(secrets.token_hex(4))
        try:
            self.wandb.init(
                id=named.read_text().strip(),
                project=job.project,
                group=job.group,
                name=job.name,
                mode=job.wandb_mode,
                config=experiment.to_json(),
                resume="allow",
            )
        except Exception as error:
            raise Error(
                f"job.wandb_mode is {job.wandb_mode}, but wandb does not begin: {one_line(error)}; "
                "give job.wandb_mode=disabled to train without"
            ) from error

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.wandb.log(dict(figures), step=step)

    def video(self, step: int, name: str, frames: Frames, path: Path) -> None:
        self.wandb.log({name: self.wandb.Video(str(path))}, step=step)


def check_boards(experiment: Experiment) -> None:
    """Refuse a board that is asked for and not installed.

    Raises:
        InputError: it is Weights & Biases.
    """
    if (mode := experiment.job.wandb_mode) != "disabled" and not find_spec("wandb"):
        raise InputError(
            f"job.wandb_mode is {mode}, but wandb is not installed; install it (pip install wandb)"
        )


def open_boards(experiment: Experiment) -> Iterator[Board]:
    """TensorBoard, where it is installed, and Weights & Biases, where it is asked for."""
    if find_spec("tensorboard"):
        yield TensorBoard(experiment.folder / "tensorboard")
    if experiment.job.wandb_mode != "disabled":
        yield WandB(experiment)
