"""Causal video tokenizer of Cosmos: pixels <-> continuous latents (CV) or token ids (DV).

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/modules/layers3d.py`, `tokenizer/networks/`;
FSQ from arXiv 2309.15505. Every layer is causal in time: output frame t sees input frames <= t.
Axes: B batch, C channels, T/H/W frames, rows, columns (pixels, wavelet patches or latent cells).

Activations are kept in `channels_last_3d`, so that a spatial convolution sees the frames as a batch
and a temporal one sees the rows of a frame as one axis, both without a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn import fsq, wavelet
from worldline.shapes import VideoShape

_EPS = 1e-6


class Resampling(NamedTuple):
    """Which axes a resampler changes; none means that there is no resampler."""

    space: bool
    time: bool


@dataclass(frozen=True, kw_only=True)
class CosmosTokenizerConfig:
    """Everything that fixes the shape of a weight, and the few numbers a file holds as buffers.

    Attributes:
        channels: width of the first convolution of the encoder.
        level_channels: width of each level, finest first.
        num_blocks: residual blocks a level of the encoder; the decoder has one more.
        patch: side of a wavelet patch, a power of two.
        spatial: pixels a latent cell covers on each side.
        temporal: frames a latent frame covers (the first covers one).
        z_channels: width between network and quantiser.
        latent_channels: channels of a latent, or of a code.
        levels: FSQ levels of a discrete tokenizer; None for a continuous one.
        tap: wavelet coefficient stored in the file.
    """

    channels: int = 128
    level_channels: tuple[int, ...] = (256, 512, 512)
    num_blocks: int = 2
    patch: int = 4
    spatial: int = 8
    temporal: int = 8
    z_channels: int = 16
    latent_channels: int = 16
    levels: tuple[int, ...] | None = None
    tap: float = wavelet.EXACT_TAP

    def __post_init__(self) -> None:
        for name, value in (("patch", self.patch), ("spatial", self.spatial)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} {value} is not a power of two")
        if self.spatial < self.patch or self.temporal < self.patch:
            raise ValueError(
                f"compression {self.temporal}x{self.spatial} is below patch {self.patch}"
            )
        if self.levels is not None and len(self.levels) != self.latent_channels:
            raise ValueError(
                f"{len(self.levels)} FSQ levels do not fit {self.latent_channels} code channels"
            )

    @property
    def spatial_steps(self) -> int:
        """Halvings of height and width beyond the wavelets."""
        return int(math.log2(self.spatial // self.patch))

    @property
    def temporal_steps(self) -> int:
        return int(math.log2(self.temporal // self.patch))

    def down(self, level: int) -> Resampling:
        """Return what the encoder halves after `level`."""
        if level == len(self.level_channels) - 1:
            return Resampling(space=False, time=False)
        return Resampling(space=level < self.spatial_steps, time=level < self.temporal_steps)

    def up(self, level: int) -> Resampling:
        """Return what the decoder doubles after `level`; it runs from the last level to 0."""
        step = len(self.level_channels) - 1 - level
        if level == 0:
            return Resampling(space=False, time=False)
        time = 0 < step <= self.temporal_steps
        more_in_space = self.spatial_steps > self.temporal_steps
        return Resampling(space=time or (more_in_space and step < self.spatial_steps), time=time)

    @property
    def patch_channels(self) -> int:
        return 3 * self.patch**3

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 for a continuous tokenizer."""
        return math.prod(self.levels) if self.levels else 0


PRESETS = {
    "CV8x8x8": CosmosTokenizerConfig(),
    "DV8x16x16": CosmosTokenizerConfig(spatial=16, latent_channels=6, levels=(8, 8, 8, 5, 5, 5)),
    "CV4x8x8": CosmosTokenizerConfig(patch=2, temporal=4),
    "DV4x8x8": CosmosTokenizerConfig(
        patch=2, temporal=4, z_channels=256, latent_channels=6, levels=(8, 8, 8, 5, 5, 5)
    ),
}


class SpatialConv(nn.Module):
    """A convolution over rows and columns of each frame; the weight has its released 5-D shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride
        self.padding = kernel // 2 if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        frames = F.conv2d(frames, self.weight[:, :, 0], self.bias, self.stride, self.padding)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class TemporalConv(nn.Module):
    """A causal convolution over three frames; the frame before the first is a copy of the first."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 1, 1))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        copies = x[:, :, :1].expand(-1, -1, 3 - self.stride, -1, -1)
        rows = torch.cat([copies, x], dim=2).flatten(3)  # (B, C, T, H W)
        rows = F.conv2d(rows, self.weight[..., 0], self.bias, (self.stride, 1))
        return rows.unflatten(3, x.shape[3:])


class FactorisedConv(nn.Module):
    """A 3 x 3 convolution in space, then one over three frames, nothing between."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.space = SpatialConv(inputs, outputs, 3)
        self.time = TemporalConv(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.time(self.space(x))


class FrameNorm(nn.Module):
    """Group norm with one group, applied to each frame alone: statistics over C, H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        # float32: the sums run over up to ten million values
        variance, mean = torch.var_mean(x.float(), dim=(1, 3, 4), keepdim=True, correction=0)
        scale = torch.rsqrt(variance + _EPS) * self.weight.float().view(1, -1, 1, 1, 1)
        shift = self.bias.float().view(1, -1, 1, 1, 1) - mean * scale
        return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(inputs)
        self.conv1 = FactorisedConv(inputs, outputs)
        self.norm2 = FrameNorm(outputs)
        self.conv2 = FactorisedConv(outputs, outputs)
        self.shortcut = SpatialConv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """One attention head as wide as the features, over the cells of a frame or over time."""

    def __init__(self, channels: int, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm = FrameNorm(channels)
        self.q = SpatialConv(channels, channels, 1)
        self.k = SpatialConv(channels, channels, 1)
        self.v = SpatialConv(channels, channels, 1)
        self.out = SpatialConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # time: each pixel is a sequence of frames; space: each frame is a sequence of pixels
        order = (0, 3, 4, 2, 1) if self.over_time else (0, 2, 3, 4, 1)
        q, k, v = (project(normed).permute(order) for project in (self.q, self.k, self.v))
        grid = q.shape
        if self.over_time:
            q, k, v = (part.flatten(0, 2).unsqueeze(1) for part in (q, k, v))
        else:
            q, k, v = (part.flatten(2, 3).flatten(0, 1).unsqueeze(1) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.over_time)
        inverse = [order.index(axis) for axis in range(5)]
        return x + self.out(y.reshape(grid).permute(inverse))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.spatial_attention = Attention(channels, over_time=False)
        self.temporal_attention = Attention(channels, over_time=True)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.temporal_attention(self.spatial_attention(self.block1(x)))
        return self.block2(x)


class Downsample(nn.Module):
    """Halve height and width, then time: a strided convolution beside an average."""

    def __init__(self, channels: int, step: Resampling) -> None:
        super().__init__()
        self.space = SpatialConv(channels, channels, 3, stride=2) if step.space else None
        self.time = TemporalConv(channels, channels, stride=2) if step.time else None
        self.mix = SpatialConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.space is not None:
            height, width = x.shape[3:]
            cells = x.unflatten(3, (height // 2, 2)).unflatten(5, (width // 2, 2))
            x = self.space(F.pad(x, (0, 1, 0, 1))) + cells.mean((4, 6))
        if self.time is not None:
            x = torch.cat([x[:, :, :1], x], dim=2)
            x = self.time(x) + x.unflatten(2, (-1, 2)).mean(3)
        return self.mix(x)


class Upsample(nn.Module):
    """Double time (the first frame stays one frame), then height and width."""

    def __init__(self, channels: int, step: Resampling) -> None:
        super().__init__()
        self.time = TemporalConv(channels, channels) if step.time else None
        self.space = SpatialConv(channels, channels, 3) if step.space else None
        self.mix = SpatialConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.time is not None:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = x + self.time(x)
        if self.space is not None:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.space(x)
        return self.mix(x)


class Level(nn.Module):
    """Residual blocks of one resolution, and the step to the next where there is one."""

    def __init__(
        self, inputs: int, outputs: int, num_blocks: int, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(inputs if number == 0 else outputs, outputs)
            for number in range(num_blocks)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        widths = config.level_channels
        self.patch, self.tap = config.patch, config.tap
        self.conv_in = FactorisedConv(config.patch_channels, config.channels)
        self.levels = nn.ModuleList()
        width = config.channels
        for number, outputs in enumerate(widths):
            step = config.down(number)
            resample = Downsample(outputs, step) if any(step) else None
            self.levels.append(Level(width, outputs, config.num_blocks, resample))
            width = outputs
        self.middle = Middle(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorisedConv(width, config.z_channels)

    def forward(self, video: Tensor) -> Tensor:
        x = wavelet.patch(video, self.patch, self.tap)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        widths = config.level_channels
        self.patch, self.tap = config.patch, config.tap
        self.conv_in = FactorisedConv(config.z_channels, widths[-1])
        self.middle = Middle(widths[-1])
        levels: list[Level] = []
        width = widths[-1]
        for number, outputs in reversed(list(enumerate(widths))):
            step = config.up(number)
            resample = Upsample(outputs, step) if any(step) else None
            levels.append(Level(width, outputs, config.num_blocks + 1, resample))
            width = outputs
        self.levels = nn.ModuleList(reversed(levels))  # numbered as in the files, finest first
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorisedConv(width, config.patch_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z.contiguous(memory_format=torch.channels_last_3d)))
        for level in reversed(self.levels):
            x = level(x)
        return wavelet.unpatch(self.conv_out(F.silu(self.norm_out(x))), self.patch, self.tap)


class CosmosTokenizer(nn.Module):
    """Encoder, quantiser and decoder; continuous when the configuration has no FSQ levels."""

    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = SpatialConv(config.z_channels, config.latent_channels, 1)
        self.post_quant_conv = SpatialConv(config.latent_channels, config.z_channels, 1)
        self.decoder = Decoder(config)

    def reset_parameters(self) -> None:
        """Draw fresh weights: torch's defaults for convolutions, ones and zeros for norms."""
        for module in self.modules():
            if isinstance(module, FrameNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (SpatialConv, TemporalConv)):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                limit = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -limit, limit)

    def encode(self, video: Tensor) -> Tensor:
        """Return latents (B, C, t, h, w): of a discrete tokenizer, the values before FSQ.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], in the dtype of the weights.

        Raises:
            ValueError: T is not 1 + temporal*k, or H or W is no multiple of the compression.
        """
        VideoShape(*video.shape[2:]).latent(self.config.temporal, self.config.spatial)
        return self.quant_conv(self.encoder(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Return a video (B, 3, T, H, W), about [-1, 1] and not clamped, of latents or codes."""
        return self.decoder(self.post_quant_conv(latents))

    def encode_tokens(self, video: Tensor) -> Tensor:
        """Return token ids (B, t, h, w), int32 in [0, vocabulary)."""
        codes = fsq.quantize(self.encode(video).movedim(1, -1), self._levels)
        return fsq.codes_to_indices(codes, self._levels)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the video (B, 3, T, H, W) of token ids (B, t, h, w), any integer dtype."""
        codes = fsq.indices_to_codes(tokens, self._levels).movedim(-1, 1)
        return self.decode(codes.to(self.post_quant_conv.weight.dtype))

    def reconstruct(self, video: Tensor) -> Tensor:
        """Return decode(encode(video)); gradients pass straight through the quantiser."""
        latents = self.encode(video)
        if self.config.levels is not None:
            codes = fsq.quantize(latents.movedim(1, -1), self.config.levels).movedim(-1, 1)
            latents = codes.to(latents.dtype)
        return self.decode(latents)

    @property
    def _levels(self) -> tuple[int, ...]:
        if self.config.levels is None:
            raise ValueError("a continuous tokenizer has no token ids")
        return self.config.levels
