"""LeRobot data sets, v2.0, v2.1 and v3.0: episodes of one camera, and their tasks; needs no torch.

Source of the layouts: huggingface/lerobot `src/lerobot/datasets/utils.py` and `dataset_metadata.py`
at 7427f31, and of v2.1 the constants that they keep for conversion. A data set is named
`lerobot:FOLDER#camera=NAME&episodes=0-9,12&start=0&stride=2&frames=9`.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from worldline.documents import parse_json, read_json, read_text
from worldline.errors import InputError, brief, did_you_mean, strerror
from worldline.files import check_path, disguise

if TYPE_CHECKING:
    from worldline.video.span import Span, Timeline

logger = logging.getLogger(__name__)

PREFIX = "lerobot:"
_NUMBERS = {"start": 0, "stride": 1, "frames": 1}  # parameter -> its least value
_PARAMETERS = ("camera", "episodes", *_NUMBERS)
_LARGEST = 10**9  # frame, stride or episode
_THREADS = 16  # files wait for the disk more than for the processor
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")  # of the name of a file


def is_dataset(name: object) -> bool:
    """Whether a name is that of a data set, not of a file or a folder."""
    return str(name).startswith(PREFIX)


@dataclass(frozen=True)
class Choice:
    """What is taken of a data set.

    Attributes:
        folder: that holds `meta` and `videos`.
        camera: feature; None where there is one.
        episodes: first and last number of ranges; empty for all.
        start: frame of an episode with which it begins.
        stride: frames from one to the next that is taken.
        frames: number of these, from the first on; None for all.
    """

    folder: Path
    camera: str | None = None
    episodes: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stride: int = 1
    frames: int | None = None

    def takes(self, episode: int) -> bool:
        """Whether an episode is asked for."""
        return not self.episodes or any(low <= episode <= high for low, high in self.episodes)


def parse_choice(name: str) -> Choice:
    """The choice that a name describes.

    Raises:
        InputError: it is of no folder, or has an unknown or wrong parameter.
    """
    words = name.removeprefix(PREFIX)
    place, _, parameters = words.rpartition("#") if "#" in words else (words, "", "")
    if Path(words).is_dir():  # with # in its own name
        place, parameters = words, ""
    if not place.strip():
        raise InputError(f"{name}: it names no folder; give {PREFIX}FOLDER#camera=NAME")
    folder = Path(check_path(place)).expanduser()
    stated: dict[str, str] = {}
    for pair in filter(None, parameters.split("&")):
        key, equals, value = pair.partition("=")
        if key not in _PARAMETERS:
            near = did_you_mean(key, _PARAMETERS, 0.5)
            known = near or f"; give {', '.join(_PARAMETERS)}"
            raise InputError(f"{name}: {key!r:.40} is no parameter of a data set{known}")
        if key in stated:
            raise InputError(f"{name}: {key} stands there twice; give it once")
        if not equals or not value.strip():
            raise InputError(f"{name}: {key} has no value; give {key}=VALUE")
        stated[key] = unquote(value).strip()

    def number(key: str, least: int) -> int:
        text = stated[key]
        if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not least <= int(text) <= _LARGEST:
            raise InputError(
                f"{name}: {key} is {brief(text, 40)}; give a whole number, {least} at least"
            )
        return int(text)

    numbers = {key: number(key, least) for key, least in _NUMBERS.items() if key in stated}
    episodes = _ranges(name, stated["episodes"]) if "episodes" in stated else ()
    return Choice(folder, stated.get("camera"), episodes, **numbers)


def _ranges(name: str, text: str) -> tuple[tuple[int, int], ...]:
    """First and last numbers of ranges such as 0-9,12."""
    ranges = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9}))?\s*", piece, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise InputError(
                f"{name}: episodes has {brief(piece, 40)}; give numbers such as 0-9,12"
            )
        ranges.append((low, high))
    return tuple(ranges)


@dataclass(frozen=True)
class Episode:
    """One episode, as the data set describes it.

    Attributes:
        index: its number.
        length: frames.
        task: what the robot does, in words; "" where the data set has none.
        file: video of the camera; None where no camera was asked for.
        begin: seconds from the start of the file.
    """

    index: int
    length: int
    task: str
    file: Path | None
    begin: float

    @property
    def name(self) -> str:
        """Name of its files, as v2.1 has it."""
        return f"episode_{self.index:06d}"


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
    fps = _number(info.get("fps"))
    if not fps or not 0 < fps <= 10_000:
        raise InputError(
            f"{path}: fps is {brief(info.get('fps'), 40)}; it must be a number above 0"
        )
    camera = _camera(path, info, choice) if videos else None
    third = version.removeprefix("v").startswith("3")
    read = _read_parquet if third else _read_lines
    files = _Files(path, choice.folder, info, camera, fps, third)
    rows: dict[int, Episode | InputError] = {}
    known: set[int] = set()
    for where, row in read(choice.folder, camera):
        index = _whole(row.get("episode_index"))
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
    total = _whole(info.get("total_episodes"))
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
                f"{path}: it has {len(several)} cameras; give {PREFIX}{choice.folder}#camera=NAME "
                f"of {', '.join(several)}"
            )
        return several[0]
    if camera not in cameras:
        near = did_you_mean(camera, cameras, 0.6)
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


def _read_lines(folder: Path, camera: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """File and fields of each episode of v2; numbers of tasks become their words."""
    path, tasks = folder / "meta" / "episodes.jsonl", dict[Any, Any]()
    if (named := folder / "meta" / "tasks.jsonl").exists():
        tasks = {row.get("task_index"): row.get("task") for row in _entries(named)}
    for row in _entries(path):
        stated = row.get("tasks")
        if isinstance(stated, list):
            words = [tasks.get(n, n) if isinstance(n, int) else n for n in stated]
            row = {**row, "tasks": words}
        yield path, row


def _entries(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, of which there may be many."""
    rows, where = list[dict[str, Any]](), str(path)
    try:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            where = f"{path}, line {number}"
            if line.strip():
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
                rows.append(row)
    except OSError as error:
        raise InputError(f"{path}: {strerror(error).lower()}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}; the data set is damaged") from None
    return rows


def _read_parquet(folder: Path, camera: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """File and fields of each episode of v3."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f'{folder}: a data set of v3.0 needs pyarrow; pip install "worldline[lerobot]"'
        ) from None
    place = folder / "meta" / "episodes"
    paths = sorted(place.glob("*/*.parquet"))
    if not paths:
        raise InputError(f"{place}: no chunk-*/file-*.parquet in it; the data set is incomplete")
    wanted = ["episode_index", "length", "tasks"]
    of_camera = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    wanted += [f"videos/{camera}/{name}" for name in of_camera if camera]
    for path in paths:
        try:
            with ParquetFile(path) as file:
                names = file.schema_arrow.names
                columns = [name for name in wanted if name in names]
                rows = file.read(columns=columns, use_threads=False).to_pylist()
        except (ArrowException, OSError, ValueError) as error:
            reason = (strerror(error).splitlines() or [""])[0][:200]
            raise InputError(f"{path} is no whole parquet file{_page(path)}: {reason}") from None
        yield from ((path, row) for row in rows)


def _page(path: Path) -> str:
    """What stands in the place of a file, in words."""
    try:
        with path.open("rb") as file:
            page = disguise(file.read(64))
    except OSError:
        page = ""
    return f", but a {page}" if page else ""


@dataclass(frozen=True)
class _Files:
    """Where the videos of a data set lie.

    Attributes:
        path: of info.json.
        third: whether it is of v3, where a file has several episodes.
    """

    path: Path
    folder: Path
    info: Mapping[str, Any]
    camera: str | None
    fps: float
    third: bool

    def episode(self, index: int, row: Mapping[str, Any]) -> Episode:
        """An episode of its fields.

        Raises:
            InputError: one is absent or wrong.
        """
        length = _whole(row.get("length"))
        if not length or length > _LARGEST:
            raise InputError(f"length is {brief(row.get('length'), 40)}; it has no frames")
        task, begin, file = _task(row.get("tasks")), 0.0, None
        if self.camera is not None:
            numbers = {"episode_index": index}
            if self.third:  # the numbers of its data file, beside these, are others
                field = f"videos/{self.camera}/"
                for name in ("chunk_index", "file_index"):
                    number = _whole(value := row.get(f"{field}{name}"))
                    if number is None:
                        raise InputError(f"{field}{name} is {brief(value, 40)}; it has no video")
                    numbers[name] = number
                start = _number(value := row.get(f"{field}from_timestamp"))
                if start is None or start < 0:
                    raise InputError(
                        f"{field}from_timestamp is {brief(value, 40)}; it must be seconds"
                    )
                begin = start
                end = _number(row.get(f"{field}to_timestamp"))
                # of some the end is when their last frame begins
                if end is not None and (end - begin) * self.fps < length - 1.5:
                    raise InputError(
                        f"length is {length:,}, but {field}from_timestamp and to_timestamp are "
                        f"{begin:.3f} and {end:.3f} s, {(end - begin) * self.fps:.0f} frames"
                    )
            else:
                size = _whole(stated := self.info.get("chunks_size", 1000))
                if not size:
                    value = brief(stated, 40)
                    raise InputError(f"chunks_size of {self.path} is {value}; it must be above 0")
                numbers["episode_chunk"] = index // size
            file = self.folder / self._name(numbers)
        return Episode(index, length, task, file, begin)

    def _name(self, numbers: Mapping[str, int]) -> str:
        """Name of a video by the pattern `video_path`."""
        pattern = self.info.get("video_path")
        if not isinstance(pattern, str):
            raise InputError(f"video_path of {self.path} is {brief(pattern, 40)}; give a pattern")
        values: dict[str, Any] = {**numbers, "video_key": self.camera}

        def value(match: re.Match[str]) -> str:
            found = values[match[1]]
            return f"{found:0{int(match[2])}d}" if match[2] and match[1] in numbers else str(found)

        try:
            name: str = check_path(_FIELD.sub(value, pattern))
            if re.search(r"[{}]", name) or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError
        except (KeyError, ValueError):
            raise InputError(
                f"video_path of {self.path} is {brief(pattern)}; it must be a pattern of "
                f"{', '.join(values)}"
            ) from None
        return name


def _task(stated: Any) -> str:
    """Words of an episode's tasks; several, which have no order, are joined."""
    tasks: Sequence[Any] = stated if isinstance(stated, list) else [stated]
    words = [" ".join(task.split()) for task in tasks if isinstance(task, str)]
    return "; ".join(dict.fromkeys(filter(None, words)))


def _whole(value: Any) -> int | None:
    """A number of 0 or above, perhaps written as 3.0; None for all else."""
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def _number(value: Any) -> float | None:
    """A finite number, perhaps alone in a list; None for all else."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return None
    return float(value) if math.isfinite(value) else None
