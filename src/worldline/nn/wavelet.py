"""Haar wavelets in time, height and width: pixels to sub-bands and back.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/modules/patching.py` (Patcher3D, UnPatcher3D).
Axes: B batch, C channels, T/H/W frames, rows, columns.

The released files store the filter tap in bf16 (0.70703125 instead of 1/sqrt(2)), which gives each
level a gain of 0.99968; the tap is therefore an argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT_TAP = math.sqrt(0.5)
_AXES = (2, 3, 4)


def patch(video: Tensor, size: int, tap: float = EXACT_TAP) -> Tensor:
    """Turn (B, C, 1 + size*k, H, W) into (B, C*size^3, 1 + k, H/size, W/size).

    Frame 0 is repeated `size` times first, so that the first latent frame sees frame 0 alone.

    Args:
        video: any float dtype; H and W multiples of `size`.
        size: 2^levels of the transform, 1 or more.
        tap: filter coefficient; it is rounded to the dtype of `video`.
    """
    x = torch.cat([video[:, :, :1].expand(-1, -1, size - 1, -1, -1), video], dim=2)
    for _ in range(size.bit_length() - 1):
        x = _analyse(x, tap)
    return x


def unpatch(bands: Tensor, size: int, tap: float = EXACT_TAP) -> Tensor:
    """Turn (B, C*size^3, 1 + k, h, w) into (B, C, 1 + size*k, h*size, w*size)."""
    x = bands
    for _ in range(size.bit_length() - 1):
        x = _synthesise(x, tap)
    return x[:, :, size - 1 :]


def _analyse(x: Tensor, tap: float) -> Tensor:
    bands = [x]
    for axis in _AXES:  # time first: its letter is the most significant of the band's number
        bands = [half for band in bands for half in _halves(band, axis)]
    return torch.cat(bands, dim=1) * (_rounded(tap, x) ** 3 / math.sqrt(8))


def _halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return even + odd, even - odd


def _synthesise(x: Tensor, tap: float) -> Tensor:
    bands = list(x.chunk(8, dim=1))
    for axis in reversed(_AXES):  # width first: its letter is the least significant one
        bands = [
            torch.stack((low + high, low - high), dim=axis + 1).flatten(axis, axis + 1)
            for low, high in zip(bands[::2], bands[1::2], strict=True)
        ]
    return bands[0] * (math.sqrt(8) * _rounded(tap, x) ** 3)


def _rounded(tap: float, like: Tensor) -> float:
    return torch.tensor(tap, dtype=like.dtype).item()
