"""Videos of a folder: which files count, how many frames they have, which cannot be used."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import av

from worldline.documents import read_json
from worldline.errors import CheckpointError, InputError, one_line, strerror
from worldline.files import refuse_dataset, replacing
from worldline.lerobot.dataset import open_dataset
from worldline.video.read import VIDEO_SUFFIXES, probe_times
from worldline.video.span import Span, Steps, steps_of, times_of

log = logging.getLogger(__name__)

MOST_NAMED = 10  # problems that have lines of their own
_RECIPE = [2, av.__version__]  # of measurements that are stored
_END = 1 << 16  # bytes
_THREADS = 32  # files wait for the disk more than for the processor


@dataclass(frozen=True)
class Video:
    """A video and its measurements, as of `probe`.

    Attributes:
        path: file; of an episode, its name below the file that holds it.
        stamp: size in bytes and time of modification in ns, of what was measured.
        fps: frames a second; 0 if unknown.
        steps: differences between the times of frames, ticks, each with its number of repeats; from
            0 on.
        digest: as of `ends_digest`.
        numbers: frames of the file, where the video is an episode in it.
    """

    path: Path
    stamp: tuple[int, int]
    frames: int
    height: int
    width: int
    fps: float
    steps: Steps
    digest: str
    numbers: Sequence[int] | None = None

    @property
    def file(self) -> Path:
        """File that holds the frames."""
        return self.path if self.numbers is None else self.path.parent

    @property
    def times(self) -> list[int]:
        """When frames are displayed, ticks; empty where the file leaves it open."""
        return times_of(self.steps)


def list_videos(folder: Path, *, released: bool = False) -> list[Path]:
    """Files of a folder that are named like videos, by path; or the one file that is given.

    Args:
        folder: if it has a folder `videos`, as released layouts have, the files are those in there.
        released: the rule of the released trainers: `*.mp4` in `folder` itself, in small letters.

    Raises:
        InputError: there are none.
    """
    if folder.is_file():
        return [folder]
    refuse_dataset(folder)
    inner = folder / "videos"
    place = inner if inner.is_dir() and not released else folder
    suffixes = (".mp4",) if released else VIDEO_SUFFIXES
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        raise InputError(f"{place}: {strerror(error).lower()}; give a folder of videos") from None
    if not released:  # macOS writes a hidden file beside each
        names = [name for name in names if not name.startswith(".")]
    paths = [place / n for n in names if (n if released else n.lower()).endswith(suffixes)]
    if not paths:
        raise InputError(
            f"{place} holds no videos ({' '.join(suffixes)}) among {len(names)} files; give a "
            "folder of videos"
        )
    return paths


def ends_digest(path: Path) -> str:
    """Hash of a file's size and its first and last 64 KB, cheap for a folder of many."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        sha = hashlib.sha256(str(size).encode())
        for start in (0, max(0, size - _END)):
            file.seek(start)
            sha.update(file.read(_END))
    return sha.hexdigest()[:16]


def measure(paths: Collection[Path], store: Path | None = None) -> dict[Path, Video | InputError]:
    """Measurements of files, or why one has none; packets are counted, one frame is decoded.

    Args:
        paths: of the files.
        store: JSON file of measurements from run to run; those of a file hold for its size and time
            of modification. One that is damaged, or cannot be written, is no error.
    """
    stored: Mapping[str, Sequence[object]] = {}
    if store:
        with suppress(CheckpointError):
            document = read_json(store)
            stored = document["videos"] if document.get("recipe") == _RECIPE else {}

    def one(path: Path) -> Video | InputError:
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            size, modified, *fields = stored.get(str(path.absolute()), (0, 0))
            if (size, modified) == stamp:
                return Video(path, stamp, *fields)  # type: ignore[arg-type]
            info, times = probe_times(path)
            digest = ends_digest(path)
        except InputError as error:
            return error
        except OSError as error:
            return InputError(f"{path}: {strerror(error).lower()}")
        if info.kind == "image":
            return InputError(f"{path} is a picture")
        facts = info.frames, info.height, info.width, info.fps, steps_of(times)
        return Video(path, stamp, *facts, digest)

    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:  # whose race for filters
        videos = dict(zip(paths, pool.map(one, paths), strict=True))
    entries = {
        str(path.absolute()): [*v.stamp, v.frames, v.height, v.width, v.fps, v.steps, v.digest]
        for path, v in videos.items()
        if isinstance(v, Video)
    }
    if store and entries != {name: stored.get(name) for name in entries}:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            with replacing(store) as file:
                file.write_text(json.dumps({"recipe": _RECIPE, "videos": {**stored, **entries}}))
        except OSError as error:
            log.info("measurements of videos are not stored: %s", one_line(error))
    return videos


def measure_episodes(name: str) -> tuple[dict[Path, Video | InputError], dict[Path, str]]:
    """Measurements of the episodes of a data set, or why one has none, and their tasks.

    Args:
        name: as of `worldline.lerobot.dataset.open_dataset`.

    Raises:
        InputError: as of `open_dataset`.
    """
    dataset = open_dataset(name)
    videos, tasks = dict[Path, Video | InputError](), dict[Path, str]()
    for index, found in dataset.spans():
        if isinstance(found, InputError):
            videos[dataset.choice.folder / str(index)] = found
            continue
        episode, span = found
        assert span
        path = span.path / episode.name
        videos[path], tasks[path] = _episode(path, span), episode.task
    return videos, tasks


def _episode(path: Path, span: Span) -> Video | InputError:
    """An episode as a video."""
    info, numbers = span.timeline.info, span.numbers[: span.head]
    try:
        status, content = span.path.stat(), ends_digest(span.path)
    except OSError as error:
        return InputError(f"{span}: {strerror(error).lower()}")
    digest = hashlib.sha256(json.dumps([content, span.identity]).encode()).hexdigest()[:16]
    stamp = status.st_size, status.st_mtime_ns
    size = len(numbers), info.height, info.width, span.fps
    return Video(path, stamp, *size, span.timeline.steps, digest, numbers)
