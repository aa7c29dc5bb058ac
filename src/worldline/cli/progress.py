"""Progress of videos on the terminal: a bar, or a line for each stage; previews beside them."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tqdm

from worldline.cli.messages import results
from worldline.errors import Error
from worldline.files import remove, remove_stale

if TYPE_CHECKING:
    from worldline.step import Step
    from worldline.video.read import Frames

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
_UNITS = {"tokens": "token", "denoise": "step"}  # of stages with a bar
# end of a preview, which marks it as ours: to MP4 and MOV an empty box, to others nothing
_MARK = b"\0\0\0\x19freeworldline preview"
tqdm.tqdm.monitor_interval = 0  # no thread that watches bars


class Progress:
    """Bar, lines and preview of one video, or of several in step, while they are made.

    A preview that a killed run left is removed. Another file that has the preview's name stays, and
    no preview is written.
    """

    def __init__(self, label: str, output: Path, fps: float) -> None:
        self.label, self.kind, self.bar = label, "", tqdm.tqdm(disable=True)
        self.preview, self.fps = preview_path(output), fps
        self.written: bool | None = None  # None before the first preview, False where none can be

    def __enter__(self) -> Progress:
        remove_stale(self.preview)
        if is_preview(self.preview):
            remove(self.preview)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.written:
            remove(self.preview)

    def report(self, step: Step) -> None:
        if step.kind != self.kind:
            self._begin(step)
        self.bar.update(step.done - self.bar.n)
        if step.preview is not None and self.written is not False:
            self.bar.clear()
            self._write(step.preview)

    def _begin(self, step: Step) -> None:
        """A line or a bar for a new stage."""
        terminal = sys.stderr.isatty() and not results.quiet
        line = _STAGES[step.kind].format(total=step.total)
        if step.kind == "guardrail":  # the label may be words that it refuses
            logger.info("%s", line, extra={"repeats": True})
        elif not terminal:
            done = f", {step.done:,} are done" if step.done > 1 else ""
            logger.info("%s: %s%s", self.label, line, done, extra={"repeats": True})
        self.bar.close()
        self.bar = tqdm.tqdm(
            desc=self.label,
            total=step.total,
            initial=step.done,
            leave=False,
            unit=_UNITS.get(step.kind, ""),
            disable=not terminal or step.kind not in _UNITS,
        )
        self.kind = step.kind

    def _write(self, frames: Frames) -> None:
        """Replace the preview; a disk that refuses it does not end the run."""
        from worldline.video.write import write_video

        first = self.written is None
        if first and os.path.lexists(self.preview):
            self.written = False
            logger.warning("no preview: %s is not of this run, and stays", self.preview)
            return
        self.written = True  # an interrupt may come as soon as the file is there
        try:
            write_video(frames, self.preview, self.fps)
            with self.preview.open("ab") as file:
                file.write(_MARK)
            if first:
                logger.info("preview, replaced as it improves: %s", self.preview)
        except (Error, OSError) as error:
            logger.warning("no preview: %s", error)


def is_preview(path: Path) -> bool:
    """Whether a file is a preview of ours."""
    size = path.stat().st_size if path.is_file() else 0
    if size < len(_MARK):
        return False
    with path.open("rb") as file:
        file.seek(size - len(_MARK))
        return file.read() == _MARK


def preview_path(output: Path) -> Path:
    return output.with_suffix(f".preview{output.suffix}")
