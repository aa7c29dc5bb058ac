"""What there is to judge in a folder, and with what it is compared; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.errors import InputError
from worldline.video.read import VIDEO_SUFFIXES, MediaInfo, probe

# of the files beside a video: its report, its prompt
_BESIDE = (".json", ".txt")
SSIM_WINDOW = 11  # of `worldline.evaluate.metrics`, so the least side that is compared
_SHOWN = 5  # most names that a line holds


@dataclass(frozen=True)
class Task:
    """One video to judge.

    Attributes:
        name: path below the folder.
        path: the file.
        num_input_frames: how many frames at its start are given; 0 for none.
        reference: the video it is compared with; None for none.
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
        passed_over: names of the files that are neither videos nor beside one.
    """

    tasks: tuple[Task, ...]
    unreadable: dict[str, str]
    notes: tuple[str, ...]
    passed_over: tuple[str, ...]


def find_tasks(
    folder: Path, reference: Path | None = None, num_input_frames: int | None = None
) -> Plan:
    """Look for the videos of a folder and of those below it; all of them are opened.

    Args:
        folder: where they are.
        reference: holds a video of the same name below it, of any suffix, for each to compare.
        num_input_frames: frames that are given at the start of each; by default what the JSON
            report beside a video says, and 0 without one.

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
    untold: list[str] = []
    for name, path in videos.items():
        try:
            info = probe(path, kind="video")
        except InputError as error:
            unreadable[name] = str(error)
            continue
        given = num_input_frames
        if given is None:
            given = _told_input_frames(path)
            if given is None:
                untold.append(name)
                given = 0
        try:
            _check_judgeable(path, info, given)
            other = references.get(name)
            if other is None or reference is None:
                tasks.append(Task(name, path, given))
                if reference is not None:
                    notes.append(f"{name} has no reference: not compared")
                continue
            notes.extend(_check_comparable(path, info, given, other))
        except InputError as error:
            problems.append(str(error))
        else:
            tasks.append(Task(name, path, given, other, _name(other, reference)))
    if problems:
        problems += unreadable.values()
        raise InputError(_listed(f"{folder}: {len(problems)} of {len(videos)} videos", problems))
    if not tasks:
        raise InputError(_listed(f"{folder}: all {len(videos)} videos", list(unreadable.values())))
    if len(untold) < len(tasks) and untold:  # else a folder of plain videos, as it should be
        them = "it" if len(untold) == 1 else "them"
        notes.append(f"without a report, so no frame of {them} is given: {shortened(untold)}")
    return Plan(tuple(tasks), unreadable, tuple(notes), passed_over)


def shortened(names: Sequence[str]) -> str:
    """Return a line of the first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _videos(folder: Path, apart: Path | None = None) -> tuple[dict[str, Path], tuple[str, ...]]:
    """List the videos below a folder by name, and other files that are not beside one.

    Hidden files are left out, and those below `apart` where that lies in the folder.

    Raises:
        InputError: there is no such folder, or no video in it.
    """
    try:
        if not folder.is_dir():
            missing = "is not a folder" if folder.exists() else "no such folder"
            raise InputError(f"{folder}{' ' if folder.exists() else ': '}{missing}")
        whole, part = folder.resolve(), apart.resolve() if apart else None
        if part == whole:
            raise InputError(f"{folder} is both the folder and its own reference")
        if part is not None and whole not in part.parents:
            part = None
        files = {
            _name(path, folder): path
            for path in sorted(folder.rglob("*"))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and not path.is_dir()
            and part not in path.resolve().parents
        }
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be read: {reason}") from None
    videos = {name: path for name, path in files.items() if _is_video(path)}
    beside = {path.with_suffix(suffix) for path in videos.values() for suffix in _BESIDE}
    others = [name for name, path in files.items() if name not in videos and path not in beside]
    if not videos:
        held = f", but {shortened(others)}" if others else ""
        outside = f" outside {apart}" if part else ""
        raise InputError(f"{folder} holds no videos{outside} ({' '.join(VIDEO_SUFFIXES)}){held}")
    return videos, tuple(others)


def _is_video(path: Path) -> bool:
    """Tell by its name; an early look, which a killed run may leave, is none."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.stem.endswith(".preview")


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _references(videos: dict[str, Path], folder: Path, reference: Path) -> dict[str, Path]:
    """Find the reference of each video by its name, in doubt the one of the same suffix.

    Raises:
        InputError: none fits, or a video has several of other suffixes.
    """
    have, _ = _videos(reference, apart=folder)
    by_stem: dict[str, list[str]] = {}
    for name in have:
        by_stem.setdefault(_stem(name), []).append(name)
    matched: dict[str, Path] = {}
    problems: list[str] = []
    for name in videos:
        fitting = by_stem.get(_stem(name), [])
        if name in have:
            matched[name] = have[name]
        elif len(fitting) > 1:
            problems.append(f"{name} has several references: {', '.join(fitting)}")
        elif fitting:
            matched[name] = have[fitting[0]]
    if problems:
        raise InputError(_listed(f"{folder}: {len(problems)} of {len(videos)} videos", problems))
    if not matched:
        raise InputError(
            f"{reference} has no video of the name of one in {folder}: it has "
            f"{', '.join(list(have)[:3])}, to be compared are {', '.join(list(videos)[:3])}"
        )
    return matched


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _told_input_frames(path: Path) -> int | None:
    """Return what the report beside a video says; None where there is no such report."""
    try:
        told = json.loads(path.with_suffix(".json").read_text())["request"]["num_input_frames"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return told if type(told) is int and told >= 0 else None


def _check_judgeable(path: Path, info: MediaInfo, given: int) -> None:
    if info.frames <= max(1, given):
        raise InputError(too_short(path, info.frames, given))


def too_short(path: Path, frames: int, given: int) -> str:
    have = f"{frames} frame{'' if frames == 1 else 's'}"
    if not given:
        return f"{path} has {have}; at least 2 are needed to judge a video"
    return f"{path} has {have}, but {given} are given: none is left to judge"


def _check_comparable(path: Path, info: MediaInfo, given: int, other: Path) -> Iterator[str]:
    """Yield what a person should know of the comparison.

    Raises:
        InputError: the reference cannot be read or is of another size, or no frame is left.
    """
    found = probe(other, kind="video")
    if (info.height, info.width) != (found.height, found.width):
        raise InputError(
            f"{path} is {info.width} x {info.height}, but its reference {other} "
            f"{found.width} x {found.height}"
        )
    if min(info.height, info.width) < SSIM_WINDOW:
        raise InputError(
            f"{path} is {info.width} x {info.height}; to compare, {SSIM_WINDOW} x {SSIM_WINDOW} "
            "are needed"
        )
    if found.frames <= given:
        raise InputError(too_short(other, found.frames, given))
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


def _listed(subject: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{subject} cannot be used" + "".join(f"\n  {problem}" for problem in problems)
