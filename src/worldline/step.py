"""Progress of a request, and the finished video; needs no torch."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from worldline.errors import NonFiniteError
from worldline.video.read import Frames
from worldline.video.write import check_destination, write_bytes, write_video

Result = TypeVar("Result")


@dataclass(frozen=True)
class Step:
    """One step of a request.

    Attributes:
        kind: "guardrail", "upsample", "text", "encode", "tokens", "denoise", "decode" or "done".
        done: how much of this kind is done.
        total: of how much.
        frames: new final pixels, uint8 (T, H, W, 3); at "done" all of them.
        preview: cheap early look, uint8 (latent frames, h, w, 3).
        video: the result, at "done".
    """

    kind: str
    done: int
    total: int
    frames: Frames | None = None
    preview: Frames | None = None
    video: Video | None = None


def numbered(
    index: int, steps: Generator[Step, None, Result]
) -> Generator[tuple[int, Step], None, Result]:
    """Steps of one video of a batch, each with the video's index; so are its errors."""
    while True:
        try:
            yield index, next(steps)
        except StopIteration as stop:
            return stop.value
        except NonFiniteError as error:
            error.index = index
            raise


@dataclass(frozen=True)
class Video:
    """Finished video.

    Attributes:
        frames: uint8 (T, H, W, 3).
        fps: frames a second.
        report: model, seed, versions, seconds and memory of each stage.
    """

    frames: Frames = field(repr=False)
    fps: float
    report: dict[str, Any] = field(default_factory=dict, repr=False)
    prompt: str | None = None

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the video (by suffix: .mp4, .mov, .mkv, .webm, .gif) and its report beside it.

        A video of one frame may be a .jpg, too.

        The report has the same name and the suffix .json, the prompt, where there is one, .txt;
        where there is none, that of an earlier video of this name is removed.
        Each file appears whole or not at all, and of two programs that save under one name the last
        leaves all files.

        Raises:
            InputError: the name or the folder cannot be written.
            Error: the disk is full; what was there before stays.
        """
        target = Path(path)
        check_destination(target)
        text = json.dumps(self.report, indent=1) + "\n"
        with _alone_in(target.parent):
            write_video(self.frames, target, self.fps)
            if self.prompt is not None:
                write_bytes(target.with_suffix(".txt"), self.prompt.encode())
            else:
                # words of the video that stood here
                with suppress(OSError, LookupError, ValueError, TypeError):
                    if json.loads(target.with_suffix(".json").read_bytes())["prompt"] is not None:
                        target.with_suffix(".txt").unlink(missing_ok=True)
            write_bytes(target.with_suffix(".json"), text.encode())
        return target


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other programs from saving into `folder`, where the file system has locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
