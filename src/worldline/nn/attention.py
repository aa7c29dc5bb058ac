"""The one place where attention is computed and its backend is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v.

    Args:
        q: (B, N, L, K).
        k: (B, M, S, K), N a multiple of M: each key head serves N/M neighbouring query heads.
        v: as `k`.
        causal: query i sees keys 0 .. S - L + i, as when the keys before are a cached prefix.
        mask: boolean, broadcast to (B, N, L, S); True is visible. Not together with `causal`.

    Raises:
        ValueError: both `causal` and `mask` are given.
    """
    if causal and mask is not None:
        raise ValueError("attend takes causal or a mask, not both")
    length, visible = q.shape[2], k.shape[2]
    if length == 1:
        return _attend_one(q, k, v, mask)
    if causal and length < visible:
        rows = torch.arange(visible - length, visible, device=q.device)
        mask = rows[:, None] >= torch.arange(visible, device=q.device)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cuda":
        # the fused CPU kernel takes equal head counts only; the copy is small there
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and length == visible, enable_gqa=grouped
    )


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
