"""Progress of a request, and the finished video; needs no torch."""

from __future__ import annotations

import fcntl
import json
import os
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import tqdm
from PIL import Image

from worldline.documents import read_json
from worldline.errors import InputError, blame, brief
from worldline.files import check_folder, check_path, digest
from worldline.video.read import Frames
from worldline.video.write import (
    check_destination,
    encoding_of,
    write_frames,
    write_video,
    writing_all,
)

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

_AXES = "THWC"  # of a video's frames
_INLINE = 1_400_000  # bytes of a video in a notebook, before base64
# short sides and shares of frames that are tried for it
_TRIALS = ((360, 1), (180, 1), (90, 1), (90, 4), (90, 16), (90, 64))


@dataclass(frozen=True)
class Step:
    """One step of a request.

    Attributes:
        kind: "guardrail", "upsample", "text", "encode", "tokens", "denoise", "decode" or "done";
            while a video waits on a server, "queue".
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


Progress = bool | Callable[[Step], object]  # True: a bar


def numbered(
    index: int, steps: Generator[Step, None, Result]
) -> Generator[tuple[int, Step], None, Result]:
    """Steps of one video of a batch, each with the video's index; so are its errors."""
    with blame(index):
        while True:
            try:
                yield index, next(steps)
            except StopIteration as stop:
                return stop.value


class Bar:
    """Progress bar on standard error, of one kind of steps after another."""

    def __init__(self) -> None:
        self.kind, self.bar = "", tqdm.tqdm(disable=True)

    def __call__(self, step: Step) -> None:
        if step.kind != self.kind:
            self.kind = step.kind
            self.bar.close()
            kind, done = step.kind, step.kind == "done"
            self.bar = tqdm.tqdm(desc=kind, total=step.total, initial=step.done, disable=done)
        self.bar.update(step.done - self.bar.n)


def finish(
    stream: Callable[[], Generator[Step, None, None]], progress: Progress, *, bar: bool = True
) -> Video | None:
    """Video of a stream, whose steps are reported; None where it ends without one.

    Args:
        stream: begins it.
        progress: whether a bar runs, or what gets each step; what it raises closes the stream.
        bar: whether this process may have one.

    Raises:
        InputError: `progress` is neither.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise InputError(f"progress is {progress!r:.80}; give True or a function of a Step")
    report = Bar() if progress is True and bar else progress
    video: Video | None = None
    # closed: networks leave the device, though a notebook may hold the trace of an error
    with closing(stream()) as steps:
        for step in steps:
            if callable(report):
                report(step)
            video = step.video
    return video


@dataclass(frozen=True, eq=False)
class Video:
    """Finished video; equal to itself alone.

    Attributes:
        frames: uint8 (T, H, W, 3), a NumPy array.
        fps: frames a second.
        report: model, seed, versions, seconds and memory of each stage.
        saves: whether this process writes it: of several that made it, the first.
    """

    frames: Frames
    fps: float
    report: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    saves: bool = True

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {width} x {height}, {self.fps:g} fps)"

    def _repr_html_(self) -> str:
        """The video as notebooks play it, below 2 MB: smaller, or with fewer frames, if need be."""
        from worldline.video.convert import scaled

        tag, kind, suffix = ("video", "video/mp4", ".mp4")
        if len(self.frames) == 1:
            tag, kind, suffix = ("img", "image/jpeg", ".jpg")
        with TemporaryDirectory() as folder:
            path = Path(folder, f"video{suffix}")
            for side, share in _TRIALS:
                frames = self.frames[::share]
                if side < min(frames.shape[1:3]):
                    frames = scaled(frames, side)
                write_video(frames, path, self.fps / share)
                if path.stat().st_size <= _INLINE:
                    break
            data = b64encode(path.read_bytes()).decode()
        return f'<{tag} src="data:{kind};base64,{data}" controls loop muted></{tag}>'

    def to_torch(self, layout: str = "TCHW", float: bool = False) -> torch.Tensor:
        """Frames on the CPU; a copy.

        Args:
            layout: order of the axes: "TCHW", or "CTHW" as video networks take it; any other order
                of these four letters is made, too, such as "THWC".
            float: float32 from 0 to 1, in place of uint8 from 0 to 255.

        Raises:
            InputError: the layout does not have these four axes.
        """
        if not isinstance(layout, str) or sorted(layout) != sorted(_AXES):
            raise InputError(f"layout is {brief(layout)}; give TCHW or CTHW")
        import torch

        frames = torch.from_numpy(self.frames).permute([_AXES.index(axis) for axis in layout])
        copy = frames.clone(memory_format=torch.contiguous_format)
        return copy.to(torch.float32).div_(255) if float else copy

    def to_pil(self) -> list[Image.Image]:
        """Frames as RGB pictures; copies."""
        return [Image.fromarray(frame) for frame in self.frames]

    def save(
        self, path: str | PathLike[str], *, crf: int | None = None, lossless: bool = False
    ) -> Path:
        """Write the video (by suffix: .mp4, .mov, .mkv, .webm, .gif) and its report beside it.

        A video of one frame may be a .jpg, too. The report has the same name and the suffix .json,
        and the hash of the video's bytes, so that it belongs to no other; the prompt, where there
        is one, .txt; where there is none, that of an earlier video of this name is removed. All
        files are written before the first takes its place, and of two programs that save under one
        name the last leaves all files. The first of the processes that made it writes.

        Args:
            path: file, or a name without suffix for a folder of PNGs.
            crf: quality of H.264 (0 to 51; 18) and VP9 (0 to 63; 24); smaller is better.
            lossless: keep every bit, of .mp4, .mov, .mkv and .webm.

        Raises:
            InputError: the name or the folder cannot be written, or the format has no such rate
                or quality; before anything is encoded.
            Error: the disk is full; what was there before stays.
        """
        target = Path(check_path(path))
        encoding = encoding_of(target, crf, lossless)
        check_destination(target, self.fps)
        check_folder(target.parent)
        if not self.saves:
            return target
        report, text = target.with_suffix(".json"), target.with_suffix(".txt")
        prompt = [] if self.prompt is None else [text]
        with (
            _alone_in(target.parent),
            writing_all([report, *prompt, target]) as (report_file, *prompt_file, video_file),
        ):
            write_frames(self.frames, target, self.fps, video_file, encoding)
            self.report.update(encoding=encoding, file_sha256=digest(video_file))
            report_file.write_text(json.dumps(self.report, indent=1) + "\n")
            for file in prompt_file:
                file.write_bytes(str(self.prompt).encode())
            if self.prompt is None:  # words of the video that stood here
                with suppress(OSError, LookupError, ValueError):
                    if read_json(report)["prompt"] is not None:
                        text.unlink(missing_ok=True)
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
