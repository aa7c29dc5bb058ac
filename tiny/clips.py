"""Procedurally generated physics clips: scenes from seeds, their motion, their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny.motion import integrate
from tiny.render import object_masks, render
from tiny.scenes import Scenes, draw_scenes


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

    Raises:
        InputError: a seed, a size or a length is out of range, or there is no seed.
    """
    scenes = draw_scenes(seeds, aspect=width / height)
    motion = integrate(scenes.bodies, frames)
    pictures = render(scenes, motion, height, width, device)
    masks = object_masks(scenes, motion, height, width, device) if return_masks else None
    return Clips(pictures, masks, scenes.captions, scenes)
