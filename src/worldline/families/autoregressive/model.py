"""Autoregressive transformer over discrete video tokens (Cosmos 1.0 and Predict1).

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/networks/transformer.py`; arXiv 2501.03575,
section 5.2. Base models and their Video2World relatives are one class: the latter add a table of
fixed positions before every layer and cross-attention to a text context.
Axes: B batch, S new tokens, D width, N query heads, M key heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.attention import KVCache, attend
from worldline.nn.rope import Rotation, Yarn, rotate, rotation_3d, sincos_3d
from worldline.parallel.tensor import ShardPlan
from worldline.shapes import LatentShape

RELEASED_GRID = LatentShape(5, 40, 64)
linear = partial(nn.Linear, bias=False)
# sizes of which each process of a tensor-parallel model holds an equal part
SHARED = ("num_heads", "num_kv_heads", "hidden", "vocabulary", "embedding_rows")
FEED_FORWARD_ROWS = 2048  # tokens of a prompt at a time: nothing else in a layer is as wide


@dataclass(frozen=True, kw_only=True)
class ARTransformerConfig:
    """Architecture: shapes of all weights and the positions of a clip; by default the 4B model's.

    Attributes:
        width: D, channels of the residual stream.
        num_kv_heads: M; each serves N/M neighbouring query heads.
        head_size: K; N*K need not equal D.
        vocabulary: V, ids the model can emit.
        embedding_rows: ids it can read; Video2World adds special ids and pads to 64.
        grid: of a whole clip.
        context_width: channels of the text context; None for a base model.
        context_every: cross-attention in layers 0, n, 2n, ...
        absolute_positions: add the fixed table before every layer.
    """

    depth: int = 16
    width: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    hidden: int = 14336
    vocabulary: int = 64000
    embedding_rows: int = 64000
    grid: LatentShape = RELEASED_GRID
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    yarn: Yarn | None = None
    context_width: int | None = None
    context_every: int = 1
    absolute_positions: bool = False

    @property
    def divisor(self) -> int:
        """Largest number of processes that can share the network; its divisors can, too."""
        return gcd(*(getattr(self, name) for name in SHARED))

    @property
    def divisors(self) -> list[int]:
        """Numbers of processes that can share the network, rising."""
        return [n for n in range(1, self.divisor + 1) if self.divisor % n == 0]

    def part(self, count: int) -> ARTransformerConfig:
        """What one of `count` tensor-parallel processes holds; the residual stream is whole."""
        return replace(self, **{name: getattr(self, name) // count for name in SHARED})

    @property
    def leading_tokens(self) -> int:
        """Tokens before the first cell: Video2World models begin with a token of their own."""
        return int(self.context_width is not None)

    @property
    def length(self) -> int:
        """Tokens of a whole clip, the leading ones included."""
        return self.leading_tokens + self.grid.tokens

    @property
    def stream_numbers(self) -> int:
        """Numbers of a token between two layers."""
        return self.width

    def saved_numbers(self, trained: Set[str], wide: int, compiled: bool) -> int:
        """Numbers of a token that a layer keeps while gradients are wanted, the mean of all.

        torch.compile computes norms and SiLU again.

        Args:
            trained: layers and norms of a layer whose weights are trained, or have an adapter, such
                as "attention.q".
            wide: numbers in the computation's precision that one in float32 takes.
            compiled: by torch.compile.
        """
        queries, keys = (n * self.head_size for n in (self.num_heads, self.num_kv_heads))
        # in float32; what its weight multiplies
        norm = 1 if compiled else wide + ("attention_norm" in trained)

        def normed(*layers: str) -> int:
            """The norm of the stream, and what the layers read."""
            return (norm + bool(trained & {*layers})) * self.width

        attention = normed("attention.q", "attention.k", "attention.v")
        attention += (norm + 1 + 1) * (queries + keys)  # rotated ones; the result, and values
        text = normed("cross_attention.q") + (norm + 1 + 1) * queries
        # gate and up, SiLU, the product
        hidden = (2 + (not compiled) + ("feed_forward.down" in trained)) * self.hidden
        hidden += normed("feed_forward.gate", "feed_forward.up")
        if compiled:
            hidden -= self.width  # counted: one of the norms' results is computed again, too
        return attention + hidden + (text // self.context_every if self.context_width else 0)

    def gradient_numbers(self, trained: Set[str]) -> int:
        """Numbers of a token of the gradients that a layer holds beside what it keeps.

        They are widest in the feed-forward: of gate and up.
        """
        return 2 * (self.width + self.hidden)

    def text_numbers(self, trained: Set[str], wide: int) -> int:
        """Numbers of a row of the text that all layers keep: keys, with their norm, and values."""
        keys = -(-self.depth // self.context_every) * self.num_kv_heads * self.head_size
        norm = wide + ("cross_attention.k_norm" in trained)
        return (norm + 1 + 1) * keys if self.context_width else 0

    def shared_numbers(self, trained: Set[str], wide: int) -> int:
        """Numbers of a token that are kept once: its positions."""
        return 2 * self.head_size + self.absolute_positions * self.width

    def flops(self, grid: LatentShape) -> float:
        """Operations of a forward of a clip, two for each multiplication.

        A pair of tokens attends once; a text is left out.
        """
        tokens = self.leading_tokens + grid.tokens
        queries, keys = (n * self.head_size for n in (self.num_heads, self.num_kv_heads))
        layer = 2 * self.width * (queries + keys) + 3 * self.width * self.hidden
        linear = self.depth * layer + self.width * self.vocabulary
        return float(2 * linear * tokens + 2 * self.depth * tokens**2 * queries)

    @property
    def begin_token(self) -> int:
        return self.vocabulary


_4B = ARTransformerConfig()
_5B = replace(_4B, embedding_rows=64064, context_width=1024, absolute_positions=True)
PRESETS = {
    "4B": _4B,
    "5B-Video2World": _5B,
    "12B": replace(_4B, depth=40, width=5120, yarn=Yarn()),
    "13B-Video2World": replace(_5B, depth=40, width=5120, yarn=Yarn()),
}


# of `Attention`, `FeedForward` and `ARTransformer`, when tensor-parallel processes share them
SHARD_PLAN = ShardPlan(
    ARTransformerConfig.part,
    {"embedding": "rows", "layers.*.out": "sum", "layers.*.down": "sum", "head": "columns"},
    partial=("layers.*.q_norm.weight", "layers.*.k_norm.weight"),
)
# for each layer, keys and values of a text context; None where the layer reads none
EncodedContext = Sequence[tuple[Tensor, Tensor] | None]


class Positions(NamedTuple):
    """Positions of the tokens of a clip: rotation (length, K), and the fixed table (length, D)."""

    rotation: Rotation
    table: Tensor | None

    def rows(self, start: int, count: int) -> Positions:
        table = None if self.table is None else self.table[start : start + count]
        return Positions(self.rotation.rows(start, count), table)


def make_positions(
    config: ARTransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    first_frame: int = 0,
) -> Positions:
    """Positions of a whole clip, computed in float32, then rounded to `dtype`.

    In a clip longer than the window, `first_frame` is the latent frame that the window begins with.
    The rotation goes on with time; the fixed table has no later time and stays as it is.
    """
    grid, leading, table = config.grid, config.leading_tokens, None
    rotation = rotation_3d(
        grid, config.head_size, config.rope_theta, config.yarn, leading, first_frame
    )
    if config.absolute_positions:
        table = sincos_3d(grid, config.width, leading).to(device, dtype)
    return Positions(rotation.to(torch.device(device), dtype), table)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis (arXiv 1910.07467), then scale.

    The statistics are float32; the result is cast back before it is multiplied by the weight, as in
    nvidia-cosmos/cosmos-predict1 `autoregressive/modules/normalization.py`.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # float32: squares of bf16 values would lose the mean
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with norms on q and k; causal and rotated, or to a text context."""

    def __init__(self, config: ARTransformerConfig, source_width: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = linear(config.width, config.num_heads * config.head_size)
        self.k = linear(source_width, config.num_kv_heads * config.head_size)
        self.v = linear(source_width, config.num_kv_heads * config.head_size)
        self.out = linear(config.num_heads * config.head_size, config.width)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps)
        self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, heads, K): split by head size, so that column-sharded layers need no change."""
        return x.unflatten(-1, (-1, self.head_size))

    def encode(self, source: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, M, S, K); those of a text are the same for every token."""
        source = source.to(self.k_norm.weight)  # in device and dtype
        k = self.k_norm(self.heads(self.k(source))).transpose(1, 2)
        v = self.heads(self.v(source)).transpose(1, 2)
        return (k if rotation is None else rotate(k, rotation)), v

    def forward(
        self,
        x: Tensor,
        keys_and_values: tuple[Tensor, Tensor],
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        q = self.q_norm(self.heads(self.q(x))).transpose(1, 2)
        q = q if rotation is None else rotate(q, rotation)
        y = attend(q, *keys_and_values, causal=rotation is not None, mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        # gradients need all rows at once in any case
        most = x.shape[-2] if torch.is_grad_enabled() else FEED_FORWARD_ROWS
        rows = x.split(most, dim=-2)
        return torch.cat([self.down(F.silu(self.gate(r)) * self.up(r)) for r in rows], dim=-2)


class Layer(nn.Module):
    """Pre-norm layer: causal self-attention, in some layers attention to a text, SwiGLU."""

    def __init__(self, config: ARTransformerConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, config.width)
        self.cross_attention: Any = None
        if config.context_width is not None and number % config.context_every == 0:
            self.cross_attention_norm = RMSNorm(config.width, config.norm_eps)
            self.cross_attention = Attention(config, config.context_width)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        cache: KVCache | None,
        start: int,
        context: tuple[Tensor, Tensor] | None,
        context_mask: Tensor | None,
    ) -> Tensor:
        if positions.table is not None:
            x = x + positions.table
        y = self.attention_norm(x)
        k, v = self.attention.encode(y, positions.rotation)
        if cache is not None:
            k, v = cache.append(self.number, start, k, v)
        x = x + self.attention(y, (k, v), positions.rotation)
        if self.cross_attention is not None:
            assert context is not None, "a Video2World model needs its text context"
            x = x + self.cross_attention(self.cross_attention_norm(x), context, mask=context_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ARTransformer(nn.Module):
    """Llama-like decoder over discrete video tokens, with rotary positions in time and space."""

    SHARDS: ClassVar[ShardPlan] = SHARD_PLAN

    def __init__(self, config: ARTransformerConfig) -> None:
        super().__init__()
        self.config = config
        # not nn.Embedding(...): drawing its first weights on the meta device imports for 1.3 s
        table = torch.empty(config.embedding_rows, config.width)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers: Any = nn.ModuleList(Layer(config, number) for number in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocabulary)

    def new_cache(self, batch: int) -> KVCache:
        """Empty cache for `batch` clips, on the device and in the dtype of the weights."""
        config, weight = self.config, self.head.weight
        shape = (config.depth, batch, config.num_kv_heads, config.length, config.head_size)
        return KVCache(*weight.new_zeros(2, *shape))

    def encode_context(self, context: Tensor | None) -> EncodedContext:
        """Keys and values of a text context (B, rows, context_width), for each layer.

        A base model, whose layers read none, has none.
        """
        return [
            layer.cross_attention and layer.cross_attention.encode(context) for layer in self.layers
        ]

    def forward(
        self,
        tokens: Tensor,
        positions: Positions,
        *,
        cache: KVCache | None = None,
        start: int = 0,
        context: EncodedContext | None = None,
        context_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, S, V), or (B, 1, V) of the last token, in the dtype of the weights.

        Args:
            tokens: (B, S) ids in [0, embedding_rows).
            positions: those of the whole clip.
            cache: holds the `start` tokens before these; filled in place.
            start: index in the clip of the first of `tokens`.
            context: from `encode_context`; Video2World only.
            context_mask: boolean (B, 1, 1, rows), True is visible; None is all, as released.
            last_only: compute the logits of the last position alone.
        """
        x = self.hidden(
            tokens, positions, cache=cache, start=start, context=context, context_mask=context_mask
        )
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def hidden(
        self,
        tokens: Tensor,
        positions: Positions,
        *,
        cache: KVCache | None = None,
        start: int = 0,
        context: EncodedContext | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Residual stream (B, S, D) behind the layers; arguments are those of `forward`."""
        here = positions.rows(start, tokens.shape[1])
        x = self.embedding(tokens)
        for layer in self.layers:
            encoded = None if context is None else context[layer.number]
            x = layer(x, here, cache, start, encoded, context_mask)
        return x
