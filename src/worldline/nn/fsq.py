"""Finite scalar quantisation: vectors to integer ids and back, without a codebook.

Source: arXiv 2309.15505 (Mentzer et al.), equations 1-3; the numbers of
nvidia-cosmos/cosmos-predict1 `tokenizer/modules/quantizers.py`, class FSQuantizer.
Axes: the channel axis C = len(levels) is last in all three functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WIDENING = 1.001  # the bound reaches just past the outermost level, so that rounding can hit it


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
