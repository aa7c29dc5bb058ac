"""Diffusion transformer over video latents (Cosmos 1.0 and Predict1, Text2World and Video2World).

Source: nvidia-cosmos/cosmos-predict1 `diffusion/networks/general_dit.py`,
`general_dit_video_conditioned.py`, `diffusion/module/{blocks,attention,position_embedding}.py`;
arXiv 2501.03575, section 5.1. Video2World reads one more channel, which marks the given frames.
The diffusion decoder, which turns tokens of the autoregressive models into latents, reads embedded
tokens beside the latents, and has no learned positions (same repository,
`autoregressive/diffusion_decoder/network.py`).
Axes: B batch, C latent channels, T/H/W latent grid, L tokens, D width, N heads, K head size,
S rows of the text, E its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.attention import AttentionCore
from worldline.nn.modulation import NORM_EPS, Carry, norm_heads, settle, sinusoid
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.parallel.offload import BlockPlan
from worldline.shapes import LatentShape

# keys and values (B, N, S, K) of the text, block by block
Context = list[tuple[Tensor, Tensor]]

_SIZES = ("depth", "width", "num_heads", "head_size", "hidden", "context_width", "lora_rank")
# hidden activations of the feed-forward that exist at once; 56,320 tokens of 14B would need 2.3 GB
HIDDEN_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Everything that fixes a weight's shape or a token's position.

    Attributes:
        depth: number of blocks.
        width: D.
        num_heads: N.
        head_size: K.
        hidden: channels inside the feed-forward.
        context_width: E.
        lora_rank: of the modulation's low-rank matrices.
        latent_channels: C of the input, without the masks.
        out_channels: C of the output.
        condition_mask: a further input channel marks given frames (Video2World).
        max_grid: tokens of the largest grid; what the learned positions hold, where there are any.
        rope_ratio: stretching of the rotary positions in time, rows and columns.
        base_fps: frame rate at which latent frame t stands at position t.
        patch: latent cells a token covers in time, rows and columns.
        learned_positions: a learned table of positions is added before every block.
        vocabulary: ids that the diffusion decoder reads; 0 for the other models.
        id_width: channels of an embedded id.
    """

    depth: int
    width: int
    num_heads: int
    head_size: int
    hidden: int
    context_width: int
    lora_rank: int
    condition_mask: bool
    max_grid: LatentShape
    rope_ratio: tuple[float, float, float]
    latent_channels: int = 16
    out_channels: int = 16
    base_fps: float = 24.0
    patch: tuple[int, int, int] = (1, 2, 2)
    learned_positions: bool = True
    vocabulary: int = 0
    id_width: int = 0

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_size < 12 or self.head_size % 2:
            # below, an axis of the rotation has two channels, which no stretching fits
            raise ValueError(f"head_size is {self.head_size}; it must be even and at least 12")
        if self.patch[0] != 1:
            raise ValueError(f"patch is {self.patch}; a token covers one latent frame")
        if (self.vocabulary > 0) != (self.id_width > 0):
            raise ValueError(f"{self.vocabulary} ids of width {self.id_width}: both, or neither")

    @property
    def patch_cells(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def input_features(self) -> int:
        """Numbers a token reads: latents, condition mask (Video2World) or ids, padding mask."""
        return (self.latent_channels + self.condition_mask + self.id_width + 1) * self.patch_cells

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


LARGEST_GRID = LatentShape(128, 120, 120)
DECODER_RATIO = (1.0, 1.5, 1.5)
DECODER_WINDOW = 8  # latent frames that the diffusion decoder makes at once, 57 frames


def _released(size: str, *, condition_mask: bool) -> DiTConfig:
    large = size == "14B"
    width = 5120 if large else 4096
    return DiTConfig(
        depth=36 if large else 28,
        width=width,
        num_heads=width // 128,
        head_size=128,
        hidden=4 * width,
        context_width=1024,
        lora_rank=256,
        condition_mask=condition_mask,
        max_grid=LARGEST_GRID,
        rope_ratio=RELEASED_RATIOS[width],
    )


# rotary stretching by width: no tensor holds it
RELEASED_RATIOS: dict[int, tuple[float, float, float]] = {
    4096: (2.0, 1.0, 1.0),
    5120: (2.0, 2.0, 2.0),
}
PRESETS = {
    f"{size}-{kind}": _released(size, condition_mask=kind == "Video2World")
    for size in ("7B", "14B")
    for kind in ("Text2World", "Video2World")
} | {
    "7B-Decoder": replace(
        _released("7B", condition_mask=False),
        rope_ratio=DECODER_RATIO,
        learned_positions=False,
        vocabulary=64_000,
        id_width=32,
    )
}


# keys and values of a text are made before the blocks are called
BLOCKS = BlockPlan(
    "blocks",
    kept=("cross_attention.body.k.weight", "cross_attention.body.v.weight", "body.k_norm"),
)


class Positions(NamedTuple):
    """Where each token of a clip stands.

    Attributes:
        rotation: (L, K), float32.
        learned: (L, D), added to the stream before every block, in the dtype of the weights; None
            where the model has none.
    """

    rotation: Rotation
    learned: Tensor | None


class NoiseLevel(NamedTuple):
    """What modulates the blocks at one noise level.

    Attributes:
        embedding: (B, D), activated.
        shared: (B, 3 D), added to every modulation.
    """

    embedding: Tensor
    shared: Tensor


class LearnedPositions(nn.Module):
    """A learned vector for each latent frame, row and column of tokens, summed and normalised."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        grid, width = config.max_grid, config.width
        self.time = nn.Parameter(torch.empty(grid.frames, width))
        self.rows = nn.Parameter(torch.empty(grid.height, width))
        self.columns = nn.Parameter(torch.empty(grid.width, width))

    def forward(self, grid: LatentShape) -> Tensor:
        """Return (L, D) for a grid of tokens that fits the tables."""
        time = self.time[: grid.frames, None, None]
        rows = self.rows[None, : grid.height, None]
        columns = self.columns[None, None, : grid.width]
        x = (time + rows + columns).flatten(0, 2)
        wide = torch.promote_types(x.dtype, torch.float32)  # a sum over thousands of squares
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return x / (NORM_EPS + length * x.shape[-1] ** -0.5).to(x.dtype)


class NoiseEmbedding(nn.Module):
    """The noise level as vectors; the norm acts on the bare sinusoid, not on the layers' output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.Parameter(torch.empty(width))

    def forward(self, timesteps: Tensor) -> NoiseLevel:
        dtype, width = self.norm.dtype, self.norm.shape[0]
        waves = sinusoid(timesteps.to(dtype), width).to(dtype)
        embedding = norm_heads(waves[:, None, None].clone(), self.norm)[:, 0, 0]
        shared = self.second(F.silu(self.first(waves)))
        return NoiseLevel(F.silu(embedding), shared)


class Attention(nn.Module):
    """Projections, norms of heads, and the core that both kinds of attention have."""

    def __init__(self, config: DiTConfig, source_width: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.head_size = config.head_size
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(source_width, inner, bias=False)
        self.v = nn.Linear(source_width, inner, bias=False)
        self.q_norm = nn.Parameter(torch.empty(config.head_size))
        self.k_norm = nn.Parameter(torch.empty(config.head_size))
        self.out = nn.Linear(inner, config.width, bias=False)
        self.core = AttentionCore()

    def heads(self, x: Tensor) -> Tensor:
        """Return (B, L, N, K): split by head size, so that column-sharded layers need no change."""
        return x.unflatten(-1, (-1, self.head_size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (B, L, D) for q (B, N, L, K), k and v (B, N, S, K)."""
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, config.width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q = norm_heads(self.heads(self.q(x)), self.q_norm, rotation).transpose(1, 2)
        k = norm_heads(self.heads(self.k(x)), self.k_norm, rotation).transpose(1, 2)
        return self.attend(q, k, self.heads(self.v(x)).transpose(1, 2))


class CrossAttention(Attention):
    """Attention to all rows of the text, the zero rows behind its end included."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, config.context_width)

    def encode(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, N, S, K); they are the same for every token and step."""
        k = norm_heads(self.heads(self.k(context)), self.k_norm)
        return k.transpose(1, 2), self.heads(self.v(context)).transpose(1, 2)

    def forward(self, x: Tensor, encoded: tuple[Tensor, Tensor]) -> Tensor:
        q = norm_heads(self.heads(self.q(x)), self.q_norm)
        return self.attend(q.transpose(1, 2), *encoded)


class FeedForward(nn.Module):
    """Two matrices with an exact GELU between, a part of the rows at a time when they are many."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

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


class Modulation(nn.Module):
    """The low-rank layer that turns a noise level into shifts, scales and gates."""

    def __init__(self, config: DiTConfig, count: int) -> None:
        super().__init__()
        self.count = count
        self.first = nn.Linear(config.width, config.lora_rank, bias=False)
        self.second = nn.Linear(config.lora_rank, count * config.width, bias=False)

    def forward(self, noise: NoiseLevel) -> tuple[Tensor, ...]:
        """Return `count` vectors (B, D)."""
        own = self.second(self.first(noise.embedding))
        return (own + noise.shared[:, : own.shape[-1]]).chunk(self.count, dim=-1)


class Modulated(nn.Module):
    """One sub-block: what is due is added, normalised, shifted and scaled; then it has its say."""

    def __init__(self, config: DiTConfig, body: nn.Module) -> None:
        super().__init__()
        self.modulation = Modulation(config, 3)
        self.body = body

    def forward(
        self, carry: Carry, noise: NoiseLevel, *given: object, added: Tensor | None = None
    ) -> Carry:
        shift, scale, gate = self.modulation(noise)
        stream, normed = settle(carry, added, shift, scale)
        return Carry(stream, self.body(normed, *given), gate)


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attention = Modulated(config, SelfAttention(config))
        self.cross_attention = Modulated(config, CrossAttention(config))
        self.feed_forward = Modulated(config, FeedForward(config))

    def forward(
        self,
        carry: Carry,
        noise: NoiseLevel,
        positions: Positions,
        context: tuple[Tensor, Tensor],
    ) -> Carry:
        carry = self.attention(carry, noise, positions.rotation, added=positions.learned)
        carry = self.cross_attention(carry, noise, context)
        return self.feed_forward(carry, noise)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config, 2)
        self.linear = nn.Linear(config.width, config.out_channels * config.patch_cells, bias=False)

    def forward(self, carry: Carry, noise: NoiseLevel) -> Tensor:
        shift, scale = self.modulation(noise)
        return self.linear(settle(carry, None, shift, scale)[1])


class DiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.input_features, config.width, bias=False)
        self.positions = LearnedPositions(config) if config.learned_positions else None
        self.ids: nn.Embedding | None = None
        if config.vocabulary:
            # not nn.Embedding(...): drawing its first weights on the meta device imports for 1.3 s
            table = torch.empty(config.vocabulary, config.id_width)
            self.ids = nn.Embedding.from_pretrained(table, freeze=False)
        self.noise = NoiseEmbedding(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    def reset_parameters(self) -> None:
        """Draw fresh weights: norms at one, the output and the modulation's last layers at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                nn.init.ones_(parameter)
            elif name in ("head.linear.weight", "noise.second.weight") or name.endswith(
                "modulation.second.weight"
            ):
                nn.init.zeros_(parameter)
            elif name.startswith("positions."):
                nn.init.normal_(parameter, std=0.02)
            elif name == "ids.weight":
                nn.init.normal_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        # The first update passes no gate that is shut: the noise level opens all of them a little.
        nn.init.normal_(self.noise.second.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def encode_context(self, context: Tensor) -> Context:
        """Return every block's keys and values of a text (B, S, E); the same for all steps."""
        context = context.to(self.embed.weight.device, self.dtype)
        bodies = [block.cross_attention.body for block in self._stack]
        return [body.encode(context) for body in bodies if isinstance(body, CrossAttention)]

    def make_positions(
        self,
        grid: LatentShape,
        fps: float | None,
        *,
        rotary_dtype: torch.dtype = torch.float32,
    ) -> Positions:
        """Return the positions of every token of a clip.

        Args:
            grid: of the latents.
            fps: of the clip; None, for a single frame, leaves its time unscaled.
            rotary_dtype: in which angles are computed; the released pipelines use bf16.

        Raises:
            ValueError: the model has no positions for such a grid, or several frames have no fps.
        """
        config = self.config
        tokens = config.tokens(grid)
        if fps is None and grid.frames > 1:
            raise ValueError(f"{grid.frames} latent frames need a frame rate")
        angles = stretched_angles_3d(
            tokens,
            config.head_size,
            ratio=config.rope_ratio,
            time_scale=None if fps is None else (fps, config.base_fps),
            dtype=rotary_dtype,
        ).to(self.embed.weight.device)
        learned = None if self.positions is None else self.positions(tokens)
        return Positions(Rotation(angles.cos(), angles.sin()), learned)

    def encode_ids(self, ids: Tensor, grid: LatentShape) -> Tensor:
        """Return channels (B, id_width, T, H, W) that show ids; the same for all steps.

        Args:
            ids: (B, T, h, w), any integer dtype; each frame is enlarged to the grid's, bilinearly.
            grid: of the latents, with as many frames.

        Raises:
            ValueError: the model reads no ids, or the frames differ.
        """
        if self.ids is None:
            raise ValueError("this model reads no ids")
        if ids.shape[1] != grid.frames:
            raise ValueError(f"{ids.shape[1]} frames of ids for {grid.frames} latent frames")
        frames = self.ids(ids).flatten(0, 1).permute(0, 3, 1, 2)  # (B T, C, h, w)
        wide = torch.promote_types(frames.dtype, torch.float32)  # weights of four neighbours
        size = (grid.height, grid.width)
        shown = F.interpolate(frames.to(wide), size, mode="bilinear", align_corners=False)
        return shown.to(frames.dtype).unflatten(0, ids.shape[:2]).transpose(1, 2)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Context,
        positions: Positions,
        *,
        condition_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the network output F of the EDM parametrisation, shaped like `latents`.

        Args:
            latents: (B, C, T, H, W), noised, already multiplied by c_in.
            timesteps: (B,) c_noise = ln(sigma) / 4; rounded to the dtype of the weights.
            context: what `encode_context` gave.
            positions: what `make_positions` gave for this grid.
            condition_mask: (B, 1, T, H, W), 1 on given frames; Video2World only.
            padding_mask: (B, 1, h, w) of any size, 1 where the picture is padding; None: nowhere.
            ids: what `encode_ids` gave; the diffusion decoder only.

        Raises:
            ValueError: a condition mask or ids are missing, or given to a model without them.
        """
        for name, wanted, given in (
            ("condition mask", self.config.condition_mask, condition_mask),
            ("ids", self.ids is not None, ids),
        ):
            if wanted != (given is not None):
                raise ValueError(f"this model {'needs' if wanted else 'takes no'} {name}")
        shown = [part for part in (condition_mask, ids) if part is not None]
        x = self._patchify(latents.to(self.dtype), shown, padding_mask)
        noise = self.noise(timesteps)
        carry = Carry(self.embed(x))
        for block, encoded in zip(self._stack, context, strict=True):
            carry = block(carry, noise, positions, encoded)
        return self._unpatchify(self.head(carry, noise), latents)

    def _patchify(
        self, latents: Tensor, shown: Sequence[Tensor], padding_mask: Tensor | None
    ) -> Tensor:
        """Return (B, L, features): channels slowest, then rows and columns of the patch."""
        batch, _, frames, height, width = latents.shape
        channels = [latents, *(part.to(latents) for part in shown)]
        if padding_mask is None:
            channels.append(latents.new_zeros(batch, 1, frames, height, width))
        else:
            padding = F.interpolate(padding_mask.to(latents), (height, width), mode="nearest")
            channels.append(padding.unsqueeze(2).expand(batch, 1, frames, height, width))
        x = torch.cat(channels, dim=1)
        _, rows, columns = self.config.patch
        x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # (B, C, T, H', r, W', c)
        return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)

    def _unpatchify(self, y: Tensor, like: Tensor) -> Tensor:
        """Undo the patches; here the channels are fastest, unlike in the input."""
        batch, _, frames, height, width = like.shape
        _, rows, columns = self.config.patch
        y = y.view(batch, frames, height // rows, width // columns, rows, columns, -1)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    @property
    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]
