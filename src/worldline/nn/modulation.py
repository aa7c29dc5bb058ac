"""adaLN around every sub-block of a diffusion transformer: gates, norms, shifts and scales.

Source: adaLN of arXiv 2212.09748 (DiT), section 3.2, in its low-rank form; nvidia-cosmos/
cosmos-predict1 `diffusion/module/blocks.py`. The functions run as one kernel each on a GPU with
Triton while no gradient is wanted; their plain forms are the definition.
Axes: B batch, L tokens, D width, N heads, K head size.

A vector that modulates is (B, D) for all tokens, or (B, G, D) with one for each of the G equal runs
that the tokens are cut into, such as latent frames with noise levels of their own.
"""

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.nn.rope import Rotation

NORM_EPS = 1e-6
_KERNELS = "worldline.nn.modulation_kernels"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def fused(device: torch.device) -> bool:
    """Whether kernels do the work on a device while no gradient is wanted."""
    return device.type == "cuda" and has_triton()


def kernels_for(x: Tensor, module: str) -> ModuleType | None:
    """The module of kernels, where no gradient is wanted and `x` is on a GPU with Triton."""
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype not in _DTYPES or not has_triton():
        return None
    return import_module(module)


class Residual(NamedTuple):
    """The residual stream, and the last sub-block's output that is not added to it yet.

    Attributes:
        stream: (B, L, D).
        update: (B, L, D), to be multiplied by `gate`; None before the first sub-block.
        gate: (B, D) or (B, G, D).
    """

    stream: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None

    def total(self) -> Tensor:
        """The stream with the gated update."""
        if self.update is None or self.gate is None:
            return self.stream
        return self.stream + _by_token(self.gate, self.stream) * self.update


def _by_token(vectors: Tensor, stream: Tensor) -> Tensor:
    """`vectors` in a shape that broadcasts with a stream (B, L, D)."""
    if vectors.ndim == 2:
        return vectors.unsqueeze(1)
    if vectors.shape[1] == 1:
        return vectors
    return vectors.repeat_interleave(stream.shape[1] // vectors.shape[1], dim=1)


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines (..., width), of `timesteps` (...), float32; base 10,000."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    # float32: the phases of neighbouring noise levels are equal in bf16
    angles = timesteps.float().unsqueeze(-1) * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def add_and_modulate(
    residual: Residual,
    added: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gated update and `added` (L, D) to the stream; apply adaLN for the next sub-block.

    The layer norm has no weights, and by default the stream's precision.

    Returns:
        The stream, perhaps in the memory of the old one, and its modulated norm, both (B, L, D).
    """
    kernels = kernels_for(residual.stream, _KERNELS)
    if kernels is not None:
        return kernels.add_and_modulate(*residual, added, shift, scale, dtype, NORM_EPS)
    stream = residual.total() if added is None else residual.total() + added
    normed = F.layer_norm(stream.to(dtype or stream.dtype), stream.shape[-1:], eps=NORM_EPS)
    return stream, normed * (1 + _by_token(scale, stream)) + _by_token(shift, stream)


def norm_heads(x: Tensor, weight: Tensor, rotation: Rotation | None = None) -> Tensor:
    """RMS norm of each head (B, L, N, K), scaled and rotated; a kernel overwrites `x`.

    The weight is (K,), shared by all heads, the rotation (L, K) float32; in the plain form it may
    be one of each clip, (B, L, K).
    """
    kernels = kernels_for(x, _KERNELS)
    if kernels is not None:
        return kernels.norm_heads(x, weight, rotation, NORM_EPS)
    wide = torch.promote_types(x.dtype, torch.float32)  # squares of bf16 would lose the mean
    y = x.to(wide)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * weight
    if rotation is None:
        return y
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)
    y = y.to(wide)  # the released kernel turns in float32
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
