"""Triton kernels of `worldline.tokenizers.wan.model`; import only where Triton is installed.

The arithmetic is float32 and rounded once at the end. Axes: B batch, T/H/W frames, rows, columns,
C channels.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

_BLOCK = 4096  # numbers of one program


@triton.jit
def _norm_silu_kernel(  # type: ignore[no-untyped-def]
    cells,
    bias,
    gamma,
    padded,
    rows,
    area,
    frames,
    reach,
    channels,
    eps,
    BIASED: constexpr,
    COPIES: constexpr,
    ROWS: constexpr,
    CHANNELS: constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    source = (clip * rows + row)[:, None] * channels + channel[None, :]
    x = tl.load(cells + source, inside, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
    weight = tl.load(gamma + channel, channel < channels, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    y = y * tl.sigmoid(y)
    y = y.to(padded.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        frame = row // area + reach - copy
        place = ((clip * frames + frame) * area + row % area) * COPIES + copy
        target = place[:, None] * channels + channel[None, :]
        tl.store(padded + target, y, inside & (frame < frames)[:, None])


@triton.jit
def _add_kernel(cells, bias, other, count, channels, SIZE: constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    x = tl.load(cells + place, inside, other=0.0).to(tl.float32)
    x += tl.load(bias + place % channels, inside, other=0.0).to(tl.float32)
    x += tl.load(other + place, inside, other=0.0).to(tl.float32)
    tl.store(cells + place, x.to(cells.dtype.element_ty), inside)


def norm_silu(
    cells: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    before: Tensor | None,
    reach: int,
    eps: float,
    *,
    flat: bool,
) -> Tensor:
    """`model.norm_silu` in one pass; `reach` is 2."""
    batch, frames, height, width, channels = cells.shape
    cells = cells.contiguous()
    copies = reach + 1 if flat else 1
    length = frames if flat else reach + frames
    padded = cells.new_empty(batch, length, height, width, copies * channels)
    for copy in range(copies):
        count = min(reach - copy, length)
        place = padded[:, :count, ..., copy * channels : (copy + 1) * channels]
        if before is None:
            place.zero_()
        else:
            place.copy_(before[:, copy : copy + count])
    rows = frames * height * width
    block = triton.next_power_of_2(channels)
    at_once = max(1, _BLOCK // block)
    with torch.cuda.device(cells.device):
        _norm_silu_kernel[(triton.cdiv(rows, at_once), batch)](
            cells,
            gamma if bias is None else bias.contiguous(),
            gamma.contiguous(),
            padded,
            rows,
            height * width,
            length,
            reach,
            channels,
            eps,
            BIASED=bias is not None,
            COPIES=copies,
            ROWS=at_once,
            CHANNELS=block,
            num_warps=4,
        )
    return padded


def add(cells: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """Add a bias (C,) and others of their size to cells (B, T, H, W, C), in place.

    torch adds the bias of a convolution in a pass of its own, an eighth of decoding.
    """
    cells = cells.contiguous()
    with torch.cuda.device(cells.device):
        _add_kernel[(triton.cdiv(cells.numel(), _BLOCK),)](
            cells,
            bias.contiguous(),
            other.contiguous(),
            cells.numel(),
            cells.shape[-1],
            SIZE=_BLOCK,
            num_warps=4,
        )
    return cells
