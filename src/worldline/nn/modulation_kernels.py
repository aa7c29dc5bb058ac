"""Triton kernels of `worldline.nn.modulation`: each reads and writes its activations once.

The arithmetic is float32 throughout and rounded once at the end, so that a result differs from the
plain form by the roundings that the plain form makes in between. Import only where Triton is
installed. Axes: B batch, L tokens, D width, N heads, K head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from worldline.nn.rope import Rotation


@triton.jit
def _modulate_kernel(  # type: ignore[no-untyped-def]
    stream,
    update,
    gate,
    added,
    shift,
    scale,
    normed,
    length,
    run,
    width,
    eps,
    UPDATE: constexpr,
    ADDED: constexpr,
    BLOCK: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    vector = row // run * width  # of the modulation that this row's run shares
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    x = tl.load(stream + place, inside, other=0.0).to(tl.float32)
    if UPDATE:
        y = tl.load(update + place, inside, other=0.0).to(tl.float32)
        g = tl.load(gate + vector + column, inside, other=0.0).to(tl.float32)
        x += g * y
    if ADDED:
        e = tl.load(added + (row % length) * width + column, inside, other=0.0)
        x += e.to(tl.float32)
    if UPDATE or ADDED:
        x = x.to(stream.dtype.element_ty)
        tl.store(stream + place, x, inside)
        x = x.to(tl.float32)  # the norm sees the stream as it is stored
    mean = tl.sum(x) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / width + eps)
    a = tl.load(scale + vector + column, inside, other=0.0).to(tl.float32)
    b = tl.load(shift + vector + column, inside, other=0.0).to(tl.float32)
    y = centred * rstd * (1 + a) + b
    tl.store(normed + place, y.to(normed.dtype.element_ty), inside)


def add_and_modulate(
    stream: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`modulation.add_and_modulate`; the stream changes in place."""
    batch, length, width = stream.shape
    stream = stream.contiguous()
    normed = torch.empty_like(stream, dtype=dtype)
    runs = 1 if shift.ndim == 2 else shift.shape[1]

    def pointer(x: Tensor | None) -> Tensor:
        """Any, where there is nothing to read."""
        return stream if x is None else x.contiguous()

    with torch.cuda.device(stream.device):
        _modulate_kernel[(batch * length,)](
            stream,
            *map(pointer, (update, gate, added, shift, scale)),
            normed,
            length,
            length // runs,
            width,
            eps,
            UPDATE=update is not None,
            ADDED=added is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )
    return stream, normed


@triton.jit
def _norm_heads_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    cos,
    sin,
    length,
    heads,
    row_stride,
    eps,
    SIZE: constexpr,
    ROTATE: constexpr,
    BLOCK_HEADS: constexpr,
    HALF: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (channel < SIZE // 2)[None, :]
    place = x + row * row_stride + head[:, None] * SIZE + channel[None, :]
    first = tl.load(place, inside, other=0.0).to(tl.float32)
    second = tl.load(place + SIZE // 2, inside, other=0.0).to(tl.float32)
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SIZE
    rstd = tl.rsqrt(mean + eps)[:, None]
    w = tl.load(weight + channel, channel < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    v = tl.load(weight + SIZE // 2 + channel, channel < SIZE // 2, other=0.0)
    first = first * rstd * w
    second = second * rstd * v.to(tl.float32)[None, :]
    if ROTATE:
        token = row % length
        angle = token * SIZE + channel
        c = tl.load(cos + angle, channel < SIZE // 2, other=0.0)[None, :]
        s = tl.load(sin + angle, channel < SIZE // 2, other=0.0)[None, :]
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    kind = x.dtype.element_ty
    tl.store(place, first.to(kind), inside)
    tl.store(place + SIZE // 2, second.to(kind), inside)


def norm_heads(x: Tensor, weight: Tensor, rotation: Rotation | None, eps: float) -> Tensor:
    """`modulation.norm_heads`, in place."""
    batch, length, heads, size = x.shape
    if x.stride(3) != 1 or x.stride(2) != size or x.stride(0) != length * x.stride(1):
        x = x.contiguous()
    block = min(triton.next_power_of_2(heads), 32)
    with torch.cuda.device(x.device):
        _norm_heads_kernel[(batch * length, triton.cdiv(heads, block))](
            x,
            weight,
            *(table.contiguous() for table in rotation or (weight, weight)),
            length,
            heads,
            x.stride(1),
            eps,
            SIZE=size,
            ROTATE=rotation is not None,
            BLOCK_HEADS=block,
            HALF=triton.next_power_of_2(size // 2),
            num_warps=4,
        )
    return x
