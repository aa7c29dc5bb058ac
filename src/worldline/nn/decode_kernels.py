"""Triton kernels for one decoding step of a few sequences, bound by the bytes of the weights.

Each kernel reads its weights once, and rounds to bf16 where the plain modules round, so that a
step agrees with them up to the order of sums. Every sum of a sequence is made in the same order
however many sequences there are, so a sequence is the same bit for bit alone and beside others: a
program multiplies its rows of a matrix with one sequence after another, from the second on out of
the cache of its processor. Import only where Triton is installed.
Axes: B sequences, K head size, G query heads that share a key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS, _STAGES = 64, 4, 3
_SPLITS = 16  # programs a key head: with 8 key heads about one wave of an H200's 132 processors


@triton.jit
def _normed(x, gamma, rstd):  # type: ignore[no-untyped-def]
    """Scale as `RMSNorm` does: round, then multiply by the weight, then round."""
    y = (x * rstd).to(tl.bfloat16).to(tl.float32)
    return (y * gamma).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _matvec_rows(  # type: ignore[no-untyped-def]
    x,
    gamma,
    weight,
    residual,
    out,
    row,
    rows,
    eps,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
):
    column = tl.arange(0, BLOCK_COLUMNS)
    rstd = 1.0
    if NORM:
        squares = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
            part = tl.load(x + start + column, start + column < COLUMNS, other=0.0).to(tl.float32)
            squares += part * part
        rstd = tl.rsqrt(tl.sum(squares) / COLUMNS + eps)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    pointers = weight + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
        inside = start + column < COLUMNS
        values = tl.load(
            pointers + start,
            (row < rows)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy=KEEP,
        )
        part = tl.load(x + start + column, inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.load(gamma + start + column, inside, other=0.0).to(tl.float32)
            part = _normed(part, scale, rstd)
        sums += values.to(tl.float32) * part[None, :]
    y = tl.sum(sums, 1).to(tl.bfloat16)
    if RESIDUAL:
        before = tl.load(residual + row, row < rows).to(tl.float32)
        y = (y.to(tl.float32) + before).to(tl.bfloat16)
    tl.store(out + row, y, row < rows)


@triton.jit
def _matvec_kernel(  # type: ignore[no-untyped-def]
    x,
    gamma,
    weight0,
    weight1,
    weight2,
    residual,
    out,
    rows0,
    rows1,
    rows2,
    eps,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK_ROWS)
    # one branch a matrix: a pointer chosen at run time would lose its alignment, and with it the
    # 16-byte loads
    if WEIGHTS == 1:
        for one in range(BATCH):
            _matvec_rows(
                x + one * COLUMNS, gamma, weight0, residual + one * rows0, out + one * rows0,
                block * BLOCK_ROWS + lane, rows0, eps,
                COLUMNS, NORM, RESIDUAL, BLOCK_ROWS, BLOCK_COLUMNS, KEEP,
            )  # fmt: skip
    else:
        blocks0 = tl.cdiv(rows0, BLOCK_ROWS)
        blocks1 = tl.cdiv(rows1, BLOCK_ROWS)
        rows = rows0 + rows1 + rows2
        if block < blocks0:
            for one in range(BATCH):
                _matvec_rows(
                    x + one * COLUMNS, gamma, weight0, residual, out + one * rows,
                    block * BLOCK_ROWS + lane, rows0, eps,
                    COLUMNS, NORM, RESIDUAL, BLOCK_ROWS, BLOCK_COLUMNS, KEEP,
                )  # fmt: skip
        elif block < blocks0 + blocks1:
            for one in range(BATCH):
                _matvec_rows(
                    x + one * COLUMNS, gamma, weight1, residual, out + one * rows + rows0,
                    (block - blocks0) * BLOCK_ROWS + lane, rows1, eps,
                    COLUMNS, NORM, RESIDUAL, BLOCK_ROWS, BLOCK_COLUMNS, KEEP,
                )  # fmt: skip
        else:
            for one in range(BATCH):
                _matvec_rows(
                    x + one * COLUMNS, gamma, weight2, residual, out + one * rows + rows0 + rows1,
                    (block - blocks0 - blocks1) * BLOCK_ROWS + lane, rows2, eps,
                    COLUMNS, NORM, RESIDUAL, BLOCK_ROWS, BLOCK_COLUMNS, KEEP,
                )  # fmt: skip


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x,
    gamma,
    gate,
    up,
    out,
    rows,
    eps,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for one in range(BATCH):
        _gate_up_rows(
            x + one * COLUMNS, gamma, gate, up, out + one * rows, row, rows, eps,
            COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, KEEP,
        )  # fmt: skip


@triton.jit
def _gate_up_rows(  # type: ignore[no-untyped-def]
    x,
    gamma,
    gate,
    up,
    out,
    row,
    rows,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
):
    column = tl.arange(0, BLOCK_COLUMNS)
    squares = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
        part = tl.load(x + start + column, start + column < COLUMNS, other=0.0).to(tl.float32)
        squares += part * part
    rstd = tl.rsqrt(tl.sum(squares) / COLUMNS + eps)
    gate_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    up_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    offsets = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
        inside = start + column < COLUMNS
        mask = (row < rows)[:, None] & inside[None, :]
        gate_values = tl.load(gate + offsets + start, mask, other=0.0, eviction_policy=KEEP)
        up_values = tl.load(up + offsets + start, mask, other=0.0, eviction_policy=KEEP)
        part = tl.load(x + start + column, inside, other=0.0).to(tl.float32)
        part = _normed(
            part, tl.load(gamma + start + column, inside, other=0.0).to(tl.float32), rstd
        )
        gate_sums += gate_values.to(tl.float32) * part[None, :]
        up_sums += up_values.to(tl.float32) * part[None, :]
    g = tl.sum(gate_sums, 1).to(tl.bfloat16).to(tl.float32)
    u = tl.sum(up_sums, 1).to(tl.bfloat16).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(tl.bfloat16).to(tl.float32)
    tl.store(out + row, (activated * u).to(tl.bfloat16), row < rows)


@triton.jit
def _turned(first, second, cos, sin):  # type: ignore[no-untyped-def]
    """Return first * cos + second * sin with the roundings of `rope.rotate` in bf16."""
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
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
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
    q1 = _normed(q1, tl.load(q_gamma + channel).to(tl.float32)[None, :], rstd)
    q2 = _normed(q2, tl.load(q_gamma + half + channel).to(tl.float32)[None, :], rstd)
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
            k1 = _normed(k1, tl.load(k_gamma + channel).to(tl.float32), k_rstd)
            k2 = _normed(k2, tl.load(k_gamma + half + channel).to(tl.float32), k_rstd)
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
        part_number = tl.arange(0, SPLITS)
        for query in tl.static_range(GROUP):
            base = (head * GROUP + query) * SPLITS + part_number
            tops = tl.load(stats + base * 2, cache_modifier=".cg")
            totals = tl.load(stats + base * 2 + 1, cache_modifier=".cg")
            factors = tl.exp(tops - tl.max(tops))
            parts = tl.load(partial + base[:, None] * K + wide[None, :], cache_modifier=".cg")
            y = tl.sum(parts * factors[:, None], 0) / tl.sum(totals * factors)
            tl.store(out + (head * GROUP + query) * K + wide, y.to(tl.bfloat16))
        tl.store(arrivals + head, 0)


def _tile(columns: int, normed: bool) -> tuple[int, int, int]:
    """Return rows and columns of a program's tile, and its warps; measured on an H200."""
    block_columns = min(2048, triton.next_power_of_2(columns))
    if normed:
        return 4, block_columns, 4
    return (2 if columns <= 8192 else 4), block_columns, 8


def matvec(
    x: Tensor,
    weights: tuple[Tensor, ...],
    out: Tensor,
    *,
    gamma: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Write the products of one or three bf16 matrices with `x` to `out`, one after another.

    Args:
        x: (B, columns) bf16.
        weights: one matrix, or three with equal columns; contiguous.
        out: (B, sum of rows) bf16.
        gamma: (columns,); if given, x is normalised and scaled by it first.
        eps: of that norm.
        residual: (B, rows), added to the product of one matrix; may be `out`.
    """
    batch, columns = x.shape
    rows = [weight.shape[0] for weight in weights] + [0, 0]
    block_rows, block_columns, warps = _tile(columns, gamma is not None)
    blocks = sum(triton.cdiv(count, block_rows) for count in rows[:3])
    _matvec_kernel[(blocks,)](
        x,
        x if gamma is None else gamma,
        weights[0],
        weights[min(1, len(weights) - 1)],
        weights[-1],
        x if residual is None else residual,
        out,
        *rows[:3],
        eps,
        BATCH=batch,
        COLUMNS=columns,
        WEIGHTS=len(weights),
        NORM=gamma is not None,
        RESIDUAL=residual is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        KEEP=_keep(batch),
        num_warps=warps,
    )
    return out


def gate_up(x: Tensor, gamma: Tensor, eps: float, gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Write silu(gate y) * (up y), y = RMS norm of `x` (B, columns), to `out` (B, rows); bf16."""
    batch, columns = x.shape
    _gate_up_kernel[(gate.shape[0],)](
        x,
        gamma,
        gate,
        up,
        out,
        gate.shape[0],
        eps,
        BATCH=batch,
        COLUMNS=columns,
        BLOCK_ROWS=1,  # of both matrices
        BLOCK_COLUMNS=min(2048, triton.next_power_of_2(columns)),
        KEEP=_keep(batch),
        num_warps=8,
    )
    return out


def _keep(batch: int) -> str:
    """Return how the caches treat weights: read once, or once a sequence."""
    return "evict_first" if batch == 1 else "evict_last"


class Attend:
    """Attention of one new token of each sequence: norms, rotation, cache and softmax at once.

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
    ) -> None:
        self.batch = batch
        self.group = num_heads // num_kv_heads
        self.key_heads = num_kv_heads
        self.head_size = head_size
        self.partial = torch.empty(batch, num_heads, _SPLITS, head_size, device=device)
        self.stats = torch.empty(batch, num_heads, _SPLITS, 2, device=device)
        self.arrivals = torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device)
        self.last_row: dict[int, Tensor] = {}  # by the number of rows

    def __call__(
        self,
        qkv: Tensor,
        q_gamma: Tensor,
        k_gamma: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write the attention of the token at `position` to `out`, and its key and value away.

        Args:
            qkv: (B, (N + 2 M) K) bf16: queries, keys, values before norm and rotation.
            q_gamma: (K,) weight of the query norm.
            k_gamma: (K,) weight of the key norm.
            eps: of both norms.
            cos: (length, K) bf16 of all positions.
            sin: as `cos`.
            keys: (B, M, length, K) bf16, this layer's cache; row `position` is written.
            values: as `keys`.
            position: () integer on the device.
            out: (B, N K) bf16.
        """
        self._launch(qkv, (q_gamma, k_gamma), eps, (cos, sin), keys, values, position, out, True)
        return out

    def read(
        self, queries: Tensor, gamma: Tensor, eps: float, keys: Tensor, values: Tensor, out: Tensor
    ) -> Tensor:
        """Write to `out` the attention to keys that are there: no rotation, nothing is added.

        Args:
            queries: (B, N K) bf16, before the norm.
            gamma: (K,) weight of the norm.
            eps: of the norm.
            keys: (B, M, rows, K) bf16, contiguous; all are seen.
            values: as `keys`.
            out: (B, N K) bf16.
        """
        rows = keys.shape[2]
        if rows not in self.last_row:
            self.last_row[rows] = torch.full((), rows - 1, device=keys.device)
        last = self.last_row[rows]
        self._launch(queries, (gamma, gamma), eps, (keys, keys), keys, values, last, out, False)
        return out

    def _launch(
        self,
        qkv: Tensor,
        gammas: tuple[Tensor, Tensor],
        eps: float,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        out: Tensor,
        own: bool,
    ) -> None:
        _attend_kernel[(self.key_heads, _SPLITS, self.batch)](
            qkv,
            *gammas,
            *rotation,
            keys,
            values,
            position,
            self.partial,
            self.stats,
            self.arrivals,
            out,
            keys.shape[2],
            self.key_heads,
            eps,
            self.head_size**-0.5,
            K=self.head_size,
            GROUP=self.group,
            PADDED=max(16, triton.next_power_of_2(self.group)),
            SPLITS=_SPLITS,
            BLOCK=_BLOCK,
            OWN=own,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )


def compile_for(
    *,
    batch: int,
    width: int,
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    length: int,
    context: bool,
    device: torch.device,
) -> None:
    """Run every kernel once on a few rows; they are compiled for column counts, not for rows.

    Of the cache's `length` it matters whether 16 divides it.
    """

    def blank(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    heads = num_heads * head_size
    rows, x, gamma = blank(16, width), blank(batch, width), blank(width)
    matvec(x, (rows, rows, rows), blank(batch, 48), gamma=gamma, eps=1.0)
    matvec(x, (rows,), blank(batch, 16), gamma=gamma, eps=1.0)
    for columns in (heads, hidden):
        residual = blank(batch, 16)
        matvec(blank(batch, columns), (blank(16, columns),), blank(batch, 16), residual=residual)
    gate_up(x, gamma, 1.0, rows, rows, blank(batch, 16))
    attend = Attend(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        device=device,
    )
    table, norm = blank(16, head_size), blank(head_size)
    if context:
        seen = blank(batch, num_kv_heads, 16, head_size)
        attend.read(blank(batch, heads), norm, 1.0, seen, seen, blank(batch, heads))
    cache = blank(batch, num_kv_heads, 16 + length % 16, head_size)
    attend(
        blank(batch, heads + 2 * num_kv_heads * head_size),
        norm,
        norm,
        1.0,
        table,
        table,
        cache,
        cache.clone(),
        torch.zeros((), dtype=torch.int64, device=device),
        blank(batch, heads),
    )
