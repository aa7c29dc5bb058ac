"""Videos of a folder, judged and compared with references, for `worldline evaluate`.

A video is read once, frame by frame. Only small copies of its frames are kept, so that neither size
nor length fills the memory.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from worldline.documents import read_json
from worldline.errors import CheckpointError, InputError
from worldline.evaluate.failures import Failure, failure_rate, find_in_reduced, one_thread, reduce
from worldline.evaluate.metrics import decibels, flicker, motion, mse, ssim
from worldline.video.read import Frames, kind_in_folder, stream_media
from worldline.video.sheet import spread, thumbnail

_MEASURES = ("motion", "flicker", "psnr", "ssim", "reference_motion", "reference_flicker")


@dataclass(frozen=True)
class Task:
    """One video to judge."""

    name: str  # path below the folder
    path: Path
    num_input_frames: int  # at its start, not judged
    reference: Path | None = None  # the true video


@dataclass(frozen=True)
class Score:
    """Failures and measures of one video; what needs a true video is None without one."""

    name: str  # path below the folder
    frames: int
    height: int
    width: int
    num_input_frames: int  # at its start, neither judged nor compared
    failures: tuple[Failure, ...]
    motion: float | None  # mean absolute change between frames, grey levels, from the last input on
    flicker: float | None  # half the mean absolute second difference in time, from the same on
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
    references = {} if reference is None else _list_videos(reference, apart=folder)
    tasks = []
    for name, path in videos.items():
        stem = name.rpartition(".")[0]
        matches = [other for other in references if other.rpartition(".")[0] == stem]
        if name in matches:
            matches = [name]
        if len(matches) > 1:
            raise InputError(f"{name} has several references: {', '.join(matches)}")
        count = _reported_input_frames(path) if num_input_frames is None else num_input_frames
        tasks.append(Task(name, path, count, references[matches[0]] if matches else None))
    if reference and not any(task.reference for task in tasks):
        raise InputError(f"{reference} has no video of the name of one in {folder}")
    return tasks


def _list_videos(folder: Path, apart: Path | None) -> dict[str, Path]:
    """Videos below a folder by name, without hidden ones and those below `apart`."""
    whole, inner = folder.resolve(), apart.resolve() if apart else None
    videos = {}
    if not folder.is_dir():
        wrong = "it is a file; give a folder" if folder.exists() else "no such file or folder"
        raise InputError(f"{folder} holds no videos: {wrong}")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = "/." in f"/{name}" or path.stem.endswith(".preview")  # of a killed run
        if hidden or path.is_dir() or kind_in_folder(path) != "video":
            continue
        if inner is None or inner in whole.parents or inner not in path.resolve().parents:
            videos[name] = path
    if not videos:
        outside = f" outside {apart}" if apart else ""
        raise InputError(f"{folder} holds no videos (judged by contents){outside}")
    return videos


def _reported_input_frames(path: Path) -> int:
    """Number of input frames in the report beside a video; 0 without such a report."""
    with suppress(CheckpointError, KeyError, TypeError):
        return max(0, read_json(path.with_suffix(".json"))["request"]["num_input_frames"])
    return 0


def _frames(path: Path | None) -> Iterator[Frames]:
    return chain.from_iterable(stream_media(path, 1) if path else ())


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
    references = chain(_frames(task.reference), repeat(None))
    for index, (frame, reference) in enumerate(zip(_frames(task.path), references, strict=False)):
        copies.append(reduce(frame))
        pictures.append(thumbnail(frame))
        for kind, picture in (("", frame), ("reference_", reference)):
            if picture is not None and index >= inputs - 1:  # a change needs a frame before it
                recent[kind].append(picture)
                window = np.stack(recent[kind])
                values[f"{kind}motion"] += [motion(window[-2:])] * (len(window) > 1)
                values[f"{kind}flicker"] += [flicker(window)] * (len(window) > 2)
        if index >= inputs and reference is not None:
            try:
                values["psnr"].append(mse(frame, reference))
                values["ssim"].append(ssim(frame, reference))
            except ValueError as error:
                raise InputError(f"{task.path} beside {task.reference}: {error}") from None
    if len(copies) <= inputs:
        raise InputError(
            f"{task.path} has {len(copies)} frames, {inputs} of them input; {inputs + 1} are needed"
        )
    measures: dict[str, Any] = {
        name: fmean(each) if each else None for name, each in values.items()
    }
    if task.reference is not None:
        if not values["psnr"]:
            raise InputError(f"{task.reference} has no frame behind {inputs} input frames")
        measures["psnr"] = decibels(measures["psnr"])
        measures |= {"reference": str(task.reference), "compared_frames": len(values["psnr"])}
    failures = tuple(find_in_reduced(torch.cat(copies), inputs))
    height, width, _ = frame.shape
    score = Score(task.name, len(copies), height, width, inputs, failures, **measures)
    picks = {*spread(len(pictures)), *(failure.frame for failure in failures)}
    return score, {index: pictures[index] for index in sorted(picks)}


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
    return {
        name: (round(x, 4) if isfinite(x) else None) if isinstance(x, float) else x
        for name, x in values.items()
    }
