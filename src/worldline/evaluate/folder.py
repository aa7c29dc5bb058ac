"""Videos judged, measured and drawn, for `worldline evaluate`.

A video is read once, frame by frame. Only a small copy of each frame is kept, about 80 kB, so that
neither size nor length fills the memory.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from worldline.evaluate.failures import (
    Failure,
    failure_rate,
    find_in_reduced,
    one_thread,
    reduce,
)
from worldline.evaluate.metrics import decibels, flicker, motion, mse, ssim
from worldline.evaluate.tasks import Task, check_length
from worldline.video.read import stream_media
from worldline.video.write import write_bytes

Frame = NDArray[np.uint8]

_MEASURES = ("motion", "flicker", "psnr", "ssim", "reference_motion", "reference_flicker")
_CHUNK = 8  # frames that are decoded at a time
_ROWS, _COLUMNS = 60, 9  # of the contact sheet
_CELL = (160, 120)  # largest width and height of its pictures
_GAP, _LINE = 4, 14  # pixels between its pictures, and of a line of text


@dataclass(frozen=True, kw_only=True)
class Score:
    """Failures and measures of one video.

    Attributes:
        name: path below the folder.
        frames: number of frames.
        height: pixels.
        width: pixels.
        num_input_frames: number of frames at its start that are neither judged nor compared.
        failures: empty if it is sound.
        motion: mean absolute change between frames, in grey levels, from the last input frame on.
        flicker: half the mean absolute second difference in time, from the same frame on.
        reference: name of the true video; None without one, as are all that follow.
        compared_frames: number of frames behind the input frames that both have.
        psnr: dB, squared errors pooled over these frames; `inf` if they are equal.
        ssim: mean over these frames.
        reference_motion: motion of the true video.
        reference_flicker: flicker of the true video.
    """

    name: str
    frames: int
    height: int
    width: int
    num_input_frames: int
    failures: tuple[Failure, ...]
    motion: float
    flicker: float
    reference: str | None = None
    compared_frames: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    reference_motion: float | None = None
    reference_flicker: float | None = None

    @property
    def verdict(self) -> str:
        """The word "sound", or the kinds of failure."""
        return " and ".join(failure.kind for failure in self.failures) or "sound"


@one_thread()
def score_video(task: Task) -> tuple[Score, dict[int, Frame]]:
    """Score of a video, and small pictures of it by number of their frame.

    Raises:
        InputError: it, or its reference, cannot be read to the end, or is too short.
    """
    inputs = task.num_input_frames
    copies: list[Tensor] = []
    pictures: list[Frame] = []
    errors: list[float] = []
    similarities: list[float] = []
    changes, true_changes = _Changes(), _Changes()
    references = _frames(task.reference) if task.reference else iter(())
    for index, frame in enumerate(_frames(task.path)):
        copies.append(reduce(frame))
        pictures.append(_small(frame))
        reference = next(references, None)
        if index >= inputs - 1:  # a change needs a frame before it
            changes.add(frame)
            if reference is not None:
                true_changes.add(reference)
        if index >= inputs and reference is not None:
            errors.append(mse(frame, reference))
            similarities.append(ssim(frame, reference))
    check_length(task.path, len(copies), inputs)
    height, width = frame.shape[:2]
    score = Score(
        name=task.name,
        frames=len(copies),
        height=height,
        width=width,
        num_input_frames=inputs,
        failures=tuple(find_in_reduced(torch.cat(copies), inputs)),
        motion=changes.motion,
        flicker=changes.flicker,
    )
    if task.reference is not None:
        check_length(task.reference, inputs + len(errors), inputs, least=1)
        score = replace(
            score,
            reference=task.reference_name,
            compared_frames=len(errors),
            psnr=decibels(fmean(errors)),
            ssim=fmean(similarities),
            reference_motion=true_changes.motion,
            reference_flicker=true_changes.flicker,
        )
    return score, {index: pictures[index] for index in _picks(score)}


class _Changes:
    """`motion` and `flicker` of a clip that arrives frame by frame; three frames are in memory."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque(maxlen=3)
        self.motions: list[float] = []
        self.flickers: list[float] = []

    def add(self, frame: Frame) -> None:
        self.frames.append(frame)
        if len(self.frames) > 1:
            self.motions.append(motion(np.stack([*self.frames][-2:])))
        if len(self.frames) > 2:
            self.flickers.append(flicker(np.stack(self.frames)))

    @property
    def motion(self) -> float:
        return fmean(self.motions or [0.0])

    @property
    def flicker(self) -> float:
        return fmean(self.flickers or [0.0])


def medians(scores: Sequence[Score]) -> dict[str, float]:
    """Median of each measure over the videos that have it."""
    values = {
        name: [getattr(score, name) for score in scores if getattr(score, name) is not None]
        for name in _MEASURES
    }
    return {name: median(each) for name, each in values.items() if each}


def as_json(scores: Sequence[Score], unreadable: dict[str, str]) -> dict[str, Any]:
    """Report of plain numbers and words; an infinite PSNR, of equal frames, is null."""
    return {
        **failure_rate([score.failures for score in scores]).as_json(),
        "medians": _rounded(medians(scores)),
        "unreadable": unreadable,
        "videos": [_rounded(asdict(score)) | {"sound": not score.failures} for score in scores],
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    floats = {name: value for name, value in values.items() if isinstance(value, float)}
    rounded = {name: round(x, 4) if math.isfinite(x) else None for name, x in floats.items()}
    return values | rounded


class Sheet:
    """Contact sheet: a row of frames for each video, the failed ones on top, at most 60 rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[Score, dict[int, Frame]]] = []
        self.omitted = 0

    def add(self, score: Score, pictures: dict[int, Frame]) -> None:
        self.rows.append((score, pictures))
        self.rows.sort(key=lambda row: not row[0].failures)
        self.omitted += len(self.rows) > _ROWS
        del self.rows[_ROWS:]

    def save(self, path: Path) -> None:
        """Write a PNG; a frame where a failure is worst has a red border.

        Raises:
            InputError: the place cannot be written.
            Error: the disk is full.
        """
        shapes = [picture.shape for _, row in self.rows for picture in row.values()]
        height = max(shape[0] for shape in shapes) + 2 * _LINE + _GAP
        width = max(shape[1] for shape in shapes) + _GAP
        columns = max(len(pictures) for _, pictures in self.rows)
        size = max(columns * width + _GAP, 480), len(self.rows) * height + _LINE + 2 * _GAP
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default()
        top = _GAP
        for score, pictures in self.rows:
            worst = {failure.frame for failure in score.failures}
            details = "; ".join(failure.detail for failure in score.failures)
            title = f"{score.name}: {score.verdict} {details}"
            # Pillow's own font, the only one sure to be there, draws boxes for other characters.
            title = title.encode("ascii", "replace").decode()
            draw.text((_GAP, top), title, fill="red" if worst else "black", font=font)
            for column, (index, picture) in enumerate(pictures.items()):
                x, y = _GAP + column * width, top + 2 * _LINE
                number = f"{index} input" if index < score.num_input_frames else str(index)
                draw.text((x, top + _LINE), number, fill="gray", font=font)
                sheet.paste(Image.fromarray(picture), (x, y))
                if index in worst:
                    corner = x + picture.shape[1] - 1, y + picture.shape[0] - 1
                    draw.rectangle((x, y, *corner), outline="red", width=3)
            top += height
        if self.omitted:
            draw.text((_GAP, top), f"and {self.omitted} more videos", fill="black", font=font)
        file = io.BytesIO()
        sheet.save(file, format="PNG")
        write_bytes(path, file.getbuffer())


def _frames(path: Path) -> Iterator[Frame]:
    for piece in stream_media(path, _CHUNK):
        yield from piece


def _small(frame: Frame) -> Frame:
    """Frame that fits into a cell of the contact sheet."""
    picture = Image.fromarray(frame)
    scale = min(1.0, _CELL[0] / picture.width, _CELL[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def _picks(score: Score) -> list[int]:
    """Numbers of frames spread over a video, with its first, its last and those of failures."""
    spread = np.linspace(0, score.frames - 1, min(_COLUMNS, score.frames)).round().astype(int)
    return sorted({*spread.tolist(), *(failure.frame for failure in score.failures)})
