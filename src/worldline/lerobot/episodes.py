"""Episodes as a data set describes them: lines of JSON in v2, rows of parquet files in v3."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline.documents import parse_json, read_text
from worldline.errors import InputError, brief, strerror
from worldline.files import check_path, disguise

_LARGEST = 10**9  # frames of an episode
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")  # of the name of a file


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


def read_lines(folder: Path, camera: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """File and fields of each episode of v2; numbers of tasks become their words."""
    path, tasks = folder / "meta" / "episodes.jsonl", dict[Any, Any]()
    if (named := folder / "meta" / "tasks.jsonl").exists():
        tasks = {as_whole(row.get("task_index")): row.get("task") for row in _entries(named)}
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


def read_parquet(folder: Path, camera: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
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
class Videos:
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
        length = as_whole(row.get("length"))
        if not length or length > _LARGEST:
            raise InputError(f"length is {brief(row.get('length'), 40)}; it has no frames")
        task, begin, file = _task(row.get("tasks")), 0.0, None
        if self.camera is not None:
            numbers = {"episode_index": index}
            if self.third:  # the numbers of its data file, beside these, are others
                field = f"videos/{self.camera}/"
                for name in ("chunk_index", "file_index"):
                    number = as_whole(value := row.get(f"{field}{name}"))
                    if number is None:
                        raise InputError(f"{field}{name} is {brief(value, 40)}; it has no video")
                    numbers[name] = number
                start = as_number(value := row.get(f"{field}from_timestamp"))
                if start is None or start < 0:
                    raise InputError(
                        f"{field}from_timestamp is {brief(value, 40)}; it must be seconds"
                    )
                begin = start
                end = as_number(row.get(f"{field}to_timestamp"))
                # of some the end is when their last frame begins
                if end is not None and (end - begin) * self.fps < length - 1.5:
                    raise InputError(
                        f"length is {length:,}, but {field}from_timestamp and to_timestamp are "
                        f"{begin:.3f} and {end:.3f} s, {(end - begin) * self.fps:.0f} frames"
                    )
            else:
                size = as_whole(stated := self.info.get("chunks_size", 1000))
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


def as_whole(value: Any) -> int | None:
    """A number of 0 or above, perhaps written as 3.0; None for all else."""
    number = as_number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def as_number(value: Any) -> float | None:
    """A finite number, perhaps alone in a list; None for all else."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return None
    return float(value) if math.isfinite(value) else None
