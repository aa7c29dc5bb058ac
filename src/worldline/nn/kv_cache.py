"""Keys and values of the tokens seen so far, in one allocation of fixed size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache(NamedTuple):
    """Static cache; attention reads the filled prefix alone.

    Attributes:
        keys: (layers, B, heads, length, head size), normalised and rotated.
        values: same shape.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> KVCache:
        """Return a cache of zeros."""
        shape = (layers, batch, heads, length, head_size)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values)

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def one(self, clip: int) -> KVCache:
        """Return the cache of one clip of the batch; its memory is shared."""
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
