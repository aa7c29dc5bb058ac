"""The videos of a folder to judge, and their references; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.errors import InputError
from worldline.video.read import VIDEO_SUFFIXES, MediaInfo, probe

SSIM_WINDOW = 11  # of `worldline.evaluate.metrics`, so the least side that is compared
_BESIDE = (".json", ".txt")  # files beside a video: its report, its prompt
_MOST_NAMES = 5  # in a line


@dataclass(frozen=True)
class Task:
    """One video to judge.

    Attributes:
        name: path below the folder.
        path: the file.
        num_input_frames: conditioning frames at its start.
        reference: the video it is compared with, if any.
        reference_name: path of that below its own folder.
    """

    name: str
    path: Path
    num_input_frames: int
    reference: Path | None = None
    reference_name: str = ""


@dataclass(frozen=True)
class Plan:
    """What there is to do in a folder.

    Attributes:
        tasks: a video each, by name; at least one.
        unreadable: name of each video that cannot be read, and why.
        notes: what a person should know of the comparison.
        passed_over: names of files that are neither videos nor beside one.
    """

    tasks: tuple[Task, ...]
    unreadable: dict[str, str]
    notes: tuple[str, ...]
    passed_over: tuple[str, ...]


def find_tasks(
    folder: Path, reference: Path | None = None, num_input_frames: int | None = None
) -> Plan:
    """Find the videos of a folder and of those below it; all of them are opened.

    Args:
        folder: where they are.
        reference: folder with a video of the same name below it, of any suffix, for each to
            compare.
        num_input_frames: conditioning frames at the start of each; by default those in the JSON
            report beside a video, and 0 without one.

    Raises:
        InputError: there are no videos, none can be read, or some cannot be judged or compared;
            all of them are named.
    """
    if num_input_frames is not None and num_input_frames < 0:
        raise InputError(f"num_input_frames is {num_input_frames}; it must be 0 or more")
    videos, passed_over = _videos(folder, apart=reference)
    references = {} if reference is None else _references(videos, folder, reference)
    tasks: list[Task] = []
    unreadable: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    unreported: list[str] = []
    for name, path in videos.items():
        try:
            info = probe(path, kind="video")
        except InputError as error:
            unreadable[name] = str(error)
            continue
        count = num_input_frames
        if count is None and (count := _reported_input_frames(path)) is None:
            unreported.append(name)
            count = 0
        other = references.get(name)
        try:
            _refuse_short(path, info.frames, count)
            if other is not None and reference is not None:
                notes += _compare_sizes(path, info, count, other)
                tasks.append(Task(name, path, count, other, _name(other, reference)))
                continue
        except InputError as error:
            problems.append(str(error))
            continue
        tasks.append(Task(name, path, count))
        if reference is not None:
            notes.append(f"{name} has no reference: not compared")
    if problems:
        problems += unreadable.values()
        raise _refusal(f"{folder}: {len(problems)} of {len(videos)} videos", problems)
    if not tasks:
        raise _refusal(f"{folder}: all {len(videos)} videos", list(unreadable.values()))
    if 0 < len(unreported) < len(tasks):  # else a folder of plain videos, as it should be
        notes.append(f"no report, so 0 conditioning frames: {shortened(unreported)}")
    return Plan(tuple(tasks), unreadable, tuple(notes), passed_over)


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def too_short(path: Path, frames: int, num_input_frames: int) -> str:
    """Message about a video without enough frames to judge."""
    if not num_input_frames:
        return f"{path} has too few frames, {frames}; at least 2 are needed to judge a video"
    return f"{path} has {frames} frames and {num_input_frames} conditioning frames: none to judge"


def _videos(folder: Path, apart: Path | None) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Videos below a folder by name, and names of other files that are not beside one.

    Hidden files are left out, and those below `apart` where that lies in the folder.

    Raises:
        InputError: there is no such folder, or no video in it.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: {'is not a' if folder.exists() else 'no such'} folder")
        whole, part = folder.resolve(), apart.resolve() if apart else None
        if part == whole:
            raise InputError(f"{folder} is both the folder and its own reference")
        if part is not None and whole not in part.parents:
            part = None
        files = {
            _name(path, folder): path
            for path in sorted(folder.rglob("*"))
            if not any(word.startswith(".") for word in path.relative_to(folder).parts)
            and not path.is_dir()
            and part not in path.resolve().parents
        }
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be read: {reason}") from None
    videos = {
        name: path
        for name, path in files.items()
        # an early look, which a killed run may leave, is not judged
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.stem.endswith(".preview")
    }
    beside = {path.with_suffix(suffix) for path in videos.values() for suffix in _BESIDE}
    others = [name for name, path in files.items() if name not in videos and path not in beside]
    if not videos:
        outside = f" outside {apart}" if part else ""
        found = f", but {shortened(others)}" if others else ""
        raise InputError(f"{folder} holds no videos{outside} ({' '.join(VIDEO_SUFFIXES)}){found}")
    return videos, tuple(others)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _references(videos: dict[str, Path], folder: Path, reference: Path) -> dict[str, Path]:
    """The reference of each video by its name, in doubt the one of the same suffix.

    Raises:
        InputError: no video has one, or one has several of other suffixes.
    """
    have, _ = _videos(reference, apart=folder)
    by_stem: dict[str, list[str]] = {}
    for name in have:
        by_stem.setdefault(name.rpartition(".")[0], []).append(name)
    matched: dict[str, Path] = {}
    problems: list[str] = []
    for name in videos:
        names = [name] if name in have else by_stem.get(name.rpartition(".")[0], [])
        if len(names) > 1:
            problems.append(f"{name} has several references: {', '.join(names)}")
        elif names:
            matched[name] = have[names[0]]
    if problems:
        raise _refusal(f"{folder}: {len(problems)} of {len(videos)} videos", problems)
    if not matched:
        raise InputError(
            f"{reference} ({shortened(list(have))}) has no video of the name of one in {folder} "
            f"({shortened(list(videos))})"
        )
    return matched


def _reported_input_frames(path: Path) -> int | None:
    """Conditioning frames in the report beside a video; None without such a report."""
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        count = report["request"]["num_input_frames"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if type(count) is int and count >= 0 else None


def _refuse_short(path: Path, frames: int, num_input_frames: int) -> None:
    if frames <= max(1, num_input_frames):
        raise InputError(too_short(path, frames, num_input_frames))


def _compare_sizes(path: Path, info: MediaInfo, count: int, other: Path) -> Iterator[str]:
    """What a person should know of a comparison.

    Raises:
        InputError: the reference cannot be read, is of another size, too small or too short.
    """
    found = probe(other, kind="video")
    if (info.height, info.width) != (found.height, found.width):
        raise InputError(
            f"{path} is {info.width} x {info.height}, its reference {other} "
            f"{found.width} x {found.height}"
        )
    if min(info.height, info.width) < SSIM_WINDOW:
        raise InputError(
            f"{path} is {info.width} x {info.height}; a comparison needs {SSIM_WINDOW} x "
            f"{SSIM_WINDOW}"
        )
    if found.frames <= count:
        raise InputError(too_short(other, found.frames, count))
    if info.frames != found.frames:
        yield (
            f"{path} has {info.frames} frames, its reference {found.frames}: the first "
            f"{min(info.frames, found.frames)} are compared"
        )
    if info.fps and found.fps and not math.isclose(info.fps, found.fps, rel_tol=0.01):
        yield (
            f"{path} has {info.fps:g} frames a second, its reference {found.fps:g}: compared "
            "frame by frame all the same"
        )


def _refusal(subject: str, problems: Sequence[str]) -> InputError:
    if len(problems) == 1:
        return InputError(problems[0])
    lines = "".join(f"\n  {problem}" for problem in problems)
    return InputError(f"{subject} cannot be used{lines}")
