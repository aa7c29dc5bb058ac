"""Videos of a folder, judged and compared with references, for `worldline evaluate`.

A video is read once, frame by frame. Only small copies of its frames are kept, so that neither size
nor length fills the memory.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import fsum, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from worldline.errors import InputError
from worldline.evaluate.failures import Failure, failure_rate, find_in_reduced, one_thread, reduce
from worldline.evaluate.metrics import decibels, flicker, motion, mse, ssim
from worldline.video.read import VIDEO_SUFFIXES, Frames, stream_media
from worldline.video.sheet import spread, thumbnail

_MEASURES = ("motion", "flicker", "psnr", "ssim", "reference_motion", "reference_flicker")


@dataclass(frozen=True)
class Task:
    """One video to judge."""

    name: str  # path below the folder
    path: Path
    num_input_frames: int  # at its start, not judged
    reference: Path | None = None  # the true video


@dataclass(frozen=True, kw_only=True)
class Score:
    """Failures and measures of one video; what needs a true video is None without one."""

    name: str  # path below the folder
    frames: int
    height: int
    width: int
    num_input_frames: int  # at its start, neither judged nor compared
    failures: tuple[Failure, ...]
    motion: float  # mean absolute change between frames, grey levels, from the last input frame on
    flicker: float  # half the mean absolute second difference in time, from the same frame on
    reference: str | None = None  # file of the true video
    compared_frames: int | None = None  # behind the input frames, in both videos
    psnr: float | None = None  # dB, squared errors pooled over these frames; `inf` if equal
    ssim: float | None = None  # mean over these frames
    reference_motion: float | None = None
    reference_flicker: float | None = None

    @property
    def verdict(self) -> str:
        """The word "sound", or the kinds of failure."""
        return " and ".join(failure.kind for failure in self.failures) or "sound"


def find_tasks(
    folder: Path, reference: Path | None = None, num_input_frames: int | None = None
) -> list[Task]:
    """Videos of a folder and of those below it, at least one.

    Args:
        folder: where they are.
        reference: folder with a video of the same name, of any suffix, for each to compare.
        num_input_frames: of each video; by default that of the JSON report beside it, else 0.

    Raises:
        InputError: there are no videos, or references that are not clear.
    """
    videos = _list_videos(folder, apart=reference)
    references = _match_references(videos, folder, reference) if reference is not None else {}
    tasks = []
    for name, path in videos.items():
        count = _reported_input_frames(path) if num_input_frames is None else num_input_frames
        tasks.append(Task(name, path, count, references.get(name)))
    return tasks


def _list_videos(folder: Path, apart: Path | None) -> dict[str, Path]:
    """Videos below a folder by name, without hidden ones and those below `apart`."""
    if not folder.is_dir():
        wrong = "is a file; give its folder" if folder.is_file() else "no such folder"
        raise InputError(f"{folder}: {wrong}")
    whole, inner = folder.resolve(), apart.resolve() if apart else None
    if inner == whole:
        raise InputError(f"{folder} is both the folder and its own reference")
    if inner is not None and whole not in inner.parents:
        inner = None
    videos = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = "/." in f"/{name}" or path.stem.endswith(".preview")  # of a killed run
        if hidden or path.is_dir() or inner in path.resolve().parents:
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES:
            videos[name] = path
    if not videos:
        outside = f" outside {apart}" if inner else ""
        raise InputError(f"{folder} holds no videos{outside} ({' '.join(VIDEO_SUFFIXES)})")
    return videos


def _match_references(videos: dict[str, Path], folder: Path, reference: Path) -> dict[str, Path]:
    """Reference of each video: of the same suffix, else the only one of its stem."""
    paths = _list_videos(reference, apart=folder)
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for name in paths:
        by_stem[name.rpartition(".")[0]].append(name)
    matched: dict[str, Path] = {}
    for name in videos:
        fitting = [name] if name in paths else by_stem[name.rpartition(".")[0]]
        if len(fitting) > 1:
            raise InputError(f"{name} has several references: {', '.join(fitting)}")
        if fitting:
            matched[name] = paths[fitting[0]]
    if not matched:
        raise InputError(f"{reference} has no video of the name of one in {folder}")
    return matched


def _reported_input_frames(path: Path) -> int:
    """Number of input frames in the report beside a video; 0 without such a report."""
    try:
        frames = json.loads(path.with_suffix(".json").read_text())["request"]["num_input_frames"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return max(0, frames) if type(frames) is int else 0


@one_thread()
def score_video(task: Task) -> tuple[Score, dict[int, Frames]]:
    """Score of a video, and small pictures of it by number of their frame.

    Raises:
        InputError: it, or its reference, cannot be read to the end, is too short, or of another
            size.
    """
    inputs = task.num_input_frames
    copies: list[torch.Tensor] = []
    pictures: list[Frames] = []
    values: defaultdict[str, list[float]] = defaultdict(list)
    recent = {kind: deque[Frames](maxlen=3) for kind in ("", "reference_")}
    references = (
        chain.from_iterable(stream_media(task.reference, 8)) if task.reference else iter(())
    )
    for index, frame in enumerate(chain.from_iterable(stream_media(task.path, 8))):
        copies.append(reduce(frame))
        pictures.append(thumbnail(frame))
        reference = next(references, None)
        for kind, picture in (("", frame), ("reference_", reference)):
            if picture is not None and index >= inputs - 1:  # a change needs a frame before it
                recent[kind].append(picture)
                window = np.stack(recent[kind])
                values[f"{kind}motion"].append(motion(window[-2:]))
                values[f"{kind}flicker"].append(flicker(window))
        if index >= inputs and reference is not None:
            try:
                values["mse"].append(mse(frame, reference))
                values["ssim"].append(ssim(frame, reference))
            except ValueError as error:
                raise InputError(f"{task.path} beside {task.reference}: {error}") from None
    if len(copies) < (needed := max(2, inputs + 1)):
        raise InputError(
            f"{task.path} has {len(copies)} frames, {inputs} of them input; {needed} are needed"
        )

    def mean(name: str, zeros: int = 0) -> float:
        """Mean but for the zeros of the first frames, which have none before them."""
        return fsum(values[name]) / max(1, len(values[name]) - zeros)

    compared: dict[str, Any] = {}
    if task.reference is not None:
        if not values["mse"]:
            raise InputError(f"{task.reference} has no frame behind {inputs} input frames")
        compared = {
            "reference": str(task.reference),
            "compared_frames": len(values["mse"]),
            "psnr": decibels(mean("mse")),
            "ssim": mean("ssim"),
            "reference_motion": mean("reference_motion", 1),
            "reference_flicker": mean("reference_flicker", 2),
        }
    score = Score(
        name=task.name,
        frames=len(copies),
        height=frame.shape[0],
        width=frame.shape[1],
        num_input_frames=inputs,
        failures=tuple(find_in_reduced(torch.cat(copies), inputs)),
        motion=mean("motion", 1),
        flicker=mean("flicker", 2),
        **compared,
    )
    picks = {*spread(len(pictures)), *(failure.frame for failure in score.failures)}
    return score, {index: pictures[index] for index in sorted(picks)}


def _frames(path: Path) -> Iterator[Frames]:
    return chain.from_iterable(stream_media(path, 8))


def medians(scores: Sequence[Score]) -> dict[str, float]:
    """Median of each measure over the videos that have it."""
    values = {
        name: [value for score in scores if (value := getattr(score, name)) is not None]
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
    rounded = {name: round(x, 4) if isfinite(x) else None for name, x in floats.items()}
    return values | rounded
