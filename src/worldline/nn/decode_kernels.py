"""Triton kernels for one decoding step of a few sequences, bound by the bytes of the weights.

Each kernel reads its weights once, and rounds to bf16 where the plain modules round, so that a
step agrees with them up to the order of sums. Products run on tensor cores, where the sum of a row
and a sequence does not depend on the sequences beside it: a sequence is the same bit for bit alone
and among others. Import only where Triton is installed.
Axes: B sequences, K head size, G query heads that share a key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

_BLOCK, _WARPS, _STAGES = 64, 4, 3
_SPLITS = 16  # programs a key head: with 8 key heads about one wave of an H200's 132 processors
_MOST_SPLITS = 64  # whose results one program joins,
_CHUNK = 8  # so many at once, as registers allow


@triton.jit
def normed(x, gamma, rstd):  # type: ignore[no-untyped-def]
    """Scale as `RMSNorm` does: round, then multiply by the weight, then round."""
    y = (x * rstd).to(tl.bfloat16).to(tl.float32)
    return (y * gamma).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _rstd(x, eps, COLUMNS: constexpr, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        part = tl.load(x + start + column, start + column < COLUMNS, other=0.0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares) / COLUMNS + eps)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, gamma, out, eps, COLUMNS: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0) * COLUMNS
    rstd = _rstd(x + row, eps, COLUMNS, BLOCK)
    column = tl.arange(0, BLOCK)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        at = start + column
        part = tl.load(x + row + at, at < COLUMNS, other=0.0).to(tl.float32)
        scale = tl.load(gamma + at, at < COLUMNS, other=0.0).to(tl.float32)
        tl.store(out + row + at, normed(part, scale, rstd).to(tl.bfloat16), at < COLUMNS)


@triton.jit
def _rows_of(  # type: ignore[no-untyped-def]
    x,
    gamma,
    rstd,
    start,
    BATCH: constexpr,
    COLUMNS: constexpr,
    NORM: constexpr,
    BLOCK_COLUMNS: constexpr,
    PADDED: constexpr,
):
    """Columns `start` and on of all sequences, (BLOCK_COLUMNS, PADDED) bf16."""
    at = start + tl.arange(0, BLOCK_COLUMNS)
    one = tl.arange(0, PADDED)
    if NORM:  # of one sequence
        part = tl.load(x + at, at < COLUMNS, other=0.0).to(tl.float32)
        scale = tl.load(gamma + at, at < COLUMNS, other=0.0).to(tl.float32)
        part = normed(part, scale, rstd).to(tl.bfloat16)
        return tl.where((one == 0)[None, :], part[:, None], 0.0)
    inside = (one < BATCH)[None, :] & (at < COLUMNS)[:, None]
    # both returns are compiled, and must be of one type
    return tl.load(x + one[None, :] * COLUMNS + at[:, None], inside, other=0.0).to(tl.bfloat16)


@triton.jit
def _columns_of(  # type: ignore[no-untyped-def]
    weight, row, start, COLUMNS: constexpr, BLOCK_COLUMNS: constexpr
):
    """Columns `start` and on of some rows of a matrix."""
    at = start + tl.arange(0, BLOCK_COLUMNS)
    pointers = weight + row.to(tl.int64)[:, None] * COLUMNS + at[None, :]
    if COLUMNS % BLOCK_COLUMNS == 0:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, (at < COLUMNS)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _matvec_kernel(  # type: ignore[no-untyped-def]
    x,
    gamma,
    weight0,
    weight1,
    weight2,
    residual,
    out,
    others,
    rows0,
    rows1,
    rows2,
    eps,
    BATCH: constexpr,
    COLUMNS: constexpr,
    NORM: constexpr,
    RESIDUAL: constexpr,
    OTHERS: constexpr,
    BLOCK_ROWS: constexpr,
    BLOCK_COLUMNS: constexpr,
    BLOCK_NORM: constexpr,
    PADDED: constexpr,
):
    block = tl.program_id(0)
    blocks0 = tl.cdiv(rows0, BLOCK_ROWS)
    blocks01 = blocks0 + tl.cdiv(rows1, BLOCK_ROWS)
    stride = rows0 + rows1 + rows2
    is_second = block >= blocks0
    is_third = block >= blocks01
    # after an `if` a pointer's alignment would be unknown, and with it the 16-byte loads
    weight = tl.where(is_third, weight2, tl.where(is_second, weight1, weight0))
    rows = tl.where(is_third, rows2, tl.where(is_second, rows1, rows0))
    out += tl.where(is_third, rows0 + rows1, tl.where(is_second, rows0, 0))
    block -= tl.where(is_third, blocks01, tl.where(is_second, blocks0, 0))

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    read = tl.minimum(row, rows - 1)
    rstd = 1.0
    if NORM:
        rstd = _rstd(x, eps, COLUMNS, BLOCK_NORM)
    sums = tl.zeros((BLOCK_ROWS, PADDED), tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        values = _columns_of(weight, read, start, COLUMNS, BLOCK_COLUMNS)
        part = _rows_of(x, gamma, rstd, start, BATCH, COLUMNS, NORM, BLOCK_COLUMNS, PADDED)
        sums = tl.dot(values, part, sums)
    y = sums.to(out.dtype.element_ty)
    one = tl.arange(0, PADDED)
    at = one[None, :] * stride + row[:, None]
    there = (one < BATCH)[None, :] & (row < rows)[:, None]
    if RESIDUAL:
        before = tl.load(residual + at, there, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + before).to(out.dtype.element_ty)
    tl.store(out + at, y, there)
    for other in tl.static_range(OTHERS):
        place = tl.load(others + other).to(tl.pointer_type(out.dtype.element_ty))
        tl.store(place + at, y, there)


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x,
    gamma,
    gate,
    up,
    out,
    rows,
    eps,
    BATCH: constexpr,
    COLUMNS: constexpr,
    NORM: constexpr,
    BLOCK_ROWS: constexpr,
    BLOCK_COLUMNS: constexpr,
    BLOCK_NORM: constexpr,
    PADDED: constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    read = tl.minimum(row, rows - 1)
    rstd = 1.0
    if NORM:
        rstd = _rstd(x, eps, COLUMNS, BLOCK_NORM)
    gate_sums = tl.zeros((BLOCK_ROWS, PADDED), tl.float32)
    up_sums = tl.zeros((BLOCK_ROWS, PADDED), tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        gate_values = _columns_of(gate, read, start, COLUMNS, BLOCK_COLUMNS)
        up_values = _columns_of(up, read, start, COLUMNS, BLOCK_COLUMNS)
        part = _rows_of(x, gamma, rstd, start, BATCH, COLUMNS, NORM, BLOCK_COLUMNS, PADDED)
        gate_sums = tl.dot(gate_values, part, gate_sums)
        up_sums = tl.dot(up_values, part, up_sums)
    g = gate_sums.to(tl.bfloat16).to(tl.float32)
    u = up_sums.to(tl.bfloat16).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(tl.bfloat16).to(tl.float32)
    one = tl.arange(0, PADDED)
    there = (one < BATCH)[None, :] & (row < rows)[:, None]
    tl.store(out + one[None, :] * rows + row[:, None], (activated * u).to(tl.bfloat16), there)


@triton.jit
def _turned(first, second, cos, sin):  # type: ignore[no-untyped-def]
    """First * cos + second * sin with the roundings of `rope.rotate` in bf16."""
    a = (first * cos).to(tl.bfloat16).to(tl.float32)
    b = (second * sin).to(tl.bfloat16).to(tl.float32)
    return (a + b).to(tl.bfloat16)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    qkv,
    q_gamma,
    k_gamma,
    cos,
    sin,
    keys,
    values,
    position,
    partial,
    stats,
    arrivals,
    out,
    length,
    key_heads,
    eps,
    scale,
    K: constexpr,
    GROUP: constexpr,
    PADDED: constexpr,
    SPLITS: constexpr,
    JOINED: constexpr,
    CHUNK: constexpr,
    BLOCK: constexpr,
    OWN: constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    # every sequence has its own queries, cache, scratch and result
    one = tl.program_id(2).to(tl.int64)
    heads = key_heads * GROUP
    width = heads * K
    if OWN:
        width += 2 * key_heads * K
    qkv += one * width
    out += one * heads * K
    keys += one * key_heads * length * K
    values += one * key_heads * length * K
    partial += one * heads * SPLITS * K
    stats += one * heads * SPLITS * 2
    arrivals += one * key_heads
    here = tl.load(position).to(tl.int64)
    visible = here + 1
    chunk = tl.cdiv(tl.cdiv(visible, SPLITS), BLOCK) * BLOCK
    start = split * chunk
    end = tl.minimum(start + chunk, visible)

    half: tl.constexpr = K // 2
    channel = tl.arange(0, half)
    wide = tl.arange(0, K)
    member = tl.arange(0, PADDED)
    is_member = (member < GROUP)[:, None]
    q_at = qkv + (head * GROUP + member)[:, None] * K + channel[None, :]
    q1 = tl.load(q_at, is_member, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + half, is_member, other=0.0).to(tl.float32)
    rstd = tl.rsqrt((tl.sum(q1 * q1, 1) + tl.sum(q2 * q2, 1)) / K + eps)[:, None]
    q1 = normed(q1, tl.load(q_gamma + channel).to(tl.float32)[None, :], rstd)
    q2 = normed(q2, tl.load(q_gamma + half + channel).to(tl.float32)[None, :], rstd)
    rows = keys + head.to(tl.int64) * length * K
    value_rows = values + head.to(tl.int64) * length * K
    if OWN:
        cos1 = tl.load(cos + here * K + channel).to(tl.float32)
        cos2 = tl.load(cos + here * K + half + channel).to(tl.float32)
        sin1 = tl.load(sin + here * K + channel).to(tl.float32)
        sin2 = tl.load(sin + here * K + half + channel).to(tl.float32)
        turned1 = _turned(q1, -q2, cos1[None, :], sin1[None, :])
        turned2 = _turned(q2, q1, cos2[None, :], sin2[None, :])
        if (start < visible) & (end == visible):
            # this program's part ends with the new token: its key and value are made here
            k_at = qkv + (heads + head) * K + channel
            k1 = tl.load(k_at).to(tl.float32)
            k2 = tl.load(k_at + half).to(tl.float32)
            k_rstd = tl.rsqrt((tl.sum(k1 * k1) + tl.sum(k2 * k2)) / K + eps)
            k1 = normed(k1, tl.load(k_gamma + channel).to(tl.float32), k_rstd)
            k2 = normed(k2, tl.load(k_gamma + half + channel).to(tl.float32), k_rstd)
            tl.store(rows + here * K + channel, _turned(k1, -k2, cos1, sin1))
            tl.store(rows + here * K + half + channel, _turned(k2, k1, cos2, sin2))
            v = tl.load(qkv + (heads + key_heads + head) * K + wide)
            tl.store(value_rows + here * K + wide, v)
            tl.debug_barrier()
    else:
        turned1 = q1.to(tl.bfloat16)
        turned2 = q2.to(tl.bfloat16)

    highest = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    mixed = tl.zeros((PADDED, K), tl.float32)
    for at in range(start, end, BLOCK):
        row = at + tl.arange(0, BLOCK)
        seen = row < end
        k_rows = rows + row[None, :] * K + channel[:, None]
        part1 = tl.load(k_rows, seen[None, :], other=0.0)
        part2 = tl.load(k_rows + half, seen[None, :], other=0.0)
        scores = (tl.dot(turned1, part1) + tl.dot(turned2, part2)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        part_v = tl.load(value_rows + row[:, None] * K + wide[None, :], seen[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(tl.bfloat16), part_v)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest

    slot = (head * GROUP + member) * SPLITS + split
    tl.store(partial + slot[:, None] * K + wide[None, :], mixed, is_member)
    tl.store(stats + slot * 2, highest, member < GROUP)
    tl.store(stats + slot * 2 + 1, total, member < GROUP)
    tl.debug_barrier()
    # the last program of a head to arrive joins the parts; .cg since others wrote them
    if tl.atomic_add(arrivals + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        query = head * GROUP + tl.arange(0, JOINED)
        there = query < (head + 1) * GROUP
        every = query[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
        tops = tl.load(stats + every * 2, there[:, None], other=0.0, cache_modifier=".cg")
        sums = tl.load(stats + every * 2 + 1, there[:, None], other=1.0, cache_modifier=".cg")
        top = tl.max(tops, 1)[:, None]
        whole = tl.sum(sums * tl.exp(tops - top), 1)
        y = tl.zeros((JOINED, CHUNK, K), tl.float32)
        for first in tl.static_range(0, SPLITS, CHUNK):
            some = query[:, None] * SPLITS + first + tl.arange(0, CHUNK)[None, :]
            stat = tl.load(stats + some * 2, there[:, None], other=0.0, cache_modifier=".cg")
            places = partial + some[:, :, None] * K + wide[None, None, :]
            part = tl.load(places, there[:, None, None], other=0.0, cache_modifier=".cg")
            y += part * tl.exp(stat - top)[:, :, None]
        joined = (tl.sum(y, 1) / whole[:, None]).to(tl.bfloat16)
        tl.store(out + query[:, None] * K + wide[None, :], joined, there[:, None])
        tl.store(arrivals + head, 0)


# tiles of a product, of a product after a norm, and of two products at once; measured on an H200
_NORM_WARPS = 2  # as many as the products have, so that a norm is summed as they do it themselves
_PLAIN = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 512, "num_warps": _NORM_WARPS, "num_stages": 3}
_NORMED = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128, "num_warps": _NORM_WARPS, "num_stages": 6}
_PAIR = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 256, "num_warps": _NORM_WARPS, "num_stages": 2}
# of matrices of which GPUs hold parts: fewer rows, so that a block has more in flight
_SMALL_PAIR = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128, "num_warps": _NORM_WARPS, "num_stages": 4}
_SMALL_ROWS = 8192


def _padded(batch: int) -> int:
    """Sequences that the tensor cores work for."""
    return max(8, int(triton.next_power_of_2(batch)))


def _normalise(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """RMS norm of `x` (B, columns), bf16."""
    batch, columns = x.shape
    out = torch.empty_like(x, dtype=gamma.dtype)
    _norm_kernel[(batch,)](
        x, gamma, out, eps, COLUMNS=columns, BLOCK=_norm_block(columns), num_warps=_NORM_WARPS
    )
    return out


def _norm_block(columns: int) -> int:
    return int(min(2048, triton.next_power_of_2(columns)))


def matvec(
    x: Tensor,
    weights: tuple[Tensor, ...],
    out: Tensor,
    *,
    gamma: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """Write the products of one or three bf16 matrices with `x` to `out`, one after another.

    Args:
        x: (B, columns) bf16; float32, too, where a norm follows.
        weights: one matrix, or three with equal columns; contiguous.
        out: (B, sum of rows) bf16; or float32, to which sums are written as they are.
        gamma: (columns,), weight of an RMS norm of x; None for no norm.
        eps: added to the mean square in that norm.
        residual: (B, rows) in the dtype of `out`, added to the product of one matrix; may be `out`.
        others: (n,) int64, addresses to which the product of one matrix is written, too.
    """
    batch, columns = x.shape
    rows = [weight.shape[0] for weight in weights] + [0, 0]
    tile = _PLAIN if gamma is None else _NORMED
    if gamma is not None and batch > 1:
        x, gamma = _normalise(x, gamma, eps), None
    blocks = sum(triton.cdiv(count, tile["BLOCK_ROWS"]) for count in rows[:3])
    _matvec_kernel[(blocks,)](
        x,
        x if gamma is None else gamma,
        *(weights * 3)[:3],
        x if residual is None else residual,
        out,
        out if others is None else others,
        *rows[:3],
        eps,
        BATCH=batch,
        COLUMNS=columns,
        NORM=gamma is not None,
        RESIDUAL=residual is not None,
        OTHERS=0 if others is None else len(others),
        BLOCK_NORM=_norm_block(columns),
        PADDED=_padded(batch),
        **tile,
    )
    return out


def gate_up(
    x: Tensor,
    weights: tuple[Tensor, ...],
    out: Tensor,
    *,
    gamma: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Write silu(gate x) * (up x) to `out` (B, rows), bf16; two weights, others as of `matvec`."""
    (batch, columns), rows = x.shape, len(weights[0])
    if gamma is not None and batch > 1:
        x, gamma = _normalise(x, gamma, eps), None
    tile = _PAIR if rows > _SMALL_ROWS else _SMALL_PAIR
    _gate_up_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
        x,
        x if gamma is None else gamma,
        *weights,
        out,
        rows,
        eps,
        BATCH=batch,
        COLUMNS=columns,
        NORM=gamma is not None,
        BLOCK_NORM=_norm_block(columns),
        PADDED=_padded(batch),
        **tile,
    )
    return out


class Attend:
    """Attention of one token of each sequence: norms, rotation, cache and softmax at once.

    Holds the scratch of the split softmax, so that a captured graph finds it at one address.
    """

    def __init__(
        self,
        *,
        batch: int = 1,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
        parts: int = 1,
    ) -> None:
        """Make the scratch; `parts` GPUs share the heads, so that each has room for more splits."""
        self.splits = min(_SPLITS * parts, _MOST_SPLITS)
        self.partial = torch.empty(batch, num_heads, self.splits, head_size, device=device)
        self.stats = torch.empty(batch, num_heads, self.splits, 2, device=device)
        self.arrivals = torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device)
        self.last_row: dict[int, Tensor] = {}  # by the number of rows

    def __call__(
        self,
        qkv: Tensor,
        gammas: tuple[Tensor, Tensor],
        eps: float,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Attention (B, N K) bf16, written to `out`.

        Self-attention has a position and a rotation, and adds the token's key and value to the
        cache. Cross-attention has neither: it reads queries alone, and all keys are visible.

        Args:
            qkv: (B, (N + 2 M) K) bf16: queries, keys, values before norm and rotation; or
                (B, N K), queries.
            gammas: (K,) each, weights of the query norm and of the key norm.
            eps: added to the mean square in both norms.
            keys: (B, M, length, K) bf16, contiguous, this layer's cache; row `position` is written.
            values: as `keys`.
            out: (B, N K) bf16.
            rotation: cosines and sines (length, K) bf16 of all positions.
            position: () integer on the device.
        """
        batch, key_heads, rows, head_size = keys.shape
        group = self.stats.shape[1] // key_heads
        if position is None and rows not in self.last_row:
            self.last_row[rows] = torch.full((), rows - 1, device=keys.device)
        _attend_kernel[(key_heads, self.splits, batch)](
            qkv,
            *gammas,
            *(rotation or (keys, keys)),
            keys,
            values,
            self.last_row[rows] if position is None else position,
            self.partial,
            self.stats,
            self.arrivals,
            out,
            rows,
            key_heads,
            eps,
            head_size**-0.5,
            K=head_size,
            GROUP=group,
            PADDED=max(16, triton.next_power_of_2(group)),
            SPLITS=self.splits,
            JOINED=triton.next_power_of_2(group),
            CHUNK=min(self.splits, _CHUNK),
            BLOCK=_BLOCK,
            OWN=position is not None,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        return out
