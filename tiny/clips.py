"""Physics clips from seeds, and batches of them to train on: a function of the step."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import torch
from torch import Tensor

from tiny.motion import Motion, integrate
from tiny.render import object_masks, render
from tiny.scenes import Scenes, draw_scenes
from worldline.shapes import VideoShape
from worldline.train.loop import generator

log = logging.getLogger(__name__)

Captioned = tuple[Tensor, list[str]]

_ENCODED_TOGETHER = 32  # clips
_DRAWN_TOGETHER = 1024  # clips; a few at a time cost several times as much each
_LOGGED = 32  # batches between lines of the log


@dataclass(frozen=True)
class Clips:
    """Clips and what is in them."""

    frames: Tensor  # uint8 (B, T, H, W, 3)
    masks: Tensor | None  # bool (B, T, H, W), the union of the objects
    captions: list[str]
    scenes: Scenes


def make_clips(
    seeds: Sequence[int],
    frames: int = 33,
    height: int = 128,
    width: int = 192,
    device: str | torch.device = "cpu",
    return_masks: bool = False,
) -> Clips:
    """One clip a seed, at 25 frames a second.

    A clip depends on its seed, the size and the device's arithmetic alone, not on the other seeds.

    Args:
        seeds: 0 to 2^32 - 1. Tiny models are trained below 1,000,000 and measured above.
        frames: length; longer clips begin with the same frames.
        height: pixels; 16 or more.
        width: pixels, 1 to 2.5 times the height.
        device: where the pictures are painted and stay.
        return_masks: also find where the objects are.
    """
    scenes = draw_scenes(seeds, aspect=width / height)
    motion = integrate(scenes.bodies, frames)
    pictures = render(scenes, motion, height, width, device)
    masks = object_masks(scenes, motion, height, width, device) if return_masks else None
    return Clips(pictures, masks, scenes.captions, scenes)


def clip_batches(
    seeds: Sequence[int],
    shape: VideoShape,
    device: torch.device | str,
    *,
    batch: int = 224,
    workers: int = 0,
) -> Iterator[Captioned]:
    """Generated clips, uint8 (B, T, H, W, 3), and their captions, in the order of `seeds`.

    `workers` processes draw scenes and their motion; 0 does it here. Progress is logged.
    """
    ready, began = 0, time.monotonic()
    for scenes, motion in _moving(seeds, shape, batch, workers):
        yield render(scenes, motion, shape.height, shape.width, device), scenes.captions
        ready += len(scenes)
        if ready % (_LOGGED * batch) == 0:
            seconds = time.monotonic() - began
            log.info("%d of %d clips are ready after %.0f s", ready, len(seeds), seconds)


def _moving(
    seeds: Sequence[int], shape: VideoShape, batch: int, workers: int
) -> Iterator[tuple[Scenes, Motion]]:
    """Scenes and their motion, `batch` at a time, drawn ahead of their use."""
    share = -(-len(seeds) // max(1, workers))  # so that each process has some
    together = batch * max(1, min(_DRAWN_TOGETHER, share) // batch)
    parts = ((seeds[at : at + together], shape) for at in range(0, len(seeds), together))
    pool: Executor = ThreadPoolExecutor(1)
    if workers:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool:
        coming = deque(pool.submit(_draw, *part) for part in islice(parts, 1 + workers))
        while coming:
            scenes, motion = coming.popleft().result()
            coming.extend(pool.submit(_draw, *part) for part in islice(parts, 1))
            for at in range(0, len(scenes), batch):
                rows = slice(at, at + batch)
                yield scenes[rows], Motion(*(values[rows] for values in motion))


def _draw(seeds: Sequence[int], shape: VideoShape) -> tuple[Scenes, Motion]:
    scenes = draw_scenes(seeds, aspect=shape.width / shape.height)
    return scenes, integrate(scenes.bodies, shape.frames)


class ClipPool:
    """Clips that stay on the device as uint8; batches are drawn with replacement and mirrored."""

    def __init__(self, batches: Iterator[Captioned], size: int, shape: VideoShape) -> None:
        at = 0
        for clips, _ in batches:
            if not at:
                whole = (size, shape.frames, shape.height, shape.width, 3)
                self.clips = torch.empty(whole, dtype=torch.uint8, device=clips.device)
            self.clips[at : at + len(clips)] = clips
            at += len(clips)

    def batch(self, seed: int, step: int, count: int, *, rank: int = 0) -> Tensor:
        """`count` clips, uint8 (B, T, H, W, 3); other processes draw others."""
        draws = generator(seed, step, rank=rank)
        chosen = torch.randint(len(self.clips), (count,), generator=draws)
        mirrored = torch.rand(count, generator=draws) < 0.5
        clips = self.clips[to_device(chosen, self.clips.device)]
        sides = to_device(mirrored, self.clips.device).view(-1, 1, 1, 1, 1)
        return torch.where(sides, clips.flip(3), clips)


def as_video(clips: Tensor) -> Tensor:
    """Float32 (B, 3, T, H, W) in [-1, 1] of uint8 (B, T, H, W, 3)."""
    return clips.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy of a small CPU tensor; a GPU that is at work is not waited for."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def mirror_caption(caption: str) -> str:
    """Caption of the mirrored clip."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda side: other[side[0]], caption)


def views(batches: Iterator[Captioned]) -> Iterator[Captioned]:
    """The same clips, a few at a time, as drawn and then mirrored."""
    for clips, captions in batches:
        for at in range(0, len(clips), _ENCODED_TOGETHER):
            rows = slice(at, at + _ENCODED_TOGETHER)
            yield clips[rows], captions[rows]
            yield clips[rows].flip(3), [mirror_caption(caption) for caption in captions[rows]]


@torch.no_grad()
def encode_views(
    batches: Iterator[Captioned], dtype: torch.dtype, encode: Callable[[Tensor], Tensor]
) -> Captioned:
    """What `encode` makes of every view (B, 3, T, H, W) in [-1, 1], joined, and their captions."""
    parts = [(encode(as_video(clips).to(dtype)), captions) for clips, captions in views(batches)]
    return torch.cat([part for part, _ in parts]), [text for _, texts in parts for text in texts]
