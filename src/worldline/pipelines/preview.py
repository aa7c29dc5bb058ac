"""A cheap early look at latents: colours by a linear map of the channels.

Axes: B batch, C latent channels, T/H/W latent grid, h/w pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.video.convert import signed_to_uint8


def show_colours(latents: Tensor, colours: Tensor, spatial: int) -> NDArray[np.uint8]:
    """Return what latents look like, roughly.

    Args:
        latents: (1, C, T, H, W), as the tokenizer gives them.
        colours: of `worldline.nn.pieces.fit_colours`.
        spatial: pixels a cell covers on each side.

    Returns:
        uint8 (T, h, w, 3), at a quarter of the video's height and width or more.
    """
    maps = colours.to(latents.device)
    chosen = maps[(torch.arange(latents.shape[2], device=latents.device) > 0).long()]  # (T, C+1, 3)
    cells = latents[0].float().permute(1, 2, 3, 0).flatten(1, 2)  # (T, H W, C)
    shown = cells @ chosen[:, :-1] + chosen[:, -1:]
    pictures = shown.unflatten(1, latents.shape[-2:]).permute(3, 0, 1, 2)
    times = -(-spatial // 4)
    frames = signed_to_uint8(pictures)
    return frames.repeat(times, axis=1).repeat(times, axis=2)
