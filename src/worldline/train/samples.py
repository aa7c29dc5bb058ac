"""Videos that a model makes while it is trained, beside the clips that they should be.

Each is one file: the clip, what the tokenizer has of it, and what the model makes of its first
frame and its text, side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from worldline.errors import Error, InputError, one_line
from worldline.family import Parts
from worldline.nn.pieces import decode_stream
from worldline.parallel.mesh import Mesh
from worldline.train.boards import Board
from worldline.train.data.clips import Clips, Item
from worldline.video.convert import signed_to_uint8
from worldline.video.read import Frames
from worldline.video.write import write_video

log = logging.getLogger(__name__)

_COUNT = 2  # clips; of more processes each makes one


@dataclass(frozen=True)
class Samples:
    """Clips of which videos are made.

    Attributes:
        clips: some of them are taken, the same each time.
        folder: of the files.
        step: module whose `predict` makes a video's latents or tokens, in all processes together.
        parts: with the tokenizer.
        encode: a batch of clips -> latents or tokens, and what `predict` reads beside `parts`.
        to_tokenizer: of the family's objective.
        mesh: processes, of which each of `dp` has clips of its own.
        board: has a look at the videos of the first process.
    """

    clips: Clips
    folder: Path
    step: nn.Module
    parts: Parts
    encode: Callable[[Item], tuple[Tensor, tuple[Tensor, ...]]]
    to_tokenizer: Callable[[Parts, Tensor], Tensor]
    mesh: Mesh
    board: Board

    @torch.no_grad()
    def make(self, done: int) -> None:
        """Make and write the videos of a run of which so many steps are done."""
        clips, dp = replace(self.clips, cache=None), self.mesh.dp  # whose pixels are wanted
        if self.mesh.world.first:
            log.info("step %d: clips, and what the model makes of them: %s", done, self.folder)
        total = dp.count * -(-_COUNT // dp.count)
        for number in dp.deal(range(total)):
            item, problem = self._read(clips, number * len(clips) // total)
            if problems := [*filter(None, self.mesh.world.every(problem))]:
                log.warning("step %d: no videos: %s", done, problems[0])
                return
            encoded, batch = self.encode(item)
            predict: Any = self.step.predict
            predicted = predict(self.parts, *batch)
            if self.mesh.tp.first:
                truth = item["video"][0].permute(1, 2, 3, 0).numpy()
                columns = truth, self._decode(encoded), self._decode(predicted)
                fps = float(item["fps"][0]) / clips.window.interval
                self._write(done, number, np.concatenate(columns, 2), fps)

    def _read(self, clips: Clips, index: int) -> tuple[Item, str]:
        """A batch of one clip, and why it cannot be read."""
        try:
            return default_collate([clips[index]]), ""
        except (InputError, OSError) as error:
            return {}, one_line(error)

    def _decode(self, encoded: Tensor) -> Frames:
        tensor = self.to_tokenizer(self.parts, encoded)
        pieces = decode_stream(self.parts.tokenizer.module, tensor)
        return np.concatenate([signed_to_uint8(piece[0]) for piece in pieces])

    def _write(self, done: int, number: int, frames: Frames, fps: float) -> None:
        """Write a video; a disk that refuses it does not end the run."""
        path = self.folder / f"iter_{done:09}_{number}.mp4"
        try:
            write_video(frames, path, fps)
        except (Error, OSError) as error:
            log.warning("%s: no video of this step: %s", path, one_line(error))
            return
        self.board.video(done, f"sample {number}", frames, path)
