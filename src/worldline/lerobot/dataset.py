"""Data sets: which episodes of which camera are taken, and where their frames are."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldline.documents import read_json
from worldline.errors import InputError, brief, did_you_mean
from worldline.files import DATASET
from worldline.lerobot.choice import Choice, parse_choice
from worldline.lerobot.episodes import (
    Episode,
    Videos,
    as_number,
    as_whole,
    read_lines,
    read_parquet,
)

if TYPE_CHECKING:
    from worldline.video.span import Span, Timeline

logger = logging.getLogger(__name__)

_THREADS = 16  # files wait for the disk more than for the processor


@dataclass(frozen=True)
class DataSet:
    """A data set whose description is read; videos are not.

    Attributes:
        choice: what is taken of it.
        fps: frames a second.
        rows: descriptions of episodes, by their numbers, or why one cannot be used.
    """

    choice: Choice
    fps: float
    rows: Mapping[int, Episode | InputError]

    def place(self, index: int) -> str:
        """An episode in words, for messages."""
        return f"{self.choice.folder} episode {index}"

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files that describe it."""
        return (self.choice.folder / "meta" / "info.json",)

    def spans(self) -> Iterator[tuple[int, tuple[Episode, Span | None] | InputError]]:
        """Number of each episode with its description and frames, or why it cannot be used.

        All files are measured before; frames are None where no camera was asked for.
        """
        from worldline.video.span import open_timeline

        def measure(file: Path) -> Timeline | InputError:
            try:
                return open_timeline(file)
            except InputError as error:
                return error

        episodes = [row for row in self.rows.values() if isinstance(row, Episode)]
        files = [*dict.fromkeys(row.file for row in episodes if row.file)]
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:  # of pictures
            timelines = dict(zip(files, pool.map(measure, files), strict=True))
        for index, row in self.rows.items():
            try:
                if isinstance(row, InputError):
                    raise row
                span = self._span(row, timelines[row.file]) if row.file else None
                yield index, (row, span)
            except InputError as error:
                yield index, InputError(f"{self.place(index)}: {error}")

    def _span(self, episode: Episode, timeline: Timeline | InputError) -> Span:
        from worldline.video.span import Span

        if isinstance(timeline, InputError):
            raise timeline
        choice = self.choice
        numbers = timeline.numbers(episode.begin, episode.length, self.fps)
        numbers = numbers[choice.start :: choice.stride]
        if not numbers:
            raise InputError(
                f"it has {episode.length:,} frames, start is {choice.start:,}; give an earlier one"
            )
        fps = self.fps / choice.stride
        return Span(timeline, f"episode {episode.index}", numbers, fps, choice.frames)


def open_dataset(name: str, *, videos: bool = True) -> DataSet:
    """The data set of a name, with the episodes that are asked for.

    Args:
        name: with its parameters, see `parse_choice`.
        videos: whether a camera is needed; else tasks are enough.

    Raises:
        InputError: it is none, of another version, damaged, or has no such camera or episodes.
    """
    choice = parse_choice(str(name))
    path = choice.folder / "meta" / "info.json"
    if not choice.folder.is_dir():
        kind = "not a folder" if choice.folder.exists() else "no such folder"
        raise InputError(f"{choice.folder}: {kind}; give the folder of a data set on this machine")
    if not path.exists():
        raise InputError(f"{path}: no such file; give the folder of a LeRobot data set")
    info = read_json(path)
    version = info.get("codebase_version")
    if not isinstance(version, str) or not re.match(r"v?(2\.[01]|3\.\d+)(\D|$)", version):
        stated = f"is {brief(version, 40)}" if version is not None else "is absent"
        raise InputError(
            f"{path}: codebase_version {stated}; give a data set of v2.0, v2.1 or v3.0"
        )
    fps = as_number(info.get("fps"))
    if not fps or not 0 < fps <= 10_000:
        raise InputError(
            f"{path}: fps is {brief(info.get('fps'), 40)}; it must be a number above 0"
        )
    camera = _camera(path, info, choice) if videos else None
    third = version.removeprefix("v").startswith("3")
    read = read_parquet if third else read_lines
    files = Videos(path, choice.folder, info, camera, fps, third)
    rows: dict[int, Episode | InputError] = {}
    known: set[int] = set()
    for where, row in read(choice.folder, camera):
        index = as_whole(row.get("episode_index"))
        if index is None:
            value = brief(row.get("episode_index"), 40)
            raise InputError(f"{where}: episode_index is {value}; it must be a whole number")
        if index in known:
            raise InputError(f"{where}: episode {index} stands there twice; give each once")
        known.add(index)
        if choice.takes(index):
            try:
                rows[index] = files.episode(index, row)
            except InputError as error:
                rows[index] = InputError(f"{error} ({where.name})")
    _check_known(path, info, choice, known)
    return DataSet(replace(choice, camera=camera), fps, dict(sorted(rows.items())))


def _check_known(path: Path, info: Mapping[str, Any], choice: Choice, known: set[int]) -> None:
    """Refuse a choice of episodes that a data set lacks; warn of one that is incomplete."""
    if not known:
        raise InputError(f"{path.parent}: it lists no episodes; give a data set with some")
    for low, high in choice.episodes:
        if high > max(known) or known.isdisjoint(range(low, high + 1)):
            asked = f"{low}-{high}" if low < high else str(low)
            raise InputError(
                f"{path.parent}: it has no episodes {asked}; its {len(known):,} are "
                f"{min(known)} to {max(known)}"
            )
    total = as_whole(info.get("total_episodes"))
    if total is not None and total != len(known):
        logger.warning(
            "%s: it lists %d episodes, total_episodes is %d: perhaps files are missing",
            *(path.parent, len(known), total),
        )


def _camera(path: Path, info: Mapping[str, Any], choice: Choice) -> str:
    """The camera of a choice, or the only one."""
    features = info.get("features")
    if not isinstance(features, dict):
        raise InputError(f"{path}: features is {brief(features, 40)}; it must be an object")
    kinds = {n: f.get("dtype") for n, f in features.items() if isinstance(f, dict)}
    cameras = [name for name, kind in kinds.items() if kind == "video"]
    pictures = [name for name, kind in kinds.items() if kind == "image"]
    camera, listed = choice.camera, ", ".join(cameras)
    if camera in pictures or (camera is None and pictures and not cameras):
        names = camera or ", ".join(pictures)
        instead = f"give one of {listed}" if cameras else "give a data set with videos"
        raise InputError(f"{path}: {names} is of pictures (dtype image), not of videos; {instead}")
    if not cameras:
        raise InputError(f"{path}: none of its features is a video; give a data set with videos")
    if camera is None:
        several = [name for name in cameras if not _is_depth(features[name])] or cameras
        if len(several) > 1:
            raise InputError(
                f"{path}: it has {len(several)} cameras; give {DATASET}{choice.folder}#camera=NAME "
                f"of {', '.join(several)}"
            )
        return several[0]
    if camera not in cameras:
        ends = [name for name in cameras if name.endswith(f".{camera}")]
        near = did_you_mean(ends[0] if ends else camera, cameras, 0.6)
        raise InputError(f"{path}: no camera {brief(camera)} among {listed}{near}")
    return camera


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera's pixels are distances."""
    infos = (feature.get(name) for name in ("info", "video_info"))
    return any(
        info.get("is_depth_map") or info.get("video.is_depth_map")
        for info in infos
        if isinstance(info, dict)
    )
