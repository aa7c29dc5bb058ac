"""Keys and values of the tokens seen so far, in one allocation of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Static cache; attention reads the filled prefix alone.

    Attributes:
        keys: (layers, B, heads, length, head size), normalised and rotated.
        values: same shape.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, length, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, heads, S, K) at `start`; return all of this layer up to their end."""
        end = start + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
