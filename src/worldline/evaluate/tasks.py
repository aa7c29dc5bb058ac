"""Videos of a folder that are to be judged, and their references; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.errors import InputError
from worldline.video.read import VIDEO_SUFFIXES, MediaInfo, probe

SSIM_WINDOW = 11  # pixels: the smallest side of a video that is compared
_REPORT_SUFFIXES = (".json", ".txt")  # of files beside a video: its report, its prompt
_LISTED_NAMES = 5  # most names in a line


@dataclass(frozen=True)
class Task:
    """One video to judge.

    Attributes:
        name: path below the folder.
        path: of the file.
        num_input_frames: number of input frames at its start, which are not judged.
        reference: the true video, if there is one.
        reference_name: path of `reference` below its own folder.
    """

    name: str
    path: Path
    num_input_frames: int
    reference: Path | None = None
    reference_name: str = ""


@dataclass(frozen=True)
class Listing:
    """Contents of a folder.

    Attributes:
        tasks: at least one, by name.
        unreadable: name of each video that cannot be read -> reason.
        notes: limits of the comparison, for a person.
        passed_over: names of files that are neither videos nor beside one.
    """

    tasks: tuple[Task, ...]
    unreadable: dict[str, str]
    notes: tuple[str, ...]
    passed_over: tuple[str, ...]


def find_tasks(
    folder: Path, reference: Path | None = None, num_input_frames: int | None = None
) -> Listing:
    """Find the videos of a folder and of those below it; each is opened.

    Args:
        folder: where they are.
        reference: folder with a video of the same name, of any suffix, for each to compare.
        num_input_frames: of each video; by default that of the JSON report beside it, else 0.

    Raises:
        InputError: there are no videos, none can be read, or some cannot be judged or compared;
            all of them are named.
    """
    videos, passed_over = _list_videos(folder, apart=reference)
    references = {} if reference is None else _match_references(videos, folder, reference)
    tasks: list[Task] = []
    unreadable: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name, path in videos.items():
        try:
            info = probe(path, kind="video")
        except InputError as error:
            unreadable[name] = str(error)
            continue
        inputs = _reported_input_frames(path) if num_input_frames is None else num_input_frames
        task = Task(name, path, inputs, *references.get(name, ()))
        if reference is not None and task.reference is None:
            notes.append(f"{name} has no reference: not compared")
        try:
            notes += _check(task, info)
        except InputError as error:
            problems.append(str(error))
        tasks.append(task)
    if problems or not tasks:
        problems += unreadable.values()
        count = f"{len(problems)} of {len(videos)} videos"
        raise InputError("\n  ".join([f"{folder}: {count} cannot be used", *problems]))
    return Listing(tuple(tasks), unreadable, tuple(notes), tuple(passed_over))


def shortened(names: Sequence[str]) -> str:
    """The first names in a line, and the number of the others."""
    more = len(names) - _LISTED_NAMES
    return ", ".join(names[:_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")


def _list_videos(folder: Path, apart: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Videos below a folder by name, and names of other files that are not beside one.

    Hidden files are left out, and those below `apart`, if that lies in the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    whole, inner = folder.resolve(), apart.resolve() if apart else None
    if inner == whole:
        raise InputError(f"{folder} is both the folder and its own reference")
    if inner is not None and whole not in inner.parents:
        inner = None
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
        and inner not in path.resolve().parents
    }
    videos = {
        name: path
        for name, path in files.items()
        # a preview is left behind by a killed run
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.stem.endswith(".preview")
    }
    beside = {path.with_suffix(suffix) for path in videos.values() for suffix in _REPORT_SUFFIXES}
    others = [name for name, path in files.items() if name not in videos and path not in beside]
    if not videos:
        contents = f", but {shortened(others)}" if others else ""
        outside = f" outside {apart}" if inner else ""
        raise InputError(
            f"{folder} holds no videos{outside} ({' '.join(VIDEO_SUFFIXES)}){contents}"
        )
    return videos, others


def _match_references(
    videos: dict[str, Path], folder: Path, reference: Path
) -> dict[str, tuple[Path, str]]:
    """Reference of each video, and its name: of the same suffix, else the only one of its stem."""
    names, _ = _list_videos(reference, apart=folder)
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(name.rpartition(".")[0], []).append(name)
    matched: dict[str, tuple[Path, str]] = {}
    for name in videos:
        fitting = [name] if name in names else by_stem.get(name.rpartition(".")[0], [])
        if len(fitting) > 1:
            raise InputError(f"{name} has several references: {', '.join(fitting)}")
        if fitting:
            matched[name] = names[fitting[0]], fitting[0]
    if not matched:
        raise InputError(
            f"{reference} has no video of the name of one in {folder}: it has "
            f"{shortened(list(names))}; to compare are {shortened(list(videos))}"
        )
    return matched


def _reported_input_frames(path: Path) -> int:
    """Number of input frames in the report beside a video; 0 without such a report."""
    try:
        frames = json.loads(path.with_suffix(".json").read_text())["request"]["num_input_frames"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return max(0, frames) if type(frames) is int else 0


def _check(task: Task, info: MediaInfo) -> Iterator[str]:
    """Limits of the comparison; an InputError if it, or judging the video, is impossible."""
    check_length(task.path, info.frames, task.num_input_frames)
    if task.reference is None:
        return
    other = probe(task.reference, kind="video")
    if (info.height, info.width) != (other.height, other.width):
        raise InputError(
            f"{task.path} is {info.width} x {info.height}, but its reference {task.reference} "
            f"{other.width} x {other.height}"
        )
    if min(info.height, info.width) < SSIM_WINDOW:
        raise InputError(
            f"{task.path} is {info.width} x {info.height}; a comparison needs {SSIM_WINDOW} x "
            f"{SSIM_WINDOW}"
        )
    check_length(task.reference, other.frames, task.num_input_frames, least=1)
    if info.frames != other.frames:
        yield (
            f"{task.path} has {info.frames} frames, its reference {other.frames}: the first "
            f"{min(info.frames, other.frames)} are compared"
        )


def check_length(path: Path, frames: int, num_input_frames: int, least: int = 2) -> None:
    needed = max(least, num_input_frames + 1)
    if frames < needed:
        raise InputError(
            f"{path} has {frames} frames, {num_input_frames} of them input; at least {needed} are "
            "needed"
        )
