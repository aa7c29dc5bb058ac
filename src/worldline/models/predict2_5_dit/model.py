"""Flow transformer over video latents (Cosmos-Predict2.5, one model for text, image and video).

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/networks/minimal_v4_dit.py` and
`minimal_v1_lvg_dit.py`. The blocks are Predict1's; the noise level may differ from frame to frame,
and all that it goes through is float32, as are the last layers.
Axes: B batch, C latent channels, T/H/W latent grid, G noise levels of a clip (1 or T), L tokens,
D width, K head size, S rows of the text, F its features.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from worldline.nn.modulation import NORM_EPS, Carry, settle, sinusoid
from worldline.nn.rope import Rotation, axis_sizes, rotary_exponents, stretched_angles_3d
from worldline.shapes import LatentShape

Exponents = tuple[tuple[float, ...], tuple[float, ...]]

LARGEST_GRID = LatentShape(128, 120, 120)
RELEASED_RATIO = (1.0, 3.0, 3.0)
TIMESTEP_SCALE = 0.001


@dataclass(frozen=True, kw_only=True)
class FlowDiTConfig(DiTSizes):
    """Everything that fixes a weight's shape, a token's position or how a noise level is read.

    Attributes:
        feature_width: F; projected to `context_width`.
        timestep_scale: what timesteps are multiplied by before they are embedded.
        exponents: of the rotary frequencies in time and in space, where a checkpoint holds others
            than `released_exponents`.
    """

    feature_width: int
    max_grid: LatentShape = LARGEST_GRID
    rope_ratio: tuple[float, float, float] = RELEASED_RATIO
    timestep_scale: float = TIMESTEP_SCALE
    exponents: Exponents | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_width < 1:
            raise ValueError(f"feature_width is {self.feature_width}; it must be at least 1")
        wanted = [size // 2 for size in axis_sizes(self.head_size)[:2]]
        if self.exponents is not None and [len(one) for one in self.exponents] != wanted:
            raise ValueError(
                f"{[len(one) for one in self.exponents]} rotary exponents in time and space; "
                f"head_size {self.head_size} needs {wanted}"
            )

    @property
    def input_features(self) -> int:
        """Numbers a token reads: latents, condition mask, padding mask."""
        return (self.latent_channels + 2) * self.patch_cells


def released_exponents(head_size: int) -> Exponents:
    """Return the exponents in time and in space; they were rounded to bf16 before training.

    Unrounded ones differ by up to 2 % in frequency.
    """
    with torch.device("cpu"):  # values are wanted where a model is built on the meta device, too
        time, space, _ = (rotary_exponents(size).bfloat16() for size in axis_sizes(head_size))
        return tuple(time.tolist()), tuple(space.tolist())


def _released(depth: int, width: int) -> FlowDiTConfig:
    return FlowDiTConfig(
        depth=depth,
        width=width,
        num_heads=width // 128,
        head_size=128,
        hidden=4 * width,
        context_width=1024,
        lora_rank=256,
        feature_width=100_352,  # 28 layers of the text encoder, each 3,584 wide
    )


PRESETS = {"2B": _released(28, 2048), "14B": _released(36, 5120)}


class NoiseLevel(NamedTuple):
    """What modulates the blocks, float32.

    Attributes:
        embedding: (B, G, D), activated.
        shared: (B, G, 3 D), added to every modulation.
    """

    embedding: Tensor
    shared: Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer without a bias in the precision of `x`, above that of its weights."""
    return F.linear(x, layer.weight.to(x.dtype))


class Projection(nn.Linear):
    """The text's features, layer by layer of its encoder, made as narrow as the blocks read it."""

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(super().forward(features))


class NoiseEmbedding(nn.Module):
    """The noise level as vectors; the norm acts on the bare sinusoid, not on the layers' output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.Parameter(torch.empty(width))

    def forward(self, times: Tensor) -> NoiseLevel:
        """Return the level of every time (B, G), which is scaled already."""
        dtype, width = _wide(self.norm.dtype), self.norm.shape[0]
        waves = sinusoid(times, width).to(dtype)
        embedding = F.rms_norm(waves, (width,), self.norm.to(dtype), NORM_EPS)
        shared = _apply(self.second, F.silu(_apply(self.first, waves)))
        return NoiseLevel(F.silu(embedding), shared)


class Modulation(nn.Module):
    """The low-rank layer that turns a noise level into shifts, scales and gates, in float32."""

    def __init__(self, config: FlowDiTConfig, count: int) -> None:
        super().__init__()
        self.count = count
        self.first = nn.Linear(config.width, config.lora_rank, bias=False)
        self.second = nn.Linear(config.lora_rank, count * config.width, bias=False)

    def forward(self, noise: NoiseLevel) -> tuple[Tensor, ...]:
        """Return `count` vectors (B, G, D)."""
        own = _apply(self.second, _apply(self.first, noise.embedding))
        return (own + noise.shared[..., : own.shape[-1]]).chunk(self.count, dim=-1)


class Modulated(nn.Module):
    """One sub-block: what is due is added, normalised, shifted and scaled; then it has its say."""

    def __init__(self, config: FlowDiTConfig, body: nn.Module) -> None:
        super().__init__()
        self.modulation = Modulation(config, 3)
        self.body = body

    def forward(self, carry: Carry, noise: NoiseLevel, *given: object) -> Carry:
        # rounded to the stream's dtype before use, as in the released pipeline
        shift, scale, gate = (one.to(carry.stream.dtype) for one in self.modulation(noise))
        stream, normed = settle(carry, None, shift, scale)
        return Carry(stream, self.body(normed, *given), gate)


class Block(nn.Module):
    def __init__(self, config: FlowDiTConfig) -> None:
        super().__init__()
        self.attention = Modulated(config, SelfAttention(config))
        self.cross_attention = Modulated(config, CrossAttention(config))
        self.feed_forward = Modulated(config, FeedForward(config))

    def forward(
        self,
        carry: Carry,
        noise: NoiseLevel,
        rotation: Rotation,
        context: tuple[Tensor, Tensor],
    ) -> Carry:
        carry = self.attention(carry, noise, rotation)
        carry = self.cross_attention(carry, noise, context)
        return self.feed_forward(carry, noise)


class Head(nn.Module):
    """The last norm and layer, in float32."""

    def __init__(self, config: FlowDiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config, 2)
        self.linear = nn.Linear(config.width, config.out_channels * config.patch_cells, bias=False)

    def forward(self, carry: Carry, noise: NoiseLevel) -> Tensor:
        shift, scale = self.modulation(noise)
        return _apply(self.linear, settle(carry, None, shift, scale, shift.dtype)[1])


class FlowDiT(nn.Module):
    def __init__(self, config: FlowDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.input_features, config.width, bias=False)
        self.project = Projection(config.feature_width, config.context_width)
        self.noise = NoiseEmbedding(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    def reset_parameters(self) -> None:
        """Draw fresh weights: norms at one, the output and the modulation's last layers at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                nn.init.ones_(parameter)
            elif name in ("head.linear.weight", "project.bias") or name.endswith(
                "modulation.second.weight"
            ):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        # The first update passes no gate that is shut: the noise level opens all of them a little.
        nn.init.normal_(self.noise.second.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def encode_context(self, features: Tensor) -> Context:
        """Return every block's keys and values of a text (B, S, F); the same for all steps."""
        context = self.project(features.to(self.embed.weight.device, self.dtype))
        bodies = [block.cross_attention.body for block in self._stack]
        return [body.encode(context) for body in bodies if isinstance(body, CrossAttention)]

    def make_positions(self, grid: LatentShape, *, exact: bool = False) -> Rotation:
        """Return the rotation of every token of a clip, whatever its frame rate.

        Args:
            grid: of the latents.
            exact: leave the exponents unrounded, which no checkpoint was trained with; diffusers
                does so.

        Raises:
            ValueError: the model has no positions for such a grid.
        """
        config = self.config
        exponents = None
        if not exact:
            time, space = config.exponents or released_exponents(config.head_size)
            exponents = [torch.tensor(one) for one in (time, space, space)]
        angles = stretched_angles_3d(
            config.tokens(grid),
            config.head_size,
            ratio=config.rope_ratio,
            time_scale=None,
            exponents=exponents,
        ).to(self.embed.weight.device)
        return Rotation(angles.cos(), angles.sin())

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Context,
        positions: Rotation,
        *,
        condition_mask: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity from data to noise, shaped like `latents`, float32.

        Args:
            latents: (B, C, T, H, W), noised, but for given frames; any floating dtype.
            timesteps: (B, 1), or (B, T) with one for each latent frame: 1000 times the noise level.
            context: what `encode_context` gave.
            positions: what `make_positions` gave for this grid.
            condition_mask: (B, 1, T, H, W), 1 on given frames.
            padding_mask: (B, 1, h, w) of any size, 1 where the picture is padding; None: nowhere.

        Raises:
            ValueError: timesteps of another shape.
        """
        grid = LatentShape(*latents.shape[2:])
        if timesteps.ndim != 2 or timesteps.shape[1] not in (1, grid.frames):
            raise ValueError(
                f"timesteps {list(timesteps.shape)} of {len(latents)} clips of {grid.frames} "
                "latent frames: one is needed for each clip, or for each of its frames"
            )
        x = patchify(latents.to(self.dtype), [condition_mask], padding_mask, self.config.patch)
        noise = self.noise(timesteps.to(_wide(self.dtype)) * self.config.timestep_scale)
        carry = Carry(self.embed(x))
        for block, encoded in zip(self._stack, context, strict=True):
            carry = block(carry, noise, positions, encoded)
        return unpatchify(self.head(carry, noise), grid, self.config.patch)

    @property
    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]
