"""Flow transformer over video latents (Cosmos-Predict2.5, one model for text, image and video).

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/networks/minimal_v4_dit.py` and
`minimal_v1_lvg_dit.py`. The blocks are Predict1's; the noise level may differ from frame to frame,
and it is float32 in all layers that read it, as are the last layers.
Axes: B batch, C latent channels, T/H/W latent grid, G noise levels of a clip (1 or T), L tokens,
D width, K head size, S rows of the text, F its features.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn import dit
from worldline.nn.dit import (
    ALL_TOKENS,
    LARGEST_GRID,
    Context,
    DiffusionTransformer,
    DiTSizes,
    NoiseLevel,
    Reuse,
    Tokens,
    linear,
)
from worldline.nn.modulation import NORM_EPS, sinusoid
from worldline.nn.rope import Rotation, axis_sizes, rotary_exponents
from worldline.parallel.offload import BlockPlan
from worldline.shapes import LatentShape

Exponents = tuple[tuple[float, ...], tuple[float, ...]]

RELEASED_RATIO = (1.0, 3.0, 3.0)
TIMESTEP_SCALE = 0.001


@dataclass(frozen=True, kw_only=True)
class FlowDiTConfig(DiTSizes):
    """Architecture: shapes of all weights, positions of all tokens, scale of timesteps.

    Attributes:
        feature_width: F; projected to `context_width`.
        timestep_scale: factor of timesteps before they are embedded.
        exponents: exponents of the rotary frequencies in time and in space, where a checkpoint
            holds others than `released_exponents`.
    """

    feature_width: int
    max_grid: LatentShape = LARGEST_GRID
    rope_ratio: tuple[float, float, float] = RELEASED_RATIO
    timestep_scale: float = TIMESTEP_SCALE
    exponents: Exponents | None = None
    condition_mask: ClassVar[bool] = True
    zero_padded: ClassVar[bool] = False  # what stands behind the end of a prompt is encoded, too

    @property
    def text_width(self) -> int:
        return self.feature_width


def released_exponents(head_size: int) -> Exponents:
    """Rotary exponents in time and in space; they were rounded to bf16 before training.

    Unrounded ones differ by up to 2 % in frequency.
    """
    with torch.device("cpu"):  # a model may be built on the meta device, which has no values
        time, space, _ = (rotary_exponents(size).bfloat16() for size in axis_sizes(head_size))
        return tuple(time.tolist()), tuple(space.tolist())


# features of 28 layers of the text encoder, each 3,584 wide
PRESETS = {
    "2B": FlowDiTConfig(**dit.released_sizes(28, 2048), feature_width=100_352),
    "14B": FlowDiTConfig(**dit.released_sizes(36, 5120), feature_width=100_352),
}


class Projection(nn.Linear):
    """Text features of all layers of the encoder to the width that the blocks read."""

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(super().forward(features))


class NoiseEmbedding(dit.NoiseEmbedding):
    def forward(self, times: Tensor) -> NoiseLevel:
        """Levels of scaled times (B, G), in their precision."""
        dtype, width = times.dtype, self.norm.shape[0]
        waves = sinusoid(times, width).to(dtype)
        embedding = F.rms_norm(waves, (width,), self.norm.to(dtype), NORM_EPS)
        shared = linear(self.second, F.silu(linear(self.first, waves)))
        return NoiseLevel(F.silu(embedding), shared)


class FlowDiT(DiffusionTransformer):
    """Diffusion transformer of Predict2.5: the velocity of a rectified flow."""

    config: FlowDiTConfig
    BLOCKS: ClassVar[BlockPlan] = BlockPlan("blocks", kept=dit.TEXT_WEIGHTS)

    def __init__(self, config: FlowDiTConfig) -> None:
        # latents, condition mask, padding mask
        super().__init__(config, config.latent_channels + 2, NoiseEmbedding(config.width))
        self.project = Projection(config.feature_width, config.context_width)

    def encode_context(self, context: Tensor) -> Context:
        """Every block's keys and values of a text (B, S, F); the same for all steps."""
        return super().encode_context(self.project(context.to(self.embed.weight)))

    def make_positions(self, grid: LatentShape) -> Rotation:
        """Rotation of every token of a latent grid within the model's own, else a `ValueError`."""
        time, space = self.config.exponents or released_exponents(self.config.head_size)
        exponents = [torch.tensor(one) for one in (time, space, space)]
        return self.rotation(grid, time_scale=None, exponents=exponents)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Context,
        positions: Rotation,
        *,
        condition_mask: Tensor,
        padding_mask: Tensor | None = None,
        tokens: Tokens = ALL_TOKENS,
        cache: Reuse | None = None,
    ) -> Tensor:
        """Velocity from data to noise, shaped like `latents`, float32.

        Args:
            latents: (B, C, T, H, W), noised but for conditioning frames; any floating dtype.
            timesteps: (B, 1), or (B, T) with one for each latent frame: 1000 times the noise level.
            context: from `encode_context`.
            positions: from `make_positions`, for this grid.
            condition_mask: (B, 1, T, H, W), 1 on conditioning frames.
            padding_mask: (B, 1, h, w) of any size, 1 where the picture is padding.
            tokens: how processes share them.
            cache: leaves the blocks out of some steps of a sampler.
        """
        times = timesteps.to(torch.promote_types(self.dtype, torch.float32))
        noise = self.noise(times * self.config.timestep_scale)
        inputs = latents, [condition_mask], padding_mask, noise, context
        return self.run(*inputs, positions, tokens=tokens, cache=cache)
