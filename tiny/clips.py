"""Procedurally generated physics clips: scenes from seeds, their motion, their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny.motion import FPS, Motion, simulate
from tiny.parts import Scene
from tiny.render import object_masks, render
from tiny.scenes import COLOURS, KINDS, SHAPES, draw_scene, draw_scenes

__all__ = [
    "COLOURS",
    "FPS",
    "KINDS",
    "SHAPES",
    "Clips",
    "Motion",
    "Scene",
    "draw_scene",
    "draw_scenes",
    "make_clips",
    "object_masks",
    "render",
    "simulate",
]


@dataclass(frozen=True)
class Clips:
    """Clips and what is in them."""

    frames: Tensor  # uint8 (B, T, H, W, 3)
    masks: Tensor | None  # bool (B, T, H, W), the union of the objects
    captions: list[str]
    scenes: list[Scene]


def make_clips(
    seeds: Sequence[int],
    frames: int = 33,
    height: int = 128,
    width: int = 192,
    device: str | torch.device = "cpu",
    return_masks: bool = False,
    max_memory: int | None = None,
) -> Clips:
    """Return one clip a seed, at 25 frames a second.

    A clip depends on its seed, the size and the device's arithmetic alone, not on the other seeds.

    Args:
        seeds: 0 to 2^32 - 1. Tiny models are trained below 1,000,000 and measured above.
        frames: length; longer clips begin with the same frames.
        height: of the picture; 16 or more.
        width: of the picture, 1 to 2.5 times the height.
        device: where the pictures are painted and left.
        return_masks: also say where the objects are.
        max_memory: bytes that painting may take besides the result.

    Raises:
        InputError: a seed, a size or a length is out of range, or there is no seed.
    """
    scenes = draw_scenes(seeds, aspect=width / height)
    motion = simulate(scenes, frames)
    pictures = render(scenes, motion, height, width, device, max_memory=max_memory)
    masks = None
    if return_masks:
        masks = object_masks(scenes, motion, height, width, device, max_memory=max_memory)
    return Clips(pictures, masks, [scene.caption for scene in scenes], scenes)
