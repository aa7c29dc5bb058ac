"""Videos of a folder, judged and measured: what `worldline evaluate` tells.

A video is read once, frame by frame. Of each frame only a small copy is kept, about 80 kB, so that
neither size nor length fills the memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from worldline.errors import InputError
from worldline.evaluate.clips import FailureRate, summarise
from worldline.evaluate.failures import (
    Failure,
    _find_appearance,
    _find_collapse,
    _onset,
    _reduce,
    _same_color,
    _smooth,
    one_thread,
)
from worldline.evaluate.metrics import ChangeMeter, FidelityMeter
from worldline.evaluate.tasks import Task, too_short
from worldline.video.read import stream_media
from worldline.video.write import write_bytes

Frame = NDArray[np.uint8]

_CHUNK = 8  # frames that are decoded at a time
# A frame is blank if this share of it is within so many grey levels of its commonest colour.
_BLANK_SHARE, _BLANK_LEVELS = 0.98, 5.0
# of the contact sheet
_ROWS = 60
_COLUMNS = 9
_CELL = (160, 120)  # most pixels a picture is wide and high


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A video beside its reference, over the frames that both have and that were not given.

    Attributes:
        reference: path below the reference folder.
        frames: how many were compared.
        psnr: in dB, squared errors pooled over the frames; `inf` where they are equal.
        ssim: mean over the frames.
        motion: of the reference, as in `Score`.
        flicker: likewise.
    """

    reference: str
    frames: int
    psnr: float
    ssim: float
    motion: float
    flicker: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one video is worth.

    Attributes:
        name: path below the folder.
        frames: how many it has.
        height: rows.
        width: columns.
        num_input_frames: how many at its start are given, and so neither judged nor compared.
        failures: empty if it is sound.
        motion: mean absolute change from frame to frame, in grey levels, from the last given on.
        flicker: half the mean absolute second difference in time, likewise.
        comparison: with its reference, where it has one.
    """

    name: str
    frames: int
    height: int
    width: int
    num_input_frames: int
    failures: tuple[Failure, ...]
    motion: float
    flicker: float
    comparison: Comparison | None = None

    @property
    def verdict(self) -> str:
        """In a word or two: "sound", or the kinds of failure."""
        return " and ".join(failure.kind for failure in self.failures) or "sound"

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and words; a `psnr` of null means that the videos are equal."""
        told = {**asdict(self), "sound": not self.failures}
        told["motion"], told["flicker"] = round(self.motion, 3), round(self.flicker, 3)
        if self.comparison is not None:
            numbers = {name: _rounded(value) for name, value in asdict(self.comparison).items()}
            told["comparison"] = numbers
        return told


@dataclass(frozen=True)
class Strip:
    """A row of the contact sheet.

    Attributes:
        score: of the video.
        pictures: by number of the frame.
    """

    score: Score
    pictures: dict[int, Frame]


@one_thread()
def score_video(task: Task) -> Strip:
    """Judge a video and measure it; compare it, where it has a reference.

    Raises:
        InputError: it, or its reference, cannot be read to the end, or is too short.
    """
    first = max(1, task.num_input_frames)  # to be judged: a change needs a frame before it
    copies: list[Tensor] = []
    pictures: list[Frame] = []
    changes, reference_changes, fidelity = ChangeMeter(), ChangeMeter(), FidelityMeter()
    others = iter(()) if task.reference is None else _frames(task.reference)
    height = width = 0
    for index, frame in enumerate(_frames(task.path)):
        height, width = frame.shape[:2]
        copies.append(_smooth(_reduce(torch.from_numpy(frame)[None])))
        pictures.append(_small(frame))
        other = next(others, None)
        if index >= first - 1:
            changes.add(frame)
            if other is not None:
                reference_changes.add(other)
        if index >= task.num_input_frames and other is not None:
            fidelity.add(frame, other)
    if len(copies) <= first:
        raise InputError(too_short(task.path, len(copies), task.num_input_frames))
    comparison = None
    if task.reference is not None:
        if not fidelity.frames:
            raise InputError(too_short(task.reference, 0, task.num_input_frames))
        comparison = Comparison(
            reference=task.reference_name,
            frames=fidelity.frames,
            psnr=fidelity.psnr,
            ssim=fidelity.ssim,
            motion=reference_changes.motion,
            flicker=reference_changes.flicker,
        )
    score = Score(
        name=task.name,
        frames=len(copies),
        height=height,
        width=width,
        num_input_frames=task.num_input_frames,
        failures=_judge(torch.cat(copies), task.num_input_frames),
        motion=changes.motion,
        flicker=changes.flicker,
        comparison=comparison,
    )
    return Strip(score, {index: pictures[index] for index in _picks(score)})


def rate(scores: Sequence[Score]) -> FailureRate:
    """Return how many videos failed, at least one being scored."""
    return summarise([score.failures for score in scores])


def medians(scores: Sequence[Score]) -> dict[str, float]:
    """Return the middle value of each measure, of those videos that have it."""
    values = {
        "motion": [score.motion for score in scores],
        "flicker": [score.flicker for score in scores],
    }
    compared = [score.comparison for score in scores if score.comparison is not None]
    if compared:
        values |= {
            "psnr": [comparison.psnr for comparison in compared],
            "ssim": [comparison.ssim for comparison in compared],
            "reference_motion": [comparison.motion for comparison in compared],
            "reference_flicker": [comparison.flicker for comparison in compared],
        }
    return {name: median(found) for name, found in values.items()}


def as_json(scores: Sequence[Score], unreadable: dict[str, str]) -> dict[str, Any]:
    """Return a report of plain numbers and words; a PSNR of null means equal videos."""
    told = rate(scores).as_json()
    del told["failed_clips"]  # which knows numbers, where `videos` has names
    return {
        **told,
        "medians": {name: _rounded(value) for name, value in medians(scores).items()},
        "unreadable": unreadable,
        "videos": [score.as_json() for score in scores],
    }


class Sheet:
    """A picture of all videos: a row of frames each, the failed ones on top.

    At most 60 rows, of failed ones before sound ones, in the order they were added.
    """

    def __init__(self) -> None:
        self._failed: list[Strip] = []
        self._sound: list[Strip] = []
        self._left_out = 0

    def add(self, strip: Strip) -> None:
        kept = self._failed if strip.score.failures else self._sound
        if len(kept) < _ROWS:
            kept.append(strip)
        else:
            self._left_out += 1

    def save(self, path: Path) -> None:
        """Write a PNG; a frame where a failure is worst has a red border.

        Raises:
            InputError: the place cannot be written.
            Error: the disk is full.
        """
        every = self._failed + self._sound
        strips = every[:_ROWS]
        left_out = self._left_out + len(every) - len(strips)
        gap, line = 4, 14
        heights = [
            2 * line + gap + max(picture.shape[0] for picture in strip.pictures.values())
            for strip in strips
        ]
        wide = max(
            sum(picture.shape[1] + gap for picture in strip.pictures.values()) for strip in strips
        )
        below = line if left_out else 0
        sheet = Image.new("RGB", (max(wide + gap, 480), sum(heights) + gap + below), "white")
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default()
        top = gap
        for strip, tall in zip(strips, heights, strict=True):
            self._draw_row(sheet, draw, font, strip, top)
            top += tall
        if left_out:
            draw.text((gap, top), f"{left_out} more are not shown", fill="black", font=font)
        file = io.BytesIO()
        sheet.save(file, format="PNG")
        write_bytes(path, file.getbuffer())

    @staticmethod
    def _draw_row(
        sheet: Image.Image,
        draw: ImageDraw.ImageDraw,
        font: Any,
        strip: Strip,
        top: int,
    ) -> None:
        score = strip.score
        gap, line = 4, 14
        worst = {failure.frame for failure in score.failures}
        told = f"{score.name}: {score.verdict}"
        if score.failures:
            told += f" ({'; '.join(failure.detail for failure in score.failures)})"
        # Pillow's own font, the only one sure to be there, draws boxes for the rest.
        text = told.encode("ascii", "replace").decode()
        draw.text((gap, top), text, fill="red" if worst else "black", font=font)
        left = gap
        for index, picture in strip.pictures.items():
            height, width = picture.shape[:2]
            number = f"{index} given" if index < score.num_input_frames else str(index)
            draw.text((left, top + line), number, fill="gray", font=font)
            sheet.paste(Image.fromarray(picture), (left, top + 2 * line))
            if index in worst:
                corner = (left + width - 1, top + 2 * line + height - 1)
                draw.rectangle((left, top + 2 * line, *corner), outline="red", width=3)
            left += width + gap


def _frames(path: Path) -> Iterator[Frame]:
    for piece in stream_media(path, _CHUNK):
        yield from piece


def _judge(copy: Tensor, num_input_frames: int) -> tuple[Failure, ...]:
    """Do what `find_failures` does, of the small copy (T, 3, h, w) it makes of a clip.

    Without input frames the first one made is taken for sound; but then a video that is blank from
    its first frame to its last has collapsed before it began.
    """
    first = max(1, num_input_frames)
    collapse = _find_collapse(copy, first)
    until = len(copy) if collapse is None else _onset(copy, first)
    if not num_input_frames and all(_is_blank(picture) for picture in copy):
        collapse = Failure("collapse", 0, 1.0, "all frames have one colour")
    found = (collapse, _find_appearance(copy[:until], first))
    return tuple(failure for failure in found if failure is not None)


def _is_blank(picture: Tensor) -> bool:
    return float(_same_color(picture, _BLANK_LEVELS).float().mean()) >= _BLANK_SHARE


def _small(frame: Frame) -> Frame:
    """Return a frame that fits into a cell of the contact sheet."""
    height, width = frame.shape[:2]
    scale = min(1.0, _CELL[0] / width, _CELL[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


def _picks(score: Score) -> list[int]:
    """Choose frames spread over a video, the first and last among them, and where it fails."""
    spread = np.linspace(0, score.frames - 1, min(_COLUMNS, score.frames)).round().astype(int)
    picks = {int(index) for index in spread}
    for failure in score.failures:
        inner = sorted(picks - {0, score.frames - 1, *(other.frame for other in score.failures)})
        if inner and failure.frame not in picks:
            picks.remove(min(inner, key=lambda index: abs(index - failure.frame)))
        picks.add(failure.frame)
    return sorted(picks)


def _rounded(value: Any) -> Any:
    """Round for a report; what JSON has no number for becomes None."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
