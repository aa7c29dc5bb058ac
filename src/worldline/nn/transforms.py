"""Transforms without weights, at both ends of a tokenizer: Haar wavelets, and FSQ.

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/modules/patching.py` (Patcher3D, UnPatcher3D) and
`tokenizer/modules/quantizers.py` (FSQuantizer); arXiv 2309.15505 (Mentzer et al.), equations 1-3.
Axes: B batch, C channels, T/H/W frames, rows, columns.

Haar wavelets, in time, height and width: pixels to sub-bands and back. Every level splits every
band of the one before, so that all levels together are a Hadamard transform of the pixels of a
cube: one matrix product, channels last from end to end. The released files store the filter
tap in bf16 (0.70703125 instead of 1/sqrt(2)), which gives each level a gain of 0.99968; the tap is
therefore an argument.

Finite scalar quantisation: vectors to integer ids and back, without a codebook. The channel axis
C = len(levels) is last.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_TAP = math.sqrt(0.5)
_WIDENING = 1.001  # the bound reaches just past the outermost level, so that rounding can hit it


def patch(cells: Tensor, size: int, tap: float = EXACT_TAP, *, start: bool = True) -> Tensor:
    """Turn (B, 1 + size*k, H, W, C) into (B, 1 + k, H/size, W/size, C*size^3).

    Frame 0 is repeated `size` times first, so that the first latent frame sees frame 0 alone.

    Args:
        cells: any float dtype; H and W multiples of `size`.
        size: 2^levels of the transform, 1 or more.
        tap: filter coefficient; it is rounded to the dtype of `cells`.
        start: frame 0 is the first of its clip; else nothing is repeated, and size*k frames give k.
    """
    levels = size.bit_length() - 1
    if start:
        cells = torch.cat([cells[:, :1].expand(-1, size - 1, -1, -1, -1), cells], dim=1)
    batch, *sides, channels = cells.shape
    grid = [side // size for side in sides]
    bits = [2] * levels
    cubes = cells.reshape(batch, grid[0], *bits, grid[1], *bits, grid[2], *bits, channels)
    bands = cubes.permute(_cube_order(levels)).reshape(batch, *grid, -1)
    gain = (_rounded(tap, cells) ** 3 / math.sqrt(8)) ** levels
    return F.linear(bands, _signs(levels, channels, cells)).mul_(gain)


def unpatch(bands: Tensor, size: int, tap: float = EXACT_TAP, *, start: bool = True) -> Tensor:
    """Turn (B, 1 + k, h, w, C*size^3) into (B, 1 + size*k, h*size, w*size, C).

    Without `start` (see `patch`) k frames give size*k.
    """
    levels = size.bit_length() - 1
    batch, *grid, channels = bands.shape
    channels //= size**3
    gain = (math.sqrt(8) * _rounded(tap, bands) ** 3) ** levels
    cubes = F.linear(bands, _signs(levels, channels, bands)).mul_(gain)
    order = _cube_order(levels)
    inverse = [order.index(axis) for axis in range(len(order))]
    cubes = cubes.reshape(batch, *grid, *[2] * (3 * levels), channels).permute(inverse)
    cells = cubes.reshape(batch, *[size * side for side in grid], channels)
    return cells[:, size - 1 if start else 0 :]


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
    signs = torch.eye(channels, dtype=like.dtype, device=like.device)
    for _ in range(3 * levels):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def _rounded(tap: float, like: Tensor) -> float:
    return torch.tensor(tap, dtype=like.dtype, device="cpu").item()


def bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Squash `z` (..., C), any float dtype, into the open range of its levels; float32."""
    half = [(level - 1) * _WIDENING / 2 for level in levels]
    offset = [0.0 if level % 2 else 0.5 for level in levels]
    shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
    # float32: bf16 has too few bits near a rounding boundary between levels
    halves, offsets, shifts = torch.tensor([half, offset, shift], device=z.device)
    return torch.tanh(z.float() + shifts) * halves - offsets


def quantize(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Round `z` (..., C) to codes in [-1, 1], float32; the gradient passes straight through."""
    bounded = bound(z, levels)
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / _half_widths(levels, z.device)


def codes_to_indices(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Token ids (...), int32 in [0, prod(levels)), of `codes` (..., C); channel 0 is fastest."""
    halves = _half_widths(levels, codes.device)
    digits = (codes.float() * halves + halves).round().to(torch.int32)
    basis = torch.tensor(_basis(levels), dtype=torch.int32, device=codes.device)
    return (digits * basis).sum(-1, dtype=torch.int32)


def indices_to_codes(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes (..., C), float32, of integer `indices` (...).

    The ids must lie in [0, prod(levels)); this is not checked here, since looking would wait for
    the device.
    """
    basis = torch.tensor(_basis(levels), device=indices.device)
    sizes = torch.tensor(list(levels), device=indices.device)
    digits = indices.long().unsqueeze(-1) // basis % sizes
    halves = _half_widths(levels, indices.device)
    return (digits - halves) / halves


def _half_widths(levels: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([level // 2 for level in levels], dtype=torch.float32, device=device)


def _basis(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:channel]) for channel in range(len(levels))]
