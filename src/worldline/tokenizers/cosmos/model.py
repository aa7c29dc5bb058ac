"""Causal video tokenizer of Cosmos: pixels <-> continuous latents (CV) or token ids (DV).

Source: nvidia-cosmos/cosmos-predict1 `tokenizer/modules/layers3d.py`, `tokenizer/networks/`,
`diffusion/module/pretrained_vae.py`; FSQ from arXiv 2309.15505. Every layer is causal in time:
output frame t sees input frames <= t.
Axes: B batch, C channels, T/H/W frames, rows, columns (pixels, wavelet patches or latent cells).

Between the layers a clip is kept as "cells", (B, T, H, W, C) in that order of memory, so that a
spatial convolution sees the frames as a batch and a temporal one sees the rows of a frame as one
axis, both without a copy. A clip may also pass in pieces: see `worldline.nn.pieces`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.finite import check_finite, total
from worldline.nn import transforms
from worldline.nn.pieces import (
    ALL_ROWS,
    CausalCache,
    CausalTokenizer,
    Rows,
    SpatialConv,
    TemporalConv,
    each_frame,
    enlarge,
)

_EPS = 1e-6
_FRAME = (2, 3, 4)  # the axes of cells that make one frame
_pointwise = partial(SpatialConv, kernel=1)


@dataclass(frozen=True, kw_only=True)
class CosmosTokenizerConfig:
    """Architecture: shapes of all weights, and the few numbers a file holds as buffers.

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
    tap: float = transforms.EXACT_TAP

    @property
    def spatial_steps(self) -> int:
        """Halvings of height and width beyond the wavelets."""
        return int(math.log2(self.spatial // self.patch))

    @property
    def temporal_steps(self) -> int:
        return int(math.log2(self.temporal // self.patch))

    def down(self, level: int) -> tuple[bool, bool]:
        """Whether the encoder halves space, and time, after `level`."""
        if level == len(self.level_channels) - 1:
            return False, False
        return level < self.spatial_steps, level < self.temporal_steps

    def up(self, level: int) -> tuple[bool, bool]:
        """Whether the decoder doubles space, and time, after `level`, from the last one to 0."""
        step = len(self.level_channels) - 1 - level
        if level == 0:
            return False, False
        time = 0 < step <= self.temporal_steps
        more_in_space = self.spatial_steps > self.temporal_steps
        return time or (more_in_space and step < self.spatial_steps), time

    @property
    def patch_channels(self) -> int:
        return 3 * self.patch**3

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 for a continuous tokenizer."""
        return math.prod(self.levels) if self.levels else 0


LEVELS = (8, 8, 8, 5, 5, 5)  # of the released discrete tokenizers
PRESETS = {
    "CV8x8x8": CosmosTokenizerConfig(),
    "DV8x16x16": CosmosTokenizerConfig(spatial=16, latent_channels=6, levels=LEVELS),
    "CV4x8x8": CosmosTokenizerConfig(patch=2, temporal=4),
    "DV4x8x8": CosmosTokenizerConfig(
        patch=2, temporal=4, z_channels=256, latent_channels=6, levels=LEVELS
    ),
}


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Mean and deviation of latents, by which the diffusion models see them normalised.

    They differ by latent frame: the first of a clip holds one frame of video, the others several.

    Attributes:
        mean: (C, t), float32, on the CPU.
        std: (C, t), above 0.
        image_mean: (C,), for a video of one frame; None if unknown.
        image_std: (C,).
    """

    mean: Tensor
    std: Tensor
    image_mean: Tensor | None = None
    image_std: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            like = self.mean[:, 0] if name.startswith("image") else self.mean
            if tensor.shape != like.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, mean {list(self.mean.shape)}")
            if not tensor.isfinite().all() or (name.endswith("std") and not (tensor > 0).all()):
                raise ValueError(f"{name} is not finite, or a deviation that is not above 0")

    @property
    def frames(self) -> int:
        """Latent frames of the longest clip they are defined for."""
        return self.mean.shape[1]

    def rounded(self, dtype: torch.dtype) -> LatentStatistics:
        """Rounded to the tokenizer's dtype, as in the released pipelines."""
        return LatentStatistics(**{name: t.to(dtype).float() for name, t in self.tensors().items()})

    def normalise(self, latents: Tensor, *, image: bool | None = None) -> Tensor:
        """(latents - mean) / std, computed in float32, in the dtype of `latents`.

        Args:
            latents: (B, C, t, h, w), from the first latent frame of a clip.
            image: use the statistics of images, if any; by default if t is 1. The first latent
                frame of a longer clip, alone, needs False.
        """
        mean, std = self._broadcast(latents, image)
        return ((latents.float() - mean) / std).to(latents.dtype)

    def denormalise(self, latents: Tensor, *, image: bool | None = None) -> Tensor:
        """Inverse of `normalise`."""
        mean, std = self._broadcast(latents, image)
        return torch.addcmul(mean, latents.float(), std).to(latents.dtype)

    def _broadcast(self, latents: Tensor, image: bool | None) -> list[Tensor]:
        frames = latents.shape[2]
        pair = self.mean, self.std
        image = frames == 1 if image is None else image
        if image and self.image_mean is not None and self.image_std is not None:
            pair = self.image_mean, self.image_std
        return [
            part.view(len(part), -1)[:, :frames, None, None].to(latents.device) for part in pair
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Content of `mean_std.safetensors`."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class CausalConv(TemporalConv):
    """A causal convolution over three frames; the frame before the first is a copy of the first."""

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:  # type: ignore[override]
        reach, before = 3 - self.stride, cache.get(self)
        if before is None:
            before = cells[:, :1].expand(-1, reach, -1, -1, -1)
        cells = torch.cat([before, cells], dim=1)
        cache.put(self, cells[:, -reach:])
        return super().forward(cells)


class FactorisedConv(nn.Module):
    """A 3 x 3 convolution in space, then one over three frames, nothing between."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.space = SpatialConv(inputs, outputs)
        self.time = CausalConv(outputs, outputs)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        return self.time(self.space(x, cache.rows), cache)


class FrameNorm(nn.Module):
    """Group norm with one group, applied to each frame alone: statistics over C, H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        # the fused norm has a fused gradient, yet on a GPU it gives a whole frame to one block
        by_sums = rows.split or (x.is_cuda and not trained)
        return self._by_sums(x, rows) if by_sums else self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[2:], eps=_EPS)  # statistics in float32
        return torch.addcmul(self.bias.to(x.dtype), normed, self.weight.to(x.dtype))

    def _by_sums(self, x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        """Without gradient; takes no memory but the result's, and rounds once."""
        if x.dtype == torch.float32:
            variance, mean = torch.var_mean(x, _FRAME, correction=0, keepdim=True)
        else:
            # float32: the sums run over ten million values, of which no float32 copy is made
            count = math.prod(x.shape[2:])
            mean = x.sum(_FRAME, keepdim=True, dtype=torch.float32) / count
            norm = torch.linalg.vector_norm(x, 2, _FRAME, keepdim=True, dtype=torch.float32)
            variance = (norm.square() / count - mean.square()).clamp(min=0)
        mean, variance = rows.pool(mean, variance)
        scale = torch.rsqrt(variance + _EPS) * self.weight.float()
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else needs: in its place, unless there is to be a gradient."""
    return F.silu(x, inplace=not x.requires_grad)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(inputs)
        self.conv1 = FactorisedConv(inputs, outputs)
        self.norm2 = FrameNorm(outputs)
        self.conv2 = FactorisedConv(outputs, outputs)
        self.shortcut = _pointwise(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        y = self.conv1(_silu(self.norm1(x, cache.rows)), cache)
        return self.shortcut(x) + self.conv2(_silu(self.norm2(y, cache.rows)), cache)


class Attention(nn.Module):
    """One attention head as wide as the features, over the cells of a frame or over time."""

    def __init__(self, channels: int, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm = FrameNorm(channels)
        self.q = _pointwise(channels, channels)
        self.k = _pointwise(channels, channels)
        self.v = _pointwise(channels, channels)
        self.out = _pointwise(channels, channels)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        normed = self.norm(x, cache.rows)
        q, k, v = (project(normed) for project in (self.q, self.k, self.v))
        # time: each pixel is a sequence of frames; space: each frame is a sequence of pixels
        y = (
            self._over_time(q, k, v, cache)
            if self.over_time
            else self._over_space(q, k, v, cache.rows)
        )
        return x + self.out(y)

    def _over_space(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        shape, whole = q.shape, (q, rows.gather(k, 2), rows.gather(v, 2))
        q, k, v = (part.flatten(2, 3).flatten(0, 1).unsqueeze(1) for part in whole)
        return F.scaled_dot_product_attention(q, k, v).reshape(shape)

    def _over_time(self, q: Tensor, k: Tensor, v: Tensor, cache: CausalCache) -> Tensor:
        k, v = cache.extend((self, "k"), k), cache.extend((self, "v"), v)
        # frame t of the piece sees every frame before the piece, and those up to t in it
        batch, frames, height, width, channels = q.shape
        before = k.shape[1] - frames
        seen = torch.ones(frames, before + frames, dtype=torch.bool, device=q.device)
        mask = seen.tril(before) if before else None
        q, k, v = (
            part.permute(0, 2, 3, 1, 4).flatten(0, 2).unsqueeze(1) for part in (q, k, v)
        )  # (B H W, 1, T, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.reshape(batch, height, width, frames, channels).permute(0, 3, 1, 2, 4)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.spatial_attention = Attention(channels, over_time=False)
        self.temporal_attention = Attention(channels, over_time=True)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = self.spatial_attention(self.block1(x, cache), cache)
        return self.block2(self.temporal_attention(x, cache), cache)


class Downsample(nn.Module):
    """Halve height and width, then time: a strided convolution beside an average."""

    def __init__(self, channels: int, space: bool, time: bool) -> None:
        super().__init__()
        self.space = SpatialConv(channels, channels, stride=2) if space else None
        self.time = CausalConv(channels, channels, stride=2) if time else None
        self.mix = _pointwise(channels, channels)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        if self.space is not None:
            mean = each_frame(F.avg_pool2d, x, 2)  # bf16 averages in two axes on any device
            x = self.space(x, cache.rows) + mean
        if self.time is not None:
            if not cache.started:
                x = torch.cat([x[:, :1], x], dim=1)
            mean = (x[:, ::2] + x[:, 1::2]) / 2
            x = self.time(x, cache) + mean
        return self.mix(x)


class Upsample(nn.Module):
    """Double time (the first frame stays one frame), then height and width."""

    def __init__(self, channels: int, space: bool, time: bool) -> None:
        super().__init__()
        self.time = CausalConv(channels, channels) if time else None
        self.space = SpatialConv(channels, channels) if space else None
        self.mix = _pointwise(channels, channels)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        if self.time is not None:
            x = x[:, :, None].expand(-1, -1, 2, -1, -1, -1).flatten(1, 2)
            if not cache.started:
                x = x[:, 1:]
            x = x + self.time(x, cache)
        if self.space is not None:
            x = enlarge(x)
            x = x + self.space(x, cache.rows)
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

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        for block in self.blocks:
            x = block(x, cache)
        return x if self.resample is None else self.resample(x, cache)


class Encoder(nn.Module):
    """Causal encoder: pixels (1, 3, T, H, W) -> latents (1, C, t, h, w), in pieces of time."""

    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        self.patch, self.tap = config.patch, config.tap
        self.conv_in = FactorisedConv(config.patch_channels, config.channels)
        self.levels = nn.ModuleList()
        width = config.channels
        for number, outputs in enumerate(config.level_channels):
            step = config.down(number)
            resample = Downsample(outputs, *step) if any(step) else None
            self.levels.append(Level(width, outputs, config.num_blocks, resample))
            width = outputs
        self.middle = Middle(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorisedConv(width, config.z_channels)

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        x = transforms.patch(cells, self.patch, self.tap, start=not cache.started)
        x = self.conv_in(x, cache)
        for level in self.levels:
            x = level(x, cache)
        x = self.middle(x, cache)
        return self.conv_out(_silu(self.norm_out(x, cache.rows)), cache)


class Decoder(nn.Module):
    """Causal decoder: latents (1, C, t, h, w) -> pixels (1, 3, T, H, W), in pieces of time."""

    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        width = config.level_channels[-1]
        self.patch, self.tap = config.patch, config.tap
        self.conv_in = FactorisedConv(config.z_channels, width)
        self.middle = Middle(width)
        levels: list[Level] = []
        for number, outputs in reversed(list(enumerate(config.level_channels))):
            step = config.up(number)
            resample = Upsample(outputs, *step) if any(step) else None
            levels.append(Level(width, outputs, config.num_blocks + 1, resample))
            width = outputs
        self.levels = nn.ModuleList(reversed(levels))  # numbered as in the files, finest first
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorisedConv(width, config.patch_channels)

    def forward(self, z: Tensor, cache: CausalCache) -> Tensor:
        x = self.conv_in(z.contiguous(), cache)
        x = self.middle(x, cache)
        for level in reversed(self.levels):
            x = level(x, cache)
        x = self.conv_out(_silu(self.norm_out(x, cache.rows)), cache)
        return transforms.unpatch(x, self.patch, self.tap, start=not cache.started)


class CosmosTokenizer(CausalTokenizer):
    """Encoder, quantiser and decoder; continuous when the configuration has no FSQ levels.

    In pieces its memory is that of one piece, and the keys and values of the temporal attention,
    which does look at every latent frame before: at 704 x 1280 29 MB (bf16) for each 8 frames.
    """

    config: CosmosTokenizerConfig
    chunk = 4  # latent frames at once; at 704 x 1280 5 % slower than the whole, in about 3 GB

    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = _pointwise(config.z_channels, config.latent_channels)
        self.post_quant_conv = _pointwise(config.latent_channels, config.z_channels)
        self.decoder = Decoder(config)

    def encode_piece(self, video: Tensor, cache: CausalCache) -> Tensor:
        """Latents; those of a discrete tokenizer are the values before FSQ."""
        cells = self.quant_conv(self.encoder(video.permute(0, 2, 3, 4, 1), cache))
        return cells.permute(0, 4, 1, 2, 3)

    def decode_piece(self, latents: Tensor, cache: CausalCache) -> Tensor:
        cells = self.post_quant_conv(latents.permute(0, 2, 3, 4, 1))
        return self.decoder(cells, cache).permute(0, 4, 1, 2, 3)

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Token ids (B, t, h, w), int32 in [0, vocabulary), of what `encode` returns."""
        assert self.config.levels is not None
        codes = transforms.quantize(latents.movedim(1, -1), self.config.levels)
        return transforms.codes_to_indices(codes, self.config.levels)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Codes (B, C, t, h, w), for `decode`, of token ids (B, t, h, w), any integer dtype."""
        assert self.config.levels is not None
        codes = transforms.indices_to_codes(tokens, self.config.levels).movedim(-1, 1)
        return codes.to(self.post_quant_conv.weight.dtype)

    def encode_tokens(self, video: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Token ids (B, t, h, w), int32 in [0, vocabulary); NaN, which has none, is refused."""
        latents = self.encode(video, cache)
        check_finite(total(latents), "encode: latents", latents.dtype)
        return self.to_tokens(latents)

    def reconstruct(self, video: Tensor) -> Tensor:
        """decode(encode(video)); gradients pass straight through the quantiser."""
        latents = self.encode(video)
        if self.config.levels is not None:
            if not latents.requires_grad:  # infinity has codes; training finds it in gradients
                check_finite(total(latents), "encode: latents", latents.dtype)
            codes = transforms.quantize(latents.movedim(1, -1), self.config.levels)
            latents = codes.movedim(-1, 1).to(latents.dtype)
        return self.decode(latents)
