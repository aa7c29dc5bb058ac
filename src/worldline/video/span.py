"""Spans of video files: one of the recordings that a file holds, frame by frame."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from worldline.errors import InputError
from worldline.video.read import MAX_FRAME, Clip, MediaInfo, check_pixels, probe_ticks, read_frames

# differences between the times of frames, ticks, each with its number of repeats; from 0 on
Steps: TypeAlias = Sequence[Sequence[int]]


def steps_of(times: Sequence[int]) -> Steps:
    """Times in few numbers: those of an even video are two pairs."""
    return [[int(step), len([*same])] for step, same in groupby(np.diff(times, prepend=0))]


def times_of(steps: Steps) -> list[int]:
    """Times that have such differences."""
    return _cumulated(steps).tolist()


def _cumulated(steps: Steps) -> NDArray[np.int64]:
    differences, counts = np.array(steps, np.int64).reshape(-1, 2).T
    return np.cumsum(np.repeat(differences, counts))


@dataclass(frozen=True)
class Timeline:
    """A video file's measurements, and when its frames are displayed.

    Attributes:
        steps: empty where the file leaves it open.
        tick: seconds.
    """

    path: Path
    info: MediaInfo
    steps: Steps
    tick: Fraction

    def numbers(self, begin: float, count: int, fps: float) -> Sequence[int]:
        """Numbers of the frames of a recording, each displayed within half a frame of its time.

        Args:
            begin: seconds from the first frame of the file.
            count: frames.
            fps: frames a second.

        Raises:
            InputError: a frame is absent.
        """
        if not self.steps or not self.tick:
            raise InputError(f"{self.path}: its frames have no times, so none can be found")
        if count > self.info.frames:
            raise InputError(f"{self.path}: it has {self.info.frames:,} of {count:,} frames")
        times = _cumulated(self.steps)
        seconds = (times - times[0]) * float(self.tick)
        wanted = begin + np.arange(count) / fps
        after = np.searchsorted(seconds, wanted).clip(0, len(seconds) - 1)
        before = (after - 1).clip(0)
        nearer = wanted - seconds[before] <= seconds[after] - wanted
        nearest = np.where(nearer, before, after)
        absent = np.abs(seconds[nearest] - wanted) > 0.5 / fps
        absent[1:] |= nearest[1:] <= nearest[:-1]
        if absent.any():
            place = int(absent.argmax())
            raise InputError(
                f"{self.path}: it lacks frame {place} of {count:,}, at {wanted[place]:.3f} s; "
                f"its {len(seconds):,} frames end at {seconds[-1]:.3f} s"
            )
        first, step = int(nearest[0]), int(nearest[1] - nearest[0]) if count > 1 else 1
        even = range(first, first + count * step, step)
        return even if np.array_equal(even, nearest) else tuple(nearest.tolist())


def open_timeline(path: Path) -> Timeline:
    """Timeline of a video file, whose packets are all read.

    Raises:
        InputError: it is no video, or damaged.
    """
    info, times, tick = probe_ticks(path)
    if info.kind == "image":
        raise InputError(f"{path} is a picture; give a video")
    return Timeline(path, info, steps_of(times), tick)


@dataclass(frozen=True)
class Span:
    """Frames of a video file, by their numbers in it; as a path it is the file.

    Attributes:
        timeline: of the file.
        name: of the span, for messages and reports.
        numbers: of its frames in the file, ascending.
        fps: frames a second.
        head: number of frames that are read, from the first on; None for as many as are asked for.
    """

    timeline: Timeline = field(repr=False)
    name: str
    numbers: Sequence[int]
    fps: float
    head: int | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"

    @property
    def path(self) -> Path:
        """The file."""
        return self.timeline.path

    @property
    def frames(self) -> int:
        """Number of frames that it can give."""
        return len(self.numbers[: self.head])

    @property
    def identity(self) -> list[Any]:
        """Difference from other spans of the file, as JSON holds it."""
        numbers = self.numbers
        if isinstance(numbers, range):
            return [numbers.start, numbers.stop, numbers.step, self.head]
        return [[*numbers], self.head]

    def read(self, last: int) -> Clip:
        """Its first `last` frames, or where `head` is stated the last of that many; perhaps fewer.

        Raises:
            InputError: as of `read_frames`.
        """
        numbers, info = self.numbers[: self.head or last][-last:], self.timeline.info
        check_pixels(self.path, len(numbers), info.height, info.width, MAX_FRAME)
        try:
            times = times_of(self.timeline.steps)
            frames = np.stack([*read_frames(self.path, numbers, times)])
        except InputError as error:
            raise InputError(f"{error} ({self.name})") from None
        return Clip(frames, self.fps, info.notes)
