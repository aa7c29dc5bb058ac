"""LeRobot data sets as recorded ones are: AV1, long groups of pictures, several episodes a file.

Each frame has its number, that of its episode and its camera in the colours of four squares, so
that a decoded frame is known again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
HEIGHT, WIDTH, FPS = 64, 96, 10
LENGTHS = (30, 36, 25, 33)  # of the episodes, 36 at most
TASKS = ("Pick up the cube.", "Open the drawer.", "Pick up the cube.", "Push the button.")
# camera -> episodes of each file; those of the data files are others
FILES = {FRONT: ((0, 1), (2, 3)), WRIST: ((0,), (1, 2, 3))}
os.environ.setdefault("SVT_LOG", "1")  # errors alone, of the encoder
_LEVELS = 6  # of a square


def draw(camera: str, episode: int, frame: int) -> np.ndarray[Any, Any]:
    """A frame that has its place in its colours."""
    digits = (frame // _LEVELS, frame % _LEVELS, episode, (FRONT, WRIST).index(camera))
    squares = np.array(digits).repeat(WIDTH // 4)[None].repeat(HEIGHT, 0) * 40 + 20
    return np.stack([squares, 255 - squares, squares], -1).astype(np.uint8)


def places(frames: np.ndarray[Any, Any]) -> list[tuple[int, int, str]]:
    """Frame, episode and camera of drawn frames."""
    width = frames.shape[2] // 4
    found = []
    for image in frames.astype(float):
        squares = (image[4:-4, at * width + 4 : (at + 1) * width - 4] for at in range(4))
        high, low, episode, camera = (round((s[..., 0].mean() - 20) / 40) for s in squares)
        found.append((high * _LEVELS + low, episode, (FRONT, WRIST)[camera]))
    return found


def expected(camera: str, episode: int, frames: Sequence[int]) -> list[tuple[int, int, str]]:
    return [(frame, episode, camera) for frame in frames]


def write_frames(
    path: Path,
    frames: Sequence[tuple[str, int, int]],
    codec: str = "libsvtav1",
    fps: int = FPS,
    group: int = 250,
) -> None:
    """A video of drawn frames, with a key frame every `group` frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=fps, options={"g": f"{group}", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for number, place in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(draw(*place), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def describe(version: str, pattern: str, **more: Any) -> dict[str, Any]:
    """Contents of info.json."""
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "info": {"video.codec": "av1"}}
    state = {"dtype": "float32", "shape": [6], "names": None}
    info = {
        "codebase_version": version,
        "robot_type": "so101",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 2 if version < "v3" else 1000,
        "fps": FPS,
        "features": {FRONT: video, WRIST: video, "observation.state": state, "action": state},
        "video_path": pattern,
    }
    return {**info, **more}


def write_info(folder: Path, info: dict[str, Any]) -> None:
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def rows_of_v3() -> list[dict[str, Any]]:
    """Rows of `meta/episodes`."""
    rows: list[dict[str, Any]] = []
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        row: dict[str, Any] = {"episode_index": episode, "tasks": [task], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 7, "stats/action/min": [0.0]}
        for camera, files in FILES.items():
            [(number, file)] = [(n, f) for n, f in enumerate(files) if episode in f]
            begin = sum(LENGTHS[other] for other in file if other < episode) / FPS
            row |= {
                f"videos/{camera}/chunk_index": 0,
                f"videos/{camera}/file_index": number,
                f"videos/{camera}/from_timestamp": begin,
                f"videos/{camera}/to_timestamp": begin + length / FPS,
            }
        rows.append(row)
    return rows


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows in two files, as of a data set that was recorded in two goes."""
    place = folder / "meta" / "episodes" / "chunk-000"
    place.mkdir(parents=True, exist_ok=True)
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            pq.write_table(pa.Table.from_pylist(list(part)), place / f"file-{number:03}.parquet")


def write_v3(folder: Path, codec: str = "libsvtav1") -> Path:
    """A data set of v3.0: two cameras, of two files each."""
    pattern = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    write_info(folder, describe("v3.0", pattern))
    write_rows(folder, rows_of_v3())
    for camera, files in FILES.items():
        for number, episodes in enumerate(files):
            frames = [(camera, e, frame) for e in episodes for frame in range(LENGTHS[e])]
            write_frames(folder / f"videos/{camera}/chunk-000/file-{number:03}.mp4", frames, codec)
    return folder


def write_v2(folder: Path, version: str = "v2.1", codec: str = "libsvtav1") -> Path:
    """A data set of v2: two cameras, a file an episode, two of them in a chunk."""
    pattern = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(folder, describe(version, pattern))
    tasks = list(dict.fromkeys(TASKS))
    lines = ({"task_index": number, "task": task} for number, task in enumerate(tasks))
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = zip(range(len(LENGTHS)), LENGTHS, TASKS, strict=True)
    rows = ({"episode_index": e, "tasks": [t], "length": n} for e, n, t in described)
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for camera in FILES:
        for episode, length in enumerate(LENGTHS):
            path = folder / f"videos/chunk-{episode // 2:03}/{camera}/episode_{episode:06}.mp4"
            write_frames(path, [(camera, episode, frame) for frame in range(length)], codec)
    return folder
