"""What a tokenizer's latents look like, roughly: colours by a linear map of the channels.

Axes: C latent channels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.nn.pieces import CausalTokenizer

_CELLS = 16  # side of a picture that the map is fitted to, in latent cells
_PICTURES = 6
_DAMPING = 1e-3  # against channels that hold no colour


def fit_colours(tokenizer: CausalTokenizer) -> Tensor:
    """Return the linear map from a tokenizer's latents to colours, by least squares.

    It is fitted to smooth pictures that stand still, the same every time. The first latent frame
    holds one frame of video and the others several, so there is a map for each.

    Args:
        tokenizer: on its device.

    Returns:
        (2, C + 1, 3), float32, on the CPU; the last row is added.
    """
    config, weight = tokenizer.config, next(tokenizer.parameters())
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
