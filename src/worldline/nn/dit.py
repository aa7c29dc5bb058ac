"""Parts that the diffusion transformers of Predict1 and Predict2.5 share.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/module/{blocks,attention}.py`; nvidia-cosmos/
cosmos-predict2.5 `_src/predict2/networks/minimal_v4_dit.py`, whose blocks are the same.
Axes: B batch, C channels, T/H/W latent grid, L tokens, D width, N heads, K head size, S rows of
the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.attention import AttentionCore
from worldline.nn.modulation import norm_heads
from worldline.nn.rope import Rotation
from worldline.shapes import LatentShape

# keys and values (B, N, S, K) of the text, block by block
Context = list[tuple[Tensor, Tensor]]

_COUNTS = ("depth", "width", "num_heads", "head_size", "hidden", "context_width", "lora_rank")
# hidden activations of the feed-forward that exist at once; 56,320 tokens of 14B would need 2.3 GB
HIDDEN_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class DiTSizes:
    """What fixes the weights of a block, and the tokens of a grid.

    Attributes:
        depth: number of blocks.
        width: D.
        num_heads: N.
        head_size: K.
        hidden: channels inside the feed-forward.
        context_width: of the text that the blocks attend to.
        lora_rank: of the modulation's low-rank matrices.
        max_grid: tokens of the largest grid.
        rope_ratio: stretching of the rotary positions in time, rows and columns.
        latent_channels: C of the input, without the masks.
        out_channels: C of the output.
        patch: latent cells a token covers in time, rows and columns.
    """

    depth: int
    width: int
    num_heads: int
    head_size: int
    hidden: int
    context_width: int
    lora_rank: int
    max_grid: LatentShape
    rope_ratio: tuple[float, float, float]
    latent_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_size < 12 or self.head_size % 2:
            # below, an axis of the rotation has two channels, which no stretching fits
            raise ValueError(f"head_size is {self.head_size}; it must be even and at least 12")
        if self.patch[0] != 1:
            raise ValueError(f"patch is {self.patch}; a token covers one latent frame")

    @property
    def patch_cells(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    def tokens(self, grid: LatentShape) -> LatentShape:
        """Return the grid of tokens of a latent grid.

        Raises:
            ValueError: a side is no multiple of the patch, or the positions end before it.
        """
        _, rows, columns = self.patch
        if grid.height % rows or grid.width % columns:
            raise ValueError(
                f"a latent grid of {grid.height} x {grid.width} cells: "
                f"sides must be multiples of {rows} and {columns}"
            )
        tokens = LatentShape(grid.frames, grid.height // rows, grid.width // columns)
        largest = self.max_grid
        if (
            tokens.frames > largest.frames
            or tokens.height > largest.height
            or tokens.width > largest.width
        ):
            raise ValueError(
                f"a latent grid of {grid.frames} x {grid.height} x {grid.width} cells is beyond "
                f"the model's positions ({largest.frames} x {largest.height * rows} x "
                f"{largest.width * columns})"
            )
        return tokens


class Attention(nn.Module):
    """Projections, norms of heads, and the core that both kinds of attention have."""

    def __init__(self, sizes: DiTSizes, source_width: int) -> None:
        super().__init__()
        inner = sizes.num_heads * sizes.head_size
        self.head_size = sizes.head_size
        self.q = nn.Linear(sizes.width, inner, bias=False)
        self.k = nn.Linear(source_width, inner, bias=False)
        self.v = nn.Linear(source_width, inner, bias=False)
        self.q_norm = nn.Parameter(torch.empty(sizes.head_size))
        self.k_norm = nn.Parameter(torch.empty(sizes.head_size))
        self.out = nn.Linear(inner, sizes.width, bias=False)
        self.core = AttentionCore()

    def heads(self, x: Tensor) -> Tensor:
        """Return (B, L, N, K): split by head size, so that column-sharded layers need no change."""
        return x.unflatten(-1, (-1, self.head_size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (B, L, D) for q (B, N, L, K), k and v (B, N, S, K)."""
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__(sizes, sizes.width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q = norm_heads(self.heads(self.q(x)), self.q_norm, rotation).transpose(1, 2)
        k = norm_heads(self.heads(self.k(x)), self.k_norm, rotation).transpose(1, 2)
        return self.attend(q, k, self.heads(self.v(x)).transpose(1, 2))


class CrossAttention(Attention):
    """Attention to all rows of the text, those behind its end included."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__(sizes, sizes.context_width)

    def encode(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, N, S, K); they are the same for every token and step."""
        k = norm_heads(self.heads(self.k(context)), self.k_norm)
        return k.transpose(1, 2), self.heads(self.v(context)).transpose(1, 2)

    def forward(self, x: Tensor, encoded: tuple[Tensor, Tensor]) -> Tensor:
        q = norm_heads(self.heads(self.q(x)), self.q_norm)
        return self.attend(q.transpose(1, 2), *encoded)


class FeedForward(nn.Module):
    """Two matrices with an exact GELU between, a part of the rows at a time when they are many."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        at_once = max(1, HIDDEN_BYTES // (self.up.out_features * x.element_size()))
        if torch.is_grad_enabled() or len(rows) <= at_once:
            return self.down(F.gelu(self.up(x)))
        y = torch.empty_like(rows)
        parts = -(-len(rows) // at_once)
        for part, place in zip(rows.chunk(parts), y.chunk(parts), strict=True):
            torch.mm(F.gelu(self.up(part)), self.down.weight.T, out=place)
        return y.view(x.shape)


def patchify(
    latents: Tensor,
    shown: Sequence[Tensor],
    padding_mask: Tensor | None,
    patch: tuple[int, int, int],
) -> Tensor:
    """Return what each token reads (B, L, features): channels slowest, then rows and columns.

    Args:
        latents: (B, C, T, H, W), in the dtype of the result.
        shown: (B, any, T, H, W), further channels.
        padding_mask: (B, 1, h, w) of any size, the last channel; None is a mask of zeros.
        patch: latent cells a token covers.
    """
    batch, _, frames, height, width = latents.shape
    channels = [latents, *(part.to(latents) for part in shown)]
    if padding_mask is None:
        channels.append(latents.new_zeros(batch, 1, frames, height, width))
    else:
        padding = F.interpolate(padding_mask.to(latents), (height, width), mode="nearest")
        channels.append(padding.unsqueeze(2).expand(batch, 1, frames, height, width))
    x = torch.cat(channels, dim=1)
    _, rows, columns = patch
    x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # (B, C, T, H', r, W', c)
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(y: Tensor, grid: LatentShape, patch: tuple[int, int, int]) -> Tensor:
    """Return (B, C, T, H, W) of tokens (B, L, features): channels fastest, unlike in the input."""
    _, rows, columns = patch
    height, width = grid.height // rows, grid.width // columns
    y = y.view(len(y), grid.frames, height, width, rows, columns, -1)
    y = y.permute(0, 6, 1, 2, 4, 3, 5)
    return y.reshape(len(y), -1, grid.frames, grid.height, grid.width)
