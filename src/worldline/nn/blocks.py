"""Small parts that transformer families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis (arXiv 1910.07467), then scale.

    The statistics are float32; the result is cast back before it is multiplied by the weight, as in
    nvidia-cosmos/cosmos-predict1 `autoregressive/modules/normalization.py`.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # float32: squares of bf16 values would lose the mean
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight
