"""Clips and tokens to train on, held on the device; a batch is a function of the step."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from multiprocessing import get_context

import torch
from torch import Tensor

from tiny.clips import Motion, Scene, draw_scenes, render, simulate
from worldline.shapes import VideoShape
from worldline.train.loop import generator

log = logging.getLogger(__name__)

_ENCODED_TOGETHER = 32  # clips
_DRAWN_TOGETHER = 1024  # clips; a few at a time cost several times as much each
_SECONDS_A_LINE = 10.0


def physics_batches(
    seeds: Sequence[int],
    shape: VideoShape,
    device: torch.device | str,
    *,
    batch: int = 224,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Yield generated clips, uint8 (B, T, H, W, 3) on `device`, in the order of `seeds`.

    Args:
        seeds: one clip each.
        shape: of a clip.
        device: where they are painted.
        batch: clips at a time.
        workers: processes that draw scenes and their motion; 0 does it here.
    """
    for clips, _ in captioned_batches(seeds, shape, device, batch=batch, workers=workers):
        yield clips


def captioned_batches(
    seeds: Sequence[int],
    shape: VideoShape,
    device: torch.device | str,
    *,
    batch: int = 224,
    workers: int = 0,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield what `physics_batches` does, each with its captions.

    How many are ready is logged now and then: a batch is when the next one is asked for.
    """
    began = told = time.monotonic()
    ready = 0
    for scenes, motion in _moving(seeds, shape, batch, workers):
        clips = render(scenes, motion, shape.height, shape.width, device)
        yield clips, [scene.caption for scene in scenes]
        ready += len(scenes)
        now = time.monotonic()
        if now - told >= _SECONDS_A_LINE or (ready == len(seeds) and told > began):
            told = now
            log.info("%d of %d clips are ready after %.0f s", ready, len(seeds), now - began)


def _moving(
    seeds: Sequence[int], shape: VideoShape, batch: int, workers: int
) -> Iterator[tuple[list[Scene], Motion]]:
    """Yield scenes and their motion, `batch` at a time, drawn ahead of their use."""
    share = -(-len(seeds) // max(1, workers))  # so that each process has some
    together = batch * max(1, min(_DRAWN_TOGETHER, share) // batch)
    parts = ((seeds[at : at + together], shape) for at in range(0, len(seeds), together))
    pool: Executor
    if workers:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(1)
    with pool:
        coming = deque(pool.submit(_motion, *part) for part in islice(parts, 1 + workers))
        while coming:
            scenes, motion = coming.popleft().result()
            coming.extend(pool.submit(_motion, *part) for part in islice(parts, 1))
            for at in range(0, len(scenes), batch):
                rows = slice(at, at + batch)
                yield scenes[rows], _rows_of(motion, rows)


def _motion(seeds: Sequence[int], shape: VideoShape) -> tuple[list[Scene], Motion]:
    scenes = draw_scenes(seeds, aspect=shape.width / shape.height)
    return scenes, simulate(scenes, shape.frames)


def _rows_of(motion: Motion, rows: slice) -> Motion:
    return Motion(**{field.name: getattr(motion, field.name)[rows] for field in fields(motion)})


class ClipPool:
    """Clips that stay on the device as uint8; batches are drawn with replacement and mirrored."""

    def __init__(self, batches: Iterator[Tensor], size: int, shape: VideoShape) -> None:
        self.clips: Tensor | None = None
        at = 0
        for clips in batches:
            if self.clips is None:
                whole = (size, shape.frames, shape.height, shape.width, 3)
                self.clips = torch.empty(whole, dtype=torch.uint8, device=clips.device)
            self.clips[at : at + len(clips)] = clips
            at += len(clips)
        if at != size:
            raise ValueError(f"{at} clips came, {size} were announced")

    def batch(self, seed: int, step: int, count: int, *, rank: int = 0) -> Tensor:
        """Return `count` clips, uint8 (B, T, H, W, 3); other processes draw others."""
        assert self.clips is not None
        draws = generator(seed, step, rank=rank)
        chosen = torch.randint(len(self.clips), (count,), generator=draws)
        mirrored = torch.rand(count, generator=draws) < 0.5
        clips = self.clips[to_device(chosen, self.clips.device)]
        sides = to_device(mirrored, self.clips.device).view(-1, 1, 1, 1, 1)
        return torch.where(sides, clips.flip(3), clips)


def as_video(clips: Tensor) -> Tensor:
    """Turn uint8 (B, T, H, W, 3) into float32 (B, 3, T, H, W) in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a small CPU tensor; a GPU that is at work is not waited for."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def mirror_caption(caption: str) -> str:
    """Return what `caption` says of the mirrored clip."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda side: other[side[0]], caption)


def views(
    batches: Iterator[tuple[Tensor, list[str]]],
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield what `captioned_batches` gave, a few clips at a time, as drawn and then mirrored."""
    for clips, captions in batches:
        for at in range(0, len(clips), _ENCODED_TOGETHER):
            part = clips[at : at + _ENCODED_TOGETHER]
            said = captions[at : at + _ENCODED_TOGETHER]
            yield part, said
            yield part.flip(3), [mirror_caption(caption) for caption in said]


@torch.no_grad()
def encode_captioned(
    batches: Iterator[tuple[Tensor, list[str]]],
    dtype: torch.dtype,
    encode: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[str]]:
    """Return the code of all clips and their captions, each clip as drawn and mirrored.

    Args:
        batches: of `captioned_batches`.
        dtype: to encode in.
        encode: video (B, 3, T, H, W) in [-1, 1] to what is kept of it.

    Returns:
        What `encode` gives, joined, and as many captions.
    """
    rows: list[Tensor] = []
    said: list[str] = []
    for clips, captions in views(batches):
        rows.append(encode(as_video(clips).to(dtype)))
        said += captions
    return torch.cat(rows), said
