"""Progress of videos on the terminal: a bar, or a line for each stage."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldline.errors import Error

if TYPE_CHECKING:
    from worldline.step import Step, Video

logger = logging.getLogger(__name__)

_STAGES = {
    "guardrail": "checking by the guardrails",
    "upsample": "rewriting the prompt",
    "text": "encoding the prompt",
    "encode": "encoding",
    "tokens": "drawing {total:,} tokens",
    "denoise": "denoising in {total} steps",
    "decode": "decoding",
}
# kind of step -> unit, and format of its bar: a denoising step takes seconds
_BARS: dict[str, tuple[str, str | None]] = {
    "tokens": ("token", None),
    "denoise": (
        "step",
        "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]",
    ),
}


class Progress:
    """The bar and the lines of one video, or of several in step."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.kind = ""
        self.finished: set[str] = set()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def report(self, step: Step) -> None:
        from tqdm import tqdm

        if step.kind != self.kind:
            self.__exit__()
            self.kind = step.kind
            line = _STAGES[step.kind].format(total=step.total)
            if step.kind == "guardrail":  # the label may be words that it refuses
                logger.info("%s", line)
            elif not sys.stderr.isatty():
                again = step.kind in self.finished
                done = f", {step.done:,} are done" if again and step.done else ""
                logger.info("%s: %s%s", self.label, line, done)
                self.finished |= {step.kind} & _BARS.keys()
            elif step.kind in _BARS:
                unit, shape = _BARS[step.kind]
                self.bar = tqdm(
                    total=step.total,
                    initial=step.done,
                    desc=self.label,
                    unit=unit,
                    bar_format=shape,
                    leave=False,
                )
        if self.bar is not None:
            self.bar.update(step.done - self.bar.n)


class Preview:
    """An early look beside the video to come; removed when the run is over.

    A file that has its name already stays, and no preview is written.
    """

    def __init__(self, output: Path, fps: float) -> None:
        self.path = preview_path(output)
        self.fps = fps
        self.written = self.stopped = False

    def write(self, step: Step) -> None:
        """Replace the preview; a disk that refuses it does not end the run."""
        from worldline.video.write import write_video

        if step.preview is None or self.stopped:
            return
        first = not self.written
        if first and os.path.lexists(self.path):
            logger.warning("no preview: %s is not of this run, and stays", self.path)
            self.stopped = True
            return
        self.written = True  # an interrupt may come as soon as the file is there
        try:
            write_video(step.preview, self.path, self.fps)
        except Error as error:
            logger.warning("no preview: %s", error)
            return
        if first:
            logger.info("preview, replaced as it improves: %s", self.path)

    def remove(self) -> None:
        if self.written:
            self.path.unlink(missing_ok=True)


def preview_path(output: Path) -> Path:
    return output.with_suffix(f".preview{output.suffix}")


def follow(steps: Iterator[Step], label: str, preview: Preview) -> Video:
    """The video at the end of its steps, with progress."""
    with Progress(label) as progress:
        for step in steps:
            if step.video is not None:
                return step.video
            progress.report(step)
            if step.preview is not None and progress.bar is not None:
                progress.bar.clear()
            preview.write(step)
    raise AssertionError("a stream ends with its video")
