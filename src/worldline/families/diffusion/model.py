"""Diffusion transformer over video latents (Cosmos 1.0 and Predict1, Text2World and Video2World).

Source: nvidia-cosmos/cosmos-predict1 `diffusion/networks/general_dit.py`,
`general_dit_video_conditioned.py`, `diffusion/module/{blocks,attention,position_embedding}.py`;
arXiv 2501.03575, section 5.1. Video2World reads one more channel, which marks the conditioning
frames. The diffusion decoder, which turns tokens of the autoregressive models into latents, reads
embedded tokens beside the latents, and has no learned positions (same repository,
`autoregressive/diffusion_decoder/network.py`).
Axes: B batch, C latent channels, T/H/W latent grid, L tokens, D width, N heads, K head size,
S rows of the text, E its width.
"""

from collections.abc import Set
from dataclasses import astuple, dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn import dit
from worldline.nn.dit import (
    ALL_TOKENS,
    Context,
    DiffusionTransformer,
    DiTSizes,
    NoiseLevel,
    Reuse,
    Tokens,
)
from worldline.nn.modulation import NORM_EPS, norm_heads, sinusoid
from worldline.nn.rope import Rotation
from worldline.parallel.offload import BlockPlan
from worldline.shapes import LatentShape


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiTSizes):
    """Architecture: shapes of all weights and positions of all tokens.

    Attributes:
        condition_mask: a further input channel marks conditioning frames (Video2World).
        base_fps: frame rate at which latent frame t stands at position t.
        learned_positions: a learned table of `max_grid` is added before every block.
        vocabulary: ids that the diffusion decoder reads; 0 for the other models.
        id_width: channels of an embedded id.
    """

    condition_mask: bool
    base_fps: float = 24.0
    learned_positions: bool = True
    vocabulary: int = 0
    id_width: int = 0
    zero_padded: ClassVar[bool] = True  # rows behind the end of a prompt, and absent prompts

    def shared_numbers(self, trained: Set[str], wide: int) -> int:
        # learned positions; where they are trained, their sum and its gradient
        learned = self.learned_positions * (3 if "noise.norm" in trained else 1) * self.width
        return super().shared_numbers(trained, wide) + learned


# rotary stretching by width: no tensor holds it
RELEASED_RATIOS: dict[int, tuple[float, float, float]] = {
    4096: (2.0, 1.0, 1.0),
    5120: (2.0, 2.0, 2.0),
}
DECODER_RATIO = (1.0, 1.5, 1.5)
DECODER_WINDOW = 8  # latent frames that the diffusion decoder makes at once, 57 frames


PRESETS = {
    f"{name}-{kind}": DiTConfig(
        **dit.released_sizes(depth, width),
        condition_mask=kind == "Video2World",
        rope_ratio=RELEASED_RATIOS[width],
    )
    for name, depth, width in (("7B", 28, 4096), ("14B", 36, 5120))
    for kind in ("Text2World", "Video2World")
}
PRESETS["7B-Decoder"] = replace(
    PRESETS["7B-Text2World"],
    rope_ratio=DECODER_RATIO,
    learned_positions=False,
    vocabulary=64_000,
    id_width=32,
)


class Positions(NamedTuple):
    """Positions of the tokens of a clip.

    Attributes:
        rotation: (L, K), float32.
        learned: (L, D), added to the stream before every block, in the dtype of the weights.
    """

    rotation: Rotation
    learned: Tensor | None


class LearnedPositions(nn.Module):
    """A learned vector for each latent frame, row and column of tokens, summed and normalised."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.time, self.rows, self.columns = (
            nn.Parameter(torch.empty(size, config.width)) for size in astuple(config.max_grid)
        )

    def forward(self, grid: LatentShape) -> Tensor:
        """(L, D) for a grid of tokens that fits the tables."""
        time, rows = self.time[: grid.frames, None, None], self.rows[: grid.height, None]
        x = (time + rows + self.columns[: grid.width]).flatten(0, 2)
        wide = torch.promote_types(x.dtype, torch.float32)  # a sum over thousands of squares
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return x / (NORM_EPS + length * x.shape[-1] ** -0.5).to(x.dtype)


class NoiseEmbedding(dit.NoiseEmbedding):
    def forward(self, timesteps: Tensor) -> NoiseLevel:
        dtype, width = self.norm.dtype, self.norm.shape[0]
        waves = sinusoid(timesteps.to(dtype), width).to(dtype)
        embedding = norm_heads(waves[:, None, None].clone(), self.norm)[:, 0, 0]
        shared = self.second(F.silu(self.first(waves)))
        return NoiseLevel(F.silu(embedding), shared)


class DiT(DiffusionTransformer):
    """Diffusion transformer of Predict1, of a video or of the decoder of token ids; EDM's F."""

    config: DiTConfig
    BLOCKS: ClassVar[BlockPlan] = BlockPlan("blocks", kept=dit.TEXT_WEIGHTS)

    def __init__(self, config: DiTConfig) -> None:
        # latents, condition mask (Video2World) or ids, padding mask
        inputs = config.latent_channels + config.condition_mask + config.id_width + 1
        super().__init__(config, inputs, NoiseEmbedding(config.width))
        self.positions = LearnedPositions(config) if config.learned_positions else None
        # not nn.Embedding(...): drawing its first weights on the meta device imports for 1.3 s
        table = torch.empty(config.vocabulary, config.id_width)
        self.ids = nn.Embedding.from_pretrained(table, freeze=False) if config.vocabulary else None

    def make_positions(
        self,
        grid: LatentShape,
        fps: float | None,
        *,
        rotary_dtype: torch.dtype = torch.float32,
    ) -> Positions:
        """Positions of every token of a latent grid.

        Args:
            grid: within the model's own, else a `ValueError`.
            fps: frame rate of the clip; None, for a single frame, leaves its time unscaled.
            rotary_dtype: precision of the angles; the released pipelines use bf16.
        """
        time_scale = None if fps is None else (fps, self.config.base_fps)
        rotation = self.rotation(grid, time_scale=time_scale, dtype=rotary_dtype)
        tokens = self.config.tokens(grid)
        return Positions(rotation, None if self.positions is None else self.positions(tokens))

    def encode_ids(self, ids: Tensor, grid: LatentShape) -> Tensor:
        """Input channels (B, id_width, T, H, W) of ids (B, T, h, w); the same for all steps.

        Each frame is enlarged to the grid's, bilinearly.
        """
        assert self.ids is not None
        frames = self.ids(ids).flatten(0, 1).permute(0, 3, 1, 2)  # (B T, C, h, w)
        wide = torch.promote_types(frames.dtype, torch.float32)  # weights of four neighbours
        size = (grid.height, grid.width)
        large = F.interpolate(frames.to(wide), size, mode="bilinear", align_corners=False)
        return large.to(frames.dtype).unflatten(0, ids.shape[:2]).transpose(1, 2)

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
        tokens: Tokens = ALL_TOKENS,
        cache: Reuse | None = None,
    ) -> Tensor:
        """Network output F of the EDM parametrisation, shaped like `latents`.

        Args:
            latents: (B, C, T, H, W), noised, already multiplied by c_in.
            timesteps: (B,) c_noise = ln(sigma) / 4; rounded to the dtype of the weights.
            context: from `encode_context`.
            positions: from `make_positions`, for this grid.
            condition_mask: (B, 1, T, H, W), 1 on conditioning frames; Video2World only.
            padding_mask: (B, 1, h, w) of any size, 1 where the picture is padding.
            ids: from `encode_ids`; the diffusion decoder only.
            tokens: how processes share them.
            cache: leaves the blocks out of some steps of a sampler.
        """
        conditioning = [part for part in (condition_mask, ids) if part is not None]
        noise = self.noise(timesteps)
        inputs = latents, conditioning, padding_mask, noise, context
        return self.run(*inputs, *positions, tokens=tokens, cache=cache)
