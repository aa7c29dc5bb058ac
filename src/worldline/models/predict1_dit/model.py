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

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.dit import (
    Context,
    CrossAttention,
    DiTSizes,
    FeedForward,
    SelfAttention,
    patchify,
    unpatchify,
)
from worldline.nn.modulation import NORM_EPS, Carry, norm_heads, settle, sinusoid
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.parallel.offload import BlockPlan
from worldline.shapes import LatentShape


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiTSizes):
    """Everything that fixes a weight's shape or a token's position.

    The learned positions, where there are any, hold `max_grid`.

    Attributes:
        condition_mask: a further input channel marks given frames (Video2World).
        base_fps: frame rate at which latent frame t stands at position t.
        learned_positions: a learned table of positions is added before every block.
        vocabulary: ids that the diffusion decoder reads; 0 for the other models.
        id_width: channels of an embedded id.
    """

    condition_mask: bool
    base_fps: float = 24.0
    learned_positions: bool = True
    vocabulary: int = 0
    id_width: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.vocabulary > 0) != (self.id_width > 0):
            raise ValueError(f"{self.vocabulary} ids of width {self.id_width}: both, or neither")

    @property
    def input_features(self) -> int:
        """Numbers a token reads: latents, condition mask (Video2World) or ids, padding mask."""
        return (self.latent_channels + self.condition_mask + self.id_width + 1) * self.patch_cells


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
        x = patchify(latents.to(self.dtype), shown, padding_mask, self.config.patch)
        noise = self.noise(timesteps)
        carry = Carry(self.embed(x))
        for block, encoded in zip(self._stack, context, strict=True):
            carry = block(carry, noise, positions, encoded)
        grid = LatentShape(*latents.shape[2:])
        return unpatchify(self.head(carry, noise), grid, self.config.patch)

    @property
    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]
