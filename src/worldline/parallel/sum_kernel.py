"""Triton kernel that adds what several GPUs give to the residual stream of a few tokens.

Import only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from worldline.nn.decode_kernels import normed as scaled


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    addends,
    flags,
    turn,
    stream,
    added,
    gamma,
    total,
    normed,
    eps,
    RANK: constexpr,
    COUNT: constexpr,
    COLUMNS: constexpr,
    STREAM: constexpr,
    ADDED: constexpr,
    BLOCK: constexpr,
):
    row = tl.program_id(0)
    if RANK >= 0:
        # counts sums in this process and in the others, who may be one ahead: never reset
        now = tl.load(turn + row) + 1
        tl.debug_barrier()  # all threads have read it
        for other in tl.static_range(COUNT):
            if other != RANK:
                flag = tl.load(flags + other).to(tl.pointer_type(tl.int32)) + row * COUNT + RANK
                tl.atomic_xchg(flag, now, sem="release", scope="sys")
        own = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + row * COUNT
        for other in tl.static_range(COUNT):
            if other != RANK:
                # the difference is right beyond the largest number, too
                while tl.atomic_add(own + other, 0, sem="acquire", scope="sys") - now < 0:
                    pass
        tl.store(turn + row, now)
        tl.debug_barrier()
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    x = tl.zeros((BLOCK,), tl.float32)
    for process in tl.static_range(COUNT):  # .cg since others wrote it
        place = addends + (process * tl.num_programs(0) + row) * COLUMNS
        x += tl.load(place + at, inside, other=0.0, cache_modifier=".cg")
    if STREAM:
        x += tl.load(stream + row * COLUMNS + at, inside, other=0.0)
    if ADDED:
        x += tl.load(added + at, inside, other=0.0).to(tl.float32)
    tl.store(total + row * COLUMNS + at, x, inside)
    rstd = tl.rsqrt(tl.sum(x * x) / COLUMNS + eps)
    scale = tl.load(gamma + at, inside, other=0.0).to(tl.float32)
    tl.store(normed + row * COLUMNS + at, scaled(x, scale, rstd).to(tl.bfloat16), inside)


def add_and_normalise(
    addends: Tensor,
    stream: Tensor | None,
    gamma: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    flags: tuple[int, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add addends to the residual stream: the stream (B, columns), and its RMS norm, bf16.

    Args:
        addends: (n, B, columns) float32, added in this order, so that all have the same stream.
        stream: (B, columns) float32; None at the first sum, which is the stream.
        gamma: (columns,), weight of the norm.
        eps: added to the mean square in the norm.
        added: (1, columns), added to all rows, too.
        flags: where n processes write each other's addends: number of this one, addresses (n,)
            int64 of the flags (B, n) int32 of all, and sums begun (B,) int32. Each waits until all
            have begun the sum.
    """
    count, batch, columns = addends.shape
    total = torch.empty_like(addends[0])
    normed = torch.empty_like(total, dtype=gamma.dtype)
    _add_kernel[(batch,)](
        addends,
        *((addends,) * 2 if flags is None else flags[1:]),
        total if stream is None else stream,
        gamma if added is None else added,
        gamma,
        total,
        normed,
        eps,
        RANK=-1 if flags is None else flags[0],
        COUNT=count,
        COLUMNS=columns,
        STREAM=stream is not None,
        ADDED=added is not None,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=16,
    )
    return total, normed
