"""Autoregressive transformer over discrete video tokens (Cosmos 1.0 and Predict1).

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/networks/transformer.py`; arXiv 2501.03575,
section 5.2. Base models and their Video2World relatives are one class: the latter add a table of
fixed positions before every layer and cross-attention to a text context.
Axes: B batch, S new tokens, D width, N query heads, M key heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.attention import attend
from worldline.nn.blocks import RMSNorm
from worldline.nn.kv_cache import KVCache
from worldline.nn.rope import Rotation, Yarn, rotate, rotation_3d, sincos_3d
from worldline.shapes import LatentShape

RELEASED_GRID = LatentShape(5, 40, 64)
FEED_FORWARD_ROWS = 2048  # tokens of a prompt at a time: nothing else in a layer is as wide

_SIZES = (
    "depth",
    "width",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "hidden",
    "vocabulary",
    "embedding_rows",
    "context_every",
)


@dataclass(frozen=True, kw_only=True)
class ARTransformerConfig:
    """Everything that fixes a weight's shape or the positions of a clip.

    Attributes:
        depth: number of layers.
        width: D, channels of the residual stream.
        num_heads: N.
        num_kv_heads: M; each serves N/M neighbouring query heads.
        head_size: K; N*K need not equal D.
        hidden: channels inside the feed-forward block.
        vocabulary: V, ids the model can emit.
        embedding_rows: ids it can read; Video2World adds special ids and pads to 64.
        grid: latent frames, rows and columns of a whole clip.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in every norm.
        yarn: stretching of the frequencies, or None.
        context_width: channels of the text context; None for a base model.
        context_every: cross-attention in layers 0, n, 2n, ...
        absolute_positions: add the fixed table before every layer.
        leading_tokens: tokens before the first cell (the begin-of-video id).
    """

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    embedding_rows: int
    grid: LatentShape = RELEASED_GRID
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    yarn: Yarn | None = None
    context_width: int | None = None
    context_every: int = 1
    absolute_positions: bool = False
    leading_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} is odd: rotary channels come in pairs")
        needed = self.vocabulary + min(1, self.leading_tokens)  # the begin token is the next id
        if self.embedding_rows < needed:
            raise ValueError(f"embedding_rows is {self.embedding_rows}; {needed} ids are read")

    @property
    def length(self) -> int:
        """Tokens of a whole clip, the leading ones included."""
        return self.leading_tokens + self.grid.tokens

    @property
    def begin_token(self) -> int:
        return self.vocabulary


def _released(**numbers: object) -> ARTransformerConfig:
    common = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "hidden": 14336,
        "vocabulary": 64000,
        "embedding_rows": 64000,
    }
    return ARTransformerConfig(**{**common, **numbers})  # type: ignore[arg-type]


_VIDEO2WORLD = {
    "embedding_rows": 64064,
    "context_width": 1024,
    "absolute_positions": True,
    "leading_tokens": 1,
}

PRESETS = {
    "4B": _released(depth=16, width=4096),
    "5B-Video2World": _released(depth=16, width=4096, **_VIDEO2WORLD),
    "12B": _released(depth=40, width=5120, yarn=Yarn()),
    "13B-Video2World": _released(depth=40, width=5120, yarn=Yarn(), **_VIDEO2WORLD),
}


# for each layer, keys and values of a text context; None where the layer reads none
EncodedContext = Sequence[tuple[Tensor, Tensor] | None]


class Positions(NamedTuple):
    """Where each token of a clip stands: rotation (length, K), and the fixed table (length, D)."""

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
    """Return the positions of a whole clip, computed in float32 and rounded to `dtype` at last.

    Of a longer clip, `first_frame` is the latent frame that the model sees first. The rotation goes
    on with time; the fixed table has no later time and stays as it is.
    """
    rotation = rotation_3d(
        config.grid,
        config.head_size,
        config.rope_theta,
        config.yarn,
        config.leading_tokens,
        first_frame,
    )
    table = None
    if config.absolute_positions:
        table = sincos_3d(config.grid, config.width, config.leading_tokens).to(device, dtype)
    return Positions(rotation.to(torch.device(device), dtype), table)


class Attention(nn.Module):
    """Grouped-query self-attention; norms on q and k before the rotation."""

    def __init__(self, config: ARTransformerConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = nn.Linear(config.width, config.num_heads * config.head_size, bias=False)
        self.k = nn.Linear(config.width, config.num_kv_heads * config.head_size, bias=False)
        self.v = nn.Linear(config.width, config.num_kv_heads * config.head_size, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps)
        self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(
        self, x: Tensor, rotation: Rotation, cache: KVCache | None, layer: int, start: int
    ) -> Tensor:
        # Split by head size, not head count: a column-sharded q/k/v then needs no change here.
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)) for project in (self.q, self.k, self.v)
        )  # (B, S, heads, K)
        q = rotate(self.q_norm(q).transpose(1, 2), rotation)
        k = rotate(self.k_norm(k).transpose(1, 2), rotation)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, start, k, v)
        y = attend(q, k, v, causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from the stream to a text context: no rotation, no causal mask."""

    def __init__(self, config: ARTransformerConfig) -> None:
        super().__init__()
        assert config.context_width is not None  # built for Video2World only
        self.head_size = config.head_size
        self.q = nn.Linear(config.width, config.num_heads * config.head_size, bias=False)
        self.k = nn.Linear(config.context_width, config.num_kv_heads * config.head_size, bias=False)
        self.v = nn.Linear(config.context_width, config.num_kv_heads * config.head_size, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps)
        self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def encode(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, M, rows, K); they are the same for every token."""
        k = self.k_norm(self.k(context).unflatten(-1, (-1, self.head_size)))
        v = self.v(context).unflatten(-1, (-1, self.head_size))
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, encoded: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_size)))
        y = attend(q.transpose(1, 2), *encoded, mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.split(FEED_FORWARD_ROWS, dim=-2)
        return torch.cat([self.down(F.silu(self.gate(r)) * self.up(r)) for r in rows], dim=-2)


class Layer(nn.Module):
    def __init__(self, config: ARTransformerConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.cross_attention_norm: RMSNorm | None = None
        self.cross_attention: CrossAttention | None = None
        if config.context_width is not None and number % config.context_every == 0:
            self.cross_attention_norm = RMSNorm(config.width, config.norm_eps)
            self.cross_attention = CrossAttention(config)
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
        x = x + self.attention(
            self.attention_norm(x), positions.rotation, cache, self.number, start
        )
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert context is not None, "a Video2World model needs its text context"
            x = x + self.cross_attention(self.cross_attention_norm(x), context, context_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ARTransformer(nn.Module):
    def __init__(self, config: ARTransformerConfig) -> None:
        super().__init__()
        self.config = config
        # not nn.Embedding(...): drawing its first weights on the meta device imports for 1.3 s
        table = torch.empty(config.embedding_rows, config.width)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def reset_parameters(self) -> None:
        """Draw fresh weights: N(0, 0.02), output projections scaled down by depth, norms at one."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            deep = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.config.depth) ** 0.5 if deep else 0.02)

    def new_cache(self, batch: int, length: int | None = None) -> KVCache:
        """Return an empty cache for `batch` clips, where the weights are and in their dtype."""
        weight = self.head.weight
        return KVCache.empty(
            layers=self.config.depth,
            batch=batch,
            heads=self.config.num_kv_heads,
            length=self.config.length if length is None else length,
            head_size=self.config.head_size,
            device=weight.device,
            dtype=weight.dtype,
        )

    def encode_context(self, context: Tensor) -> EncodedContext:
        """Return, for each layer, keys and values of a text context (B, rows, context_width)."""
        context = context.to(self.head.weight.dtype)
        return [
            None if layer.cross_attention is None else layer.cross_attention.encode(context)
            for layer in self.stack
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
        """Return logits (B, S, V), or (B, 1, V) of the last token, in the dtype of the weights.

        Args:
            tokens: (B, S) ids in [0, embedding_rows).
            positions: of the whole clip; rows start .. start + S - 1 are used.
            cache: holds the `start` tokens before these; filled in place.
            start: index in the clip of the first of `tokens`.
            context: what `encode_context` gave; Video2World only.
            context_mask: boolean (B, 1, 1, rows), True is visible; None shows all rows, which is
                what the released pipelines do.
            last_only: compute the logits of the last position alone.
        """
        here = positions.rows(start, tokens.shape[1])
        x = self.embedding(tokens)
        for layer in self.stack:
            encoded = None if context is None else context[layer.number]
            x = layer(x, here, cache, start, encoded, context_mask)
        if last_only:
            x = x[:, -1:]
        return self.head(self.norm(x))

    @property
    def stack(self) -> list[Layer]:
        """The layers in order."""
        return list(self.layers)  # type: ignore[arg-type]
