"""Attention: the one place where its backend is chosen, and the cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# From here on cuDNN wins on Hopper: it plans each new shape once, which costs milliseconds.
LONG = 4096
# in order of speed for long queries without a mask, on GPUs of compute capability 9 and above
_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v.

    Args:
        q: (B, N, L, K).
        k: (B, M, S, K), N a multiple of M: each key head serves N/M neighbouring query heads.
        v: as `k`.
        causal: query i sees keys 0 .. S - L + i, as when the keys before are a cached prefix.
        mask: boolean, broadcast to (B, N, L, S); True is visible; not together with `causal`.
    """
    length, visible = q.shape[2], k.shape[2]
    if length == 1:
        return _attend_one(q, k, v, mask)
    if causal and length < visible:
        mask = torch.ones(length, visible, dtype=torch.bool, device=q.device)
        mask = mask.tril(visible - length)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cuda":
        # the fused CPU kernel takes equal head counts only; the copy is small there
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        grouped = False
    if mask is None and not causal and _prefers_cudnn(q.device, q.dtype, length):
        with sdpa_kernel(_HOPPER, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and length == visible, enable_gqa=grouped
    )


def attend_partially(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` to some of the keys, so that the results of several parts can be joined.

    Args:
        q: (B, N, L, K).
        k: (B, N, S, K).
        v: as `k`.

    Returns:
        Result in the shape of `q`, and the logarithm of the sum of its weights (B, N, L), float32
        or wider.
    """
    aten, backend = torch.ops.aten, SDPBackend.MATH
    if q.shape[3] % 8 == 0:  # others are padded by torch, one level above these kernels
        first = _HOPPER if _prefers_cudnn(q.device, q.dtype, q.shape[2]) else _HOPPER[1:]
        with sdpa_kernel(first, set_priority=True):
            backend = SDPBackend(torch._fused_sdp_choice(q, k, v))
    if backend == SDPBackend.CUDNN_ATTENTION:
        found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        found = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    elif backend == SDPBackend.FLASH_ATTENTION and q.is_cuda:
        found = aten._scaled_dot_product_flash_attention(q, k, v)
    elif backend == SDPBackend.FLASH_ATTENTION and q.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)  # a sum over thousands of weights
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * q.shape[3] ** -0.5
        sums = scores.logsumexp(-1)
        found = (scores - sums.unsqueeze(-1)).exp().to(v.dtype) @ v, sums
    # (B, N, L), (B, N, L, 1) or, filled up, (B, N, 32 n)
    return found[0], found[1].flatten(2)[..., : q.shape[2]]


def _prefers_cudnn(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether to ask for cuDNN first: 1.6 to 1.8 times FlashAttention 2 on Hopper."""
    half = dtype in (torch.bfloat16, torch.float16)
    long = device.type == "cuda" and length >= LONG
    return half and long and torch.cuda.get_device_capability(device) >= (9, 0)


def backend_name(device: torch.device, dtype: torch.dtype, length: int) -> str:
    """Backend of full attention of `length` tokens, for a report."""
    return "torch SDPA" + (", cuDNN first" if _prefers_cudnn(device, dtype, length) else "")


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for one query: the heads of a group share one product, and no key is copied.

    The fused backends are made for long queries; cuDNN's would also be planned anew for every
    length of the cache (measured: 48 ms a token on the 4B model).
    """
    batch, heads, _, size = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], size)
    wide = torch.promote_types(q.dtype, torch.float32)  # a sum over thousands of weights
    scores = (grouped @ k.transpose(-1, -2)).to(wide) * size**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(q.shape)


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, in one allocation; attention reads the filled prefix.

    Attributes:
        keys: (layers, B, heads, length, head size), normalised and rotated.
        values: same shape.
    """

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def one(self, clip: int) -> KVCache:
        """Cache of one clip of the batch; its memory is shared."""
        return KVCache(self.keys[:, clip : clip + 1], self.values[:, clip : clip + 1])

    def forget(self, start: int, count: int) -> None:
        """Drop `count` tokens from `start` on; those behind move up, and keep their rotation."""
        for part in (*self.keys, *self.values):  # by layers: the copy between needs their memory
            part[:, :, start:-count] = part[:, :, start + count :].clone()

    def append(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, heads, S, K) at `start`; return all of this layer up to their end."""
        end = start + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
