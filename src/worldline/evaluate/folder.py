"""Videos of a folder, judged and compared with references, for `worldline evaluate`.

A video is read once, frame by frame. Only small copies of its frames are kept, so that neither size
nor length fills the memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
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
    """One video to judge.

    Attributes:
        name: path below the folder.
        path: of the file.
        num_input_frames: number of input frames at its start, which are not judged.
        reference: the true video, if there is one.
    """

    name: str
    path: Path
    num_input_frames: int
    reference: Path | None = None


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
        reference: file of the true video; None without one, as are all that follow.
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
    references: dict[str, Path] = {}
    if reference is not None:
        references = _match_references(videos, folder, reference)
    return [
        Task(
            name,
            path,
            _reported_input_frames(path) if num_input_frames is None else num_input_frames,
            references.get(name),
        )
        for name, path in videos.items()
    ]


def _list_videos(folder: Path, apart: Path | None) -> dict[str, Path]:
    """Videos below a folder by name, without hidden ones and those below `apart`."""
    if not folder.is_dir():
        found = "is a file; give its folder" if folder.is_file() else "no such folder"
        raise InputError(f"{folder}: {found}")
    whole, inner = folder.resolve(), apart.resolve() if apart else None
    if inner == whole:
        raise InputError(f"{folder} is both the folder and its own reference")
    if inner is not None and whole not in inner.parents:
        inner = None
    videos = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES
        and not path.stem.endswith(".preview")  # left behind by a killed run
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
        and inner not in path.resolve().parents
    }
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
        first, other = next(iter(videos)), next(iter(paths))
        raise InputError(
            f"{reference} has no video of the name of one in {folder} ({other}, not {first})"
        )
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
    references = _frames(task.reference) if task.reference else iter(())
    for index, frame in enumerate(_frames(task.path)):
        copies.append(reduce(frame))
        pictures.append(thumbnail(frame))
        reference = next(references, None)
        for kind, picture in (("", frame), ("reference_", reference)):
            window = recent[kind]
            if picture is not None and index >= inputs - 1:  # a change needs a frame before it
                window.append(picture)
                if len(window) > 1:
                    values[f"{kind}motion"].append(motion(np.stack([*window][-2:])))
                if len(window) > 2:
                    values[f"{kind}flicker"].append(flicker(np.stack(window)))
        if index >= inputs and reference is not None:
            try:
                values["mse"].append(mse(frame, reference))
                values["ssim"].append(ssim(frame, reference))
            except ValueError as error:
                raise InputError(f"{task.path} beside {task.reference}: {error}") from None
    height, width = frame.shape[:2]
    if len(copies) < (needed := max(2, inputs + 1)):
        raise InputError(
            f"{task.path} has {len(copies)} frames, {inputs} of them input; give one "
            f"of {needed} or more{', or a smaller num_input_frames' if inputs else ''}"
        )
    means = {name: fmean(each) for name, each in values.items()}
    compared: dict[str, Any] = {}
    if task.reference is not None:
        if not values["mse"]:
            raise InputError(f"{task.reference} has no frame behind {inputs} input frames")
        compared = {
            "reference": str(task.reference),
            "compared_frames": len(values["mse"]),
            "psnr": decibels(means["mse"]),
            "ssim": means["ssim"],
            "reference_motion": means.get("reference_motion", 0.0),
            "reference_flicker": means.get("reference_flicker", 0.0),
        }
    score = Score(
        name=task.name,
        frames=len(copies),
        height=height,
        width=width,
        num_input_frames=inputs,
        failures=tuple(find_in_reduced(torch.cat(copies), inputs)),
        motion=means["motion"],
        flicker=means.get("flicker", 0.0),
        **compared,
    )
    picks = sorted({*spread(len(pictures)), *(failure.frame for failure in score.failures)})
    return score, {index: pictures[index] for index in picks}


def _frames(path: Path) -> Iterator[Frames]:
    for piece in stream_media(path, 8):
        yield from piece


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
