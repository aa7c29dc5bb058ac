"""Tensors in memory in the place of those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from worldline.weights.source import TensorInfo


@dataclass(frozen=True)
class MemoryTensor:
    """A `Source` that is read already; its tensor may be on the meta device."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.tensor.dtype, tuple(self.tensor.shape))

    def read(self) -> Tensor:
        return self.tensor
