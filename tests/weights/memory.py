"""Tensors in memory in the place of those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor of a checkpoint that is read already; its tensor may be on the meta device."""

    tensor: Tensor
    path = Path("memory")

    @property
    def meta(self) -> Tensor:
        return self.tensor.to("meta")

    def read(self) -> Tensor:
        return self.tensor
