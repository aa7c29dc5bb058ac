"""Causal video tokenizer of Wan2.1: pixels <-> continuous latents, 8 x 8 pixels by 4 frames a cell.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/tokenizers/wan2pt1.py`; arXiv 2503.20314,
section 4.1. Every layer is causal in time: the first frame alone makes the first latent frame, and
each later latent frame four more.
Axes: B batch, T/H/W frames, rows, columns, C channels; t/h/w those of latents.

Between the layers a clip is kept as "cells", (B, T, H, W, C) in that order of memory, which a
convolution takes as channels last without a copy: a spatial one sees the frames as a batch, a
temporal one the rows of a frame as one axis. A clip may also pass in pieces: see
`worldline.nn.pieces`. No layer looks further back than two frames, so that memory is that of one
piece, whatever the length of the clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.modulation import kernels_for
from worldline.nn.pieces import (
    CausalCache,
    CausalTokenizer,
    Rows,
    SpatialConv,
    TemporalConv,
    enlarge,
)

# Below the squared length at which the reference stops dividing, 1e-24; zeros stay zeros.
_EPS = 1e-26
_REACH = 2  # frames before its own that a causal convolution sees
_EIGHT = 8  # channels come to tensor cores by this number
_FEW = 96  # channels that a GPU convolves faster as three times as many in two axes
_WIDEST = 256  # head that the fused kernels take
_KERNELS = "worldline.tokenizers.wan.kernels"

# of the released latents, in code and not in the file
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, kw_only=True)
class WanTokenizerConfig:
    """Architecture: shapes of all weights, and the statistics of latents.

    Attributes:
        channels: width of the first convolution of the encoder and of the last of the decoder.
        multipliers: width of each level over `channels`, finest first.
        num_blocks: residual blocks a level of the encoder; the decoder has one more.
        temporal_steps: whether time is halved too between a level and the next.
        latent_channels: channels of a latent.
        mean: mean of the encoder's output, for each channel; latents are normalised.
        std: its standard deviation.
    """

    channels: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    temporal_steps: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 16
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} deviations do not fit "
                f"{self.latent_channels} latent channels"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ValueError("a mean that is not finite, or a deviation that is not above 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def spatial(self) -> int:
        """Pixels that a latent cell covers on each side."""
        return 1 << len(self.temporal_steps)

    @property
    def temporal(self) -> int:
        """Frames that a latent frame covers; the first covers one."""
        return 1 << sum(self.temporal_steps)


def norm_silu(
    cells: Tensor,
    gamma: Tensor,
    before: Tensor | None,
    *,
    bias: Tensor | None = None,
    flat: bool = False,
) -> Tensor:
    """RMS norm of cells (B, T, H, W, C), scaled, through SiLU, behind the frames before.

    A bias (C,) is added first. The frames before are results (B, 2, H, W, C), by default zeros;
    if `flat`, all are put `side_by_side`.
    """
    kernels = kernels_for(cells, _KERNELS)
    if kernels is not None:
        return kernels.norm_silu(cells, bias, gamma, before, _REACH, _EPS, flat=flat)
    y = _norm(cells if bias is None else cells + bias, gamma)
    padded = _preceded(F.silu(y, inplace=not y.requires_grad), before)
    return side_by_side(padded) if flat else padded


def _norm(cells: Tensor, gamma: Tensor) -> Tensor:
    return F.rms_norm(cells, cells.shape[-1:], gamma.to(cells.dtype), _EPS)


def _preceded(cells: Tensor, before: Tensor | None) -> Tensor:
    """Cells with those before, or zeros, at their front."""
    if before is None:
        return F.pad(cells, (0, 0, 0, 0, 0, 0, _REACH, 0))
    return torch.cat([before, cells], dim=1)


def side_by_side(padded: Tensor) -> Tensor:
    """Each frame of (B, 2 + T, H, W, C) behind the two before it: (B, T, H, W, 3 C)."""
    frames = padded.shape[1] - _REACH
    return torch.cat([padded[:, n : n + frames] for n in range(_REACH + 1)], dim=-1)


class CausalConv(nn.Module):
    """A 3 x 3 x 3 convolution over each frame and the two before it; zeros before the first.

    With `normed`, its input is normed and activated first. A caller that needs the bias elsewhere,
    or can free its input in between, calls `pad` and `convolve` itself.
    """

    def __init__(self, inputs: int, outputs: int, *, normed: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(inputs, 1, 1, 1)) if normed else None
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.prepare = norm_silu  # training may put a compiled one in its place

    def forward(self, cells: Tensor, cache: CausalCache, *, biased: bool = True) -> Tensor:
        return self.convolve(self.pad(cells, cache), cache.rows, biased=biased)

    def pad(self, cells: Tensor, cache: CausalCache, bias: Tensor | None = None) -> Tensor:
        """Input of `convolve`: cells, normed if they are to be, and the two frames before.

        A bias (C,) is added to cells that are normed. Few channels are padded to eight.
        """
        before, flat = cache.get(self), self._is_flat(cells)
        if self.gamma is None:
            # a picture has three channels: five of zeros change nothing but the kernel's speed
            padded = _preceded(F.pad(cells, (0, _missing(cells.shape[-1]))), before)
            padded = side_by_side(padded) if flat else padded
        else:
            padded = self.prepare(cells, self.gamma.flatten(), before, bias=bias, flat=flat)
        if flat:
            frames = padded[:, -1].unflatten(-1, (_REACH + 1, -1))
            cache.put(self, frames[..., 1:, :].movedim(-2, 1))
        else:
            cache.put(self, padded[:, -_REACH:])
        return padded

    def convolve(self, padded: Tensor, rows: Rows, *, biased: bool = True) -> Tensor:
        """Convolution (B, T, H, W, C') of what `pad` returned."""
        return rows.convolve(partial(self._convolve, biased=biased), padded)

    def _convolve(self, padded: Tensor, biased: bool) -> Tensor:
        flat, outputs = self._is_flat(padded), len(self.bias)
        inputs = padded.shape[-1] // (_REACH + 1 if flat else 1)
        more_inputs, more_outputs = inputs - self.weight.shape[1], _missing(outputs)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias if biased else None
        if more_inputs or more_outputs:
            weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more_inputs, 0, more_outputs))
            bias = None if bias is None else F.pad(bias, (0, more_outputs))
        if flat:
            cells = convolve_flat(padded, weight, bias)
        else:
            x = F.conv3d(padded.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, 1, 1))
            cells = x.permute(0, 2, 3, 4, 1)
        return cells[..., :outputs]

    def _is_flat(self, cells: Tensor) -> bool:
        """Whether to convolve three frames as one of three times the channels: where it is faster.

        On one core with 8 to 32 channels that was 4 to 12 times as fast as torch 2.13's convolution
        in three axes, in bfloat16 14 to 20 times; with 96 channels it was no slower. On an H200
        (bfloat16) it was 1.6 times as fast with 96 channels, and no faster with 192, or where few
        come out.
        """
        if not cells.is_cuda:
            return True
        few = self.weight.shape[1] <= _FEW and len(self.bias) > _EIGHT
        return few and kernels_for(cells, _KERNELS) is not None


def convolve_flat(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3 x 3 x 3 convolution (B, T, H, W, C') of frames `side_by_side`, zero-padded."""
    flat = weight.transpose(1, 2).flatten(1, 2)  # (C', 3 C, 3, 3)
    # one frame of one clip must keep its strides: flattened last, it would not be channels last
    frames = F.conv2d(cells.flatten(0, 1).permute(0, 3, 1, 2), flat, bias, padding=1)
    return frames.permute(0, 2, 3, 1).unflatten(0, cells.shape[:2])


def _missing(channels: int) -> int:
    """Channels to add where there are fewer than tensor cores take at once."""
    return max(0, _EIGHT - channels)


class Pointwise(nn.Module):
    """A linear map of each cell; the weight has its released shape, with `axes` of one."""

    def __init__(self, inputs: int, outputs: int, *, axes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *[1] * axes))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, cells: Tensor, outputs: int | None = None) -> Tensor:
        """The first `outputs` channels; all by default."""
        return F.linear(cells, self.weight[:outputs].flatten(1), self.bias[:outputs])


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(inputs, outputs)
        self.conv2 = CausalConv(outputs, outputs)
        self.shortcut = Pointwise(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        kernels = kernels_for(cells, _KERNELS)
        plain = kernels is None  # else kernels add biases in passing: cuDNN leaves them to torch
        y = self.conv1(cells, cache, biased=plain)
        padded = self.conv2.pad(y, cache, None if plain else self.conv1.bias)
        del y  # as large as a piece gets
        y = self.conv2.convolve(padded, cache.rows, biased=plain)
        if kernels is not None:
            return kernels.add(y, self.conv2.bias, self.shortcut(cells))
        return y.add_(self.shortcut(cells))


class Attention(nn.Module):
    """One attention head as wide as the features, over the cells of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, 1, 1))
        self.qkv = Pointwise(channels, 3 * channels, axes=2)
        self.out = Pointwise(channels, channels, axes=2)

    def forward(self, cells: Tensor, rows: Rows) -> Tensor:
        qkv = self.qkv(_norm(cells, self.gamma.flatten()))
        (q, _, _), (_, k, v) = (  # (B T, H W, C)
            x.flatten(2, 3).flatten(0, 1).chunk(3, dim=-1) for x in (qkv, rows.gather(qkv, 2))
        )
        if q.is_cuda and q.shape[-1] > _WIDEST and not torch.is_grad_enabled():
            y = attend_in_blocks(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return self.out(y.reshape(cells.shape)).add_(cells)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, block_bytes: int = 1 << 27) -> Tensor:
    """Attention of one head, a block of queries at a time, (N, L, C), of any L.

    For heads that the fused kernels of a GPU do not take: torch's fallback is several times slower
    than two matrix products. Scores and their softmax are float32, `block_bytes` of them at once.
    """
    batch, length, channels = q.shape
    rows = max(1, block_bytes // (4 * batch * k.shape[1]))
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start in range(0, length, rows):
        block = q[:, start : start + rows]
        if q.is_cuda and q.dtype != torch.float32:
            scores = torch.bmm(block, k.mT, out_dtype=torch.float32)
        else:
            scores = torch.bmm(block, k.mT).float()
        weights = torch.softmax(scores.mul_(channels**-0.5), dim=-1).to(v.dtype)
        torch.bmm(weights, v, out=result[:, start : start + rows])
    return result


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.attention = Attention(channels)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        return self.block2(self.attention(self.block1(cells, cache), cache.rows), cache)


class Downsample(nn.Module):
    """Halve height and width, then time; the first frame stays one frame."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.space = SpatialConv(channels, channels, stride=2, axes=2)
        self.time = TemporalConv(channels, channels, stride=2) if time else None

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        cells = self.space(cells, cache.rows)
        if self.time is None:
            return cells
        before = cache.get(self)
        if before is not None:
            cells = torch.cat([before, cells], dim=1)
        cache.put(self, cells[:, -1:])
        if before is not None:
            return self.time(cells)
        if cells.shape[1] == 1:
            return cells
        return torch.cat([cells[:, :1], self.time(cells)], dim=1)


class Upsample(nn.Module):
    """Double time (the first frame stays one frame), then height and width; halve the channels.

    The first frame is not seen by the convolution over time: before the second there are zeros.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.time = TemporalConv(channels, 2 * channels) if time else None
        self.space = SpatialConv(channels, channels // 2, axes=2)

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        if self.time is not None:
            cells = self._double(self.time, cells, cache)
        return self.space(enlarge(cells), cache.rows)

    def _double(self, time: TemporalConv, cells: Tensor, cache: CausalCache) -> Tensor:
        before = cache.get(self)
        first, later = (None, cells) if before is not None else (cells[:, :1], cells[:, 1:])
        padded = _preceded(later, before)
        cache.put(self, padded[:, -_REACH:])
        if not later.shape[1]:
            return cells
        pairs = time(padded).unflatten(-1, (2, -1))  # (B, T, H, W, 2, C): even, then odd frame
        later = pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return later if first is None else torch.cat([first, later], dim=1)


class Encoder(nn.Module):
    """Causal encoder: pixels (1, 3, T, H, W) -> means and log variances (1, 2C, t, h, w)."""

    def __init__(self, config: WanTokenizerConfig) -> None:
        super().__init__()
        self.conv_in = CausalConv(3, config.channels, normed=False)
        self.layers = nn.ModuleList()  # numbered through all levels, as in the files
        width = config.channels
        for outputs, time in zip_longest(config.widths, config.temporal_steps):
            for _ in range(config.num_blocks):
                self.layers.append(ResidualBlock(width, outputs))
                width = outputs
            if time is not None:
                self.layers.append(Downsample(width, time=time))
        self.middle = Middle(width)
        self.conv_out = CausalConv(width, 2 * config.latent_channels)

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        cells = self.conv_in(cells, cache)
        for layer in self.layers:
            cells = layer(cells, cache)
        return self.conv_out(self.middle(cells, cache), cache)


class Decoder(nn.Module):
    """Causal decoder: latents (1, C, t, h, w) -> pixels (1, 3, T, H, W), in pieces of time."""

    def __init__(self, config: WanTokenizerConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv_in = CausalConv(config.latent_channels, width, normed=False)
        self.middle = Middle(width)
        self.layers = nn.ModuleList()  # numbered through all levels, as in the files
        for level, outputs in reversed(list(enumerate(config.widths))):
            for _ in range(config.num_blocks + 1):
                self.layers.append(ResidualBlock(width, outputs))
                width = outputs
            if level:
                self.layers.append(Upsample(width, time=config.temporal_steps[level - 1]))
                width //= 2
        self.conv_out = CausalConv(width, 3)

    def forward(self, cells: Tensor, cache: CausalCache) -> Tensor:
        cells = self.middle(self.conv_in(cells, cache), cache)
        for layer in self.layers:
            cells = layer(cells, cache)
        return self.conv_out(cells, cache)


class WanTokenizer(CausalTokenizer):
    """Encoder and decoder; latents are normalised, so that they are about of unit deviation."""

    config: WanTokenizerConfig
    chunk = 1  # latent frames at once: 4 frames; two are 6 % faster in 1.6 times the memory

    def __init__(self, config: WanTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Pointwise(2 * channels, 2 * channels)
        self.post_quant_conv = Pointwise(channels, channels)
        self.decoder = Decoder(config)

    def channels_last(self) -> WanTokenizer:
        """Itself, its weights in the order in which convolutions of cells take them."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
        return self

    def encode_piece(self, video: Tensor, cache: CausalCache) -> Tensor:
        """Normalised latents: the mean of the encoder's distribution."""
        moments = self.encoder(video.permute(0, 2, 3, 4, 1), cache)
        cells = self.quant_conv(moments, self.config.latent_channels)  # the rest is the variance
        mean, scale = _statistics(self.config, cells.dtype, cells.device)
        return ((cells - mean) * scale).permute(0, 4, 1, 2, 3)

    def decode_piece(self, latents: Tensor, cache: CausalCache) -> Tensor:
        cells = latents.permute(0, 2, 3, 4, 1)
        mean, scale = _statistics(self.config, cells.dtype, cells.device)
        cells = self.decoder(self.post_quant_conv(cells / scale + mean), cache)
        return cells.permute(0, 4, 1, 2, 3)


@cache
def _statistics(
    config: WanTokenizerConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and 1/deviation of latents, each rounded to a dtype as in the reference.

    They are cached, since each piece would wait for a copy to the GPU.
    """
    with torch.inference_mode(False):  # the cached tensors serve training too
        mean, std = torch.tensor([config.mean, config.std], dtype=dtype, device=device)
        return mean, 1 / std
