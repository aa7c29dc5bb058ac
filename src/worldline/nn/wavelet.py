"""Haar wavelets in time, height and width: pixels to sub-bands and back.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/modules/patching.py` (Patcher3D, UnPatcher3D).
Axes: B batch, C channels, T/H/W frames, rows, columns.

Every level splits every band of the one before, so that all levels together are a Hadamard
transform of the pixels of a cube: one matrix product, in `channels_last_3d` from end to end.

The released files store the filter tap in bf16 (0.70703125 instead of 1/sqrt(2)), which gives each
level a gain of 0.99968; the tap is therefore an argument.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_TAP = math.sqrt(0.5)


def patch(video: Tensor, size: int, tap: float = EXACT_TAP, *, start: bool = True) -> Tensor:
    """Turn (B, C, 1 + size*k, H, W) into (B, C*size^3, 1 + k, H/size, W/size).

    Frame 0 is repeated `size` times first, so that the first latent frame sees frame 0 alone.

    Args:
        video: any float dtype; H and W multiples of `size`.
        size: 2^levels of the transform, 1 or more.
        tap: filter coefficient; it is rounded to the dtype of `video`.
        start: frame 0 is the first of its clip; else nothing is repeated, and size*k frames give k.
    """
    levels = size.bit_length() - 1
    cells = video.permute(0, 2, 3, 4, 1)  # channels last
    if start:
        cells = torch.cat([cells[:, :1].expand(-1, size - 1, -1, -1, -1), cells], dim=1)
    batch, *sides, channels = cells.shape
    grid = [side // size for side in sides]
    bits = [2] * levels
    cubes = cells.reshape(batch, grid[0], *bits, grid[1], *bits, grid[2], *bits, channels)
    bands = cubes.permute(_cube_order(levels)).reshape(batch, *grid, -1)
    gain = (_rounded(tap, video) ** 3 / math.sqrt(8)) ** levels
    return F.linear(bands, _signs(levels, channels, video)).mul_(gain).permute(0, 4, 1, 2, 3)


def unpatch(bands: Tensor, size: int, tap: float = EXACT_TAP, *, start: bool = True) -> Tensor:
    """Turn (B, C*size^3, 1 + k, h, w) into (B, C, 1 + size*k, h*size, w*size).

    Without `start` (see `patch`) k frames give size*k.
    """
    levels = size.bit_length() - 1
    batch, channels, *grid = bands.shape
    channels //= size**3
    gain = (math.sqrt(8) * _rounded(tap, bands) ** 3) ** levels
    cells = bands.permute(0, 2, 3, 4, 1)
    cubes = F.linear(cells, _signs(levels, channels, bands)).mul_(gain)
    order = _cube_order(levels)
    inverse = [order.index(axis) for axis in range(len(order))]
    cubes = cubes.reshape(batch, *grid, *[2] * (3 * levels), channels).permute(inverse)
    cells = cubes.reshape(batch, *[size * side for side in grid], channels)
    return cells[:, size - 1 if start else 0 :].permute(0, 4, 1, 2, 3)


def _cube_order(levels: int) -> list[int]:
    """From (B, T, bits of t, H, bits of h, W, bits of w, C) to (B, T, H, W, bits, C).

    The highest bits come first, since the last level halves them and its band is the most
    significant; of one level the order is time, height, width.
    """
    starts = [1 + axis * (levels + 1) for axis in range(3)]
    bits = [start + 1 + level for level in range(levels) for start in starts]
    return [0, *starts, *bits, 4 + 3 * levels]


def _signs(levels: int, channels: int, like: Tensor) -> Tensor:
    """Signs of the Hadamard transform of 8^levels pixels, each channel alone; symmetric."""
    signs = like.new_ones(1, 1)
    for _ in range(3 * levels):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    each = torch.eye(channels, dtype=like.dtype, device=like.device)
    return torch.kron(signs, each)


def _rounded(tap: float, like: Tensor) -> float:
    return torch.tensor(tap, dtype=like.dtype, device="cpu").item()
