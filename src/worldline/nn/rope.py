"""Rotary position embedding over a latent grid, with YaRN or NTK stretching.

Source: arXiv 2104.09864 (RoPE), arXiv 2309.00071 (YaRN); numbers and layout of
nvidia-cosmos/cosmos-predict1 `autoregressive/modules/embedding.py`, the class for rope version v2,
and for the diffusion models `diffusion/module/position_embedding.py`; those of Predict2.5 round the
exponents (nvidia-cosmos/cosmos-predict2.5 `_src/predict2/networks/minimal_v4_dit.py`).
Axes: L tokens, K head size; K is cut into time, height and width parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.shapes import LatentShape


@dataclass(frozen=True)
class Yarn:
    """Stretching of frequencies whose period is long against the original grid.

    Attributes:
        original: latent frames, and the side of the grid that serves both spatial axes.
        scale: how far the longest periods are stretched.
        beta_fast: turns over the original grid above which a frequency is kept.
        beta_slow: turns below which it is divided by `scale`.
    """

    original: tuple[int, int] = (3, 40)
    scale: float = 2.0
    beta_fast: float = 4.0
    beta_slow: float = 1.0


class Rotation(NamedTuple):
    """Cosines and sines (L, K) of every token, float32 until cast by the caller."""

    cos: Tensor
    sin: Tensor

    def rows(self, start: int, count: int) -> Rotation:
        return Rotation(self.cos[start : start + count], self.sin[start : start + count])

    def to(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        return Rotation(self.cos.to(device, dtype), self.sin.to(device, dtype))


def axis_sizes(head_size: int) -> tuple[int, int, int]:
    """Channels of K that turn with time, height and width."""
    spatial = head_size // 6 * 2
    return head_size - 2 * spatial, spatial, spatial


def rotary_exponents(size: int) -> Tensor:
    """Exponents 2 j / d, (size / 2,) float32, of an axis of d = `size` channels."""
    return torch.arange(0, size, 2, dtype=torch.float32) / size


def inverse_frequencies(
    size: int, theta: float, yarn: Yarn | None = None, original: int = 0
) -> Tensor:
    """Inverse frequencies (size / 2,) of an axis of `size` channels, in radians a cell, float32.

    Yarn's stretching needs `original`, the cells of this axis that they were first trained on.
    """
    frequencies = theta ** -rotary_exponents(size)
    if yarn is None:
        return frequencies
    high = 2 * math.pi * yarn.beta_fast / original
    low = 2 * math.pi * yarn.beta_slow / original
    kept = ((frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - kept) / yarn.scale + kept)


def rotation_3d(
    grid: LatentShape,
    head_size: int,
    theta: float,
    yarn: Yarn | None = None,
    leading: int = 0,
    first_frame: int = 0,
) -> Rotation:
    """Rotation of every cell of `grid`, time-major, then rows, then columns.

    `leading` tokens before the first cell are not rotated; `first_frame` is the time of the first.
    """
    original = (0, 0) if yarn is None else yarn.original
    time, *space = _positions(grid)
    frequencies = [
        inverse_frequencies(size, theta, yarn, cells)
        for size, cells in zip(axis_sizes(head_size), (*original, original[1]), strict=True)
    ]
    angles = _angles([time + first_frame, *space], frequencies)
    angles = F.pad(angles, (0, 0, leading, 0))
    return Rotation(angles.cos(), angles.sin())


def _positions(grid: LatentShape) -> list[Tensor]:
    return [torch.arange(size, dtype=torch.float32) for size in astuple(grid)]


def _angles(positions: Sequence[Tensor], frequencies: Sequence[Tensor]) -> Tensor:
    """Angles (L, K) of every cell, float32, by time, rows and columns."""
    half = _over_grid([torch.outer(*pair) for pair in zip(positions, frequencies, strict=True)])
    return torch.cat([half, half], dim=1).float()


def stretched_angles_3d(
    grid: LatentShape,
    head_size: int,
    *,
    ratio: tuple[float, float, float],
    time_scale: tuple[float, float] | None,
    dtype: torch.dtype = torch.float32,
    exponents: Sequence[Tensor] | None = None,
) -> Tensor:
    """Angles (L, K) of every cell in radians, float32, with NTK stretching by axis.

    An axis of d channels stretched by r has the base 10000 * r^(d / (d - 2)), and its channel j
    turns by base^-(2 j / d) a cell.

    Args:
        grid: tokens, time-major, then rows, then columns.
        head_size: K.
        ratio: stretching of time, rows and columns.
        time_scale: (fps, base fps): frame t stands at t / fps * base fps; None leaves it at t.
        dtype: precision of the arithmetic. The released pipelines compute in bf16, which moves
            angles by up to 0.15 radians (0.28 in the 14B models) at 704 x 1280.
        exponents: 2 j / d of each axis, (d / 2,) each, where a checkpoint was trained with rounded
            ones.
    """
    positions = [position.to(dtype) for position in _positions(grid)]
    if time_scale is not None:
        fps, base_fps = time_scale
        positions[0] = positions[0] / torch.tensor([fps]).to(dtype) * base_fps
    sizes = axis_sizes(head_size)
    bases = [10_000.0 * r ** (size / (size - 2)) for size, r in zip(sizes, ratio, strict=True)]
    exponents = exponents or [*map(rotary_exponents, sizes)]
    frequencies = [1.0 / b ** e.to(dtype) for b, e in zip(bases, exponents, strict=True)]
    return _angles(positions, frequencies)


def _over_grid(tables: Sequence[Tensor]) -> Tensor:
    """Table (T H W, channels of all axes) of every cell, from one (cells, channels) an axis."""
    time, rows, columns = tables
    parts = (time[:, None, None], rows[None, :, None], columns[None, None])
    shape = [len(table) for table in tables]
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1).flatten(0, 2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn `x` (..., L, K) by `rotation`; channel j pairs with channel j + K/2."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin


def sincos_3d(grid: LatentShape, width: int, leading: int = 0) -> Tensor:
    """Fixed table (leading + tokens, width) that is added to the stream, float32.

    The values are rounded to bf16, as the reference keeps them. Source: same file, class
    SinCosPosEmbAxisTE; arXiv 1706.03762, section 3.5.
    """
    parts = []
    for position, size in zip(_positions(grid), axis_sizes(width), strict=True):
        omega = 10000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size / 2))
        angle = torch.outer(position.double(), omega)
        parts.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    return F.pad(_over_grid(parts), (0, 0, leading, 0)).bfloat16().float()
