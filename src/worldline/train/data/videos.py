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
from itertools import groupby
from pathlib import Path

import av
import numpy as np

from worldline.documents import read_json
from worldline.errors import CheckpointError, InputError, one_line, strerror
from worldline.files import replacing
from worldline.video.read import VIDEO_SUFFIXES, probe_times

log = logging.getLogger(__name__)

MOST_NAMED = 10  # problems that have lines of their own
_RECIPE = [2, av.__version__]  # of measurements that are stored
_END = 1 << 16  # bytes
_THREADS = 32  # files wait for the disk more than for the processor

Steps = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Video:
    """A video and its measurements, as of `probe`.

    Attributes:
        stamp: size in bytes and time of modification in ns, of what was measured.
        fps: frames a second; 0 if unknown.
        steps: differences between the times of frames, ticks, each with its number of repeats; from
            0 on.
        digest: as of `ends_digest`.
    """

    path: Path
    stamp: tuple[int, int]
    frames: int
    height: int
    width: int
    fps: float
    steps: Steps
    digest: str

    @property
    def times(self) -> list[int]:
        """When frames are displayed, ticks; empty where the file leaves it open."""
        differences = [step for step, count in self.steps for _ in range(count)]
        return np.cumsum(differences, dtype=np.int64).tolist()


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
        steps = [[int(s), len([*same])] for s, same in groupby(np.diff(times, prepend=0))]
        return Video(path, stamp, info.frames, info.height, info.width, info.fps, steps, digest)

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
