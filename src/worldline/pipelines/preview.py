"""A cheap early look at latents: colours by a linear map of the channels.

Axes: B batch, C latent channels, T/H/W latent grid, h/w pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.video.convert import signed_to_uint8

_CELLS = 16  # side of a picture that the map is fitted to, in latent cells
_PICTURES = 6
_DAMPING = 1e-3  # against channels that hold no colour


def fit_colours(tokenizer: CosmosTokenizer) -> Tensor:
    """Return the linear map from a tokenizer's latents to colours, by least squares.

    It is fitted to smooth pictures that stand still, the same every time. The first latent frame
    holds one frame of video and the others several, so there is a map for each.

    Args:
        tokenizer: on its device.

    Returns:
        (2, C + 1, 3), float32, on the CPU; the last row is added.
    """
    config, weight = tokenizer.config, tokenizer.quant_conv.weight
    noise = np.random.RandomState(0).uniform(-1, 1, (_PICTURES, 3, 4, 4)).astype(np.float32)
    coarse = torch.from_numpy(noise)
    side = _CELLS * config.spatial
    pictures = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)
    colours = F.avg_pool2d(pictures, config.spatial).permute(0, 2, 3, 1).reshape(-1, 3)
    still = pictures[:, :, None].expand(-1, -1, 1 + config.temporal, -1, -1)
    latents = torch.cat([tokenizer.encode(one[None].to(weight)) for one in still]).float().cpu()
    maps = []
    for frame in range(2):
        cells = latents[:, :, frame].permute(0, 2, 3, 1).flatten(0, 2)
        known = torch.cat([cells, torch.ones(len(cells), 1)], dim=1).double()
        damping = _DAMPING * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
        damping[-1, -1] = 0
        maps.append(torch.linalg.solve(known.T @ known + damping, known.T @ colours.double()))
    return torch.stack(maps).float()


def show_colours(latents: Tensor, colours: Tensor, spatial: int) -> NDArray[np.uint8]:
    """Return what latents look like, roughly.

    Args:
        latents: (1, C, T, H, W), as the tokenizer gives them.
        colours: of `fit_colours`.
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
