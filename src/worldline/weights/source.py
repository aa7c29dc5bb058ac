"""Tensors in files: where their bytes lie, and how the bytes become a tensor.

A `FileTensor` is an entry of a header: position, dtype, shape, strides. Nothing is read until
`read`, which maps the tensor's own bytes and no others, so that a mapping ends with its tensor.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from worldline.errors import CheckpointError

# Ranks that hold a replicated tensor may have drifted apart by rounding; the reference's bounds.
_REPLICA_ATOL, _REPLICA_RTOL = 5e-2, 0.1


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class Source(Protocol):
    """A tensor that can be read: a `FileTensor`, a `ShardedTensor`, or a caller's own."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self) -> Tensor:
        """The tensor, on the CPU."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor inside a file, not read yet.

    Attributes:
        path: the file.
        info: dtype and shape.
        position: first element, in bytes from the start of the file.
        strides: in elements.
    """

    path: Path
    info: TensorInfo
    position: int
    strides: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether the elements lie in the file one after another, ready to be copied as bytes."""
        row_major = contiguous_strides(self.info.shape)
        # The stride of an axis of one element is never used and may be anything.
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(self.info.shape, self.strides, row_major, strict=True)
        )

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.info.numel == 0:
            return 0
        last = sum(
            (n - 1) * stride for n, stride in zip(self.info.shape, self.strides, strict=True)
        )
        return (last + 1) * self.info.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor on the CPU; memory-mapped (private, writable).

        Raises:
            CheckpointError: the file vanished or shrank since its header was read.
        """
        dtype, shape = self.info.dtype, self.info.shape
        if self.info.numel == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        data = self._map()
        if self.position % dtype.itemsize:
            data = data.clone()  # kernels may expect an address that is a multiple of the item size
        return data.view(dtype).as_strided(shape, self.strides)

    def _map(self) -> Tensor:
        offset = self.position % mmap.ALLOCATIONGRANULARITY
        start = self.position - offset
        try:
            with self.path.open("rb") as file:
                # A copy-on-write mapping: torch wants writable memory, and the file stays as it is.
                mapping = mmap.mmap(
                    file.fileno(), offset + self.span, access=mmap.ACCESS_COPY, offset=start
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} was changed while in use: {error}") from error
        return torch.frombuffer(mapping, dtype=torch.uint8, count=self.span, offset=offset)


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor that several ranks hold.

    Attributes:
        name: file and tensor, for messages.
        parts: one a rank.
        dim: the axis on which parts are joined; None if each part is the whole tensor.
    """

    name: str
    parts: tuple[Source, ...]
    dim: int | None

    @cached_property
    def info(self) -> TensorInfo:
        first = self.parts[0].info
        if self.dim is None:
            return first
        rows = sum(part.info.shape[self.dim] for part in self.parts)
        return TensorInfo(
            first.dtype, (*first.shape[: self.dim], rows, *first.shape[self.dim + 1 :])
        )

    def read(self) -> Tensor:
        """The whole tensor on the CPU; replicas are averaged.

        Raises:
            CheckpointError: replicas differ by more than rounding.
        """
        tensors = [part.read() for part in self.parts]
        if self.dim is not None:
            return torch.cat(tensors, self.dim)
        first = tensors[0]
        if all(torch.equal(first, other) for other in tensors[1:]):
            return first
        mean = torch.stack([tensor.float() for tensor in tensors]).mean(0).to(first.dtype)
        if not torch.allclose(first, mean, atol=_REPLICA_ATOL, rtol=_REPLICA_RTOL):
            worst = (first.float() - mean.float()).abs().max().item()
            raise CheckpointError(
                f"{self.name} is copied on every rank, yet rank 0 is {worst:.3g} away from the "
                "mean: the shards are not of one model"
            )
        return mean


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, or several that make one model, opened by header.

    Attributes:
        path: the file; of several, the first, the index or their folder.
        kind: "safetensors", "pt", "jit" or "tensor-parallel shards".
        entries: name as stored -> tensor.
        files: all files that make it, the index of several too; sorted.
        nesting: dotted path of the dict inside the file that was taken, such as "model".
        beside: other keys of the outer dict, such as "optimizer".
        metadata: the text that a safetensors file carries.
    """

    path: Path
    kind: str
    entries: Mapping[str, Source]
    files: tuple[Path, ...] = ()
    nesting: str = ""
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Kind and shape of every tensor, by its name in the file."""
        return {name: entry.info for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, memory-mapped where the format allows.

        Raises:
            CheckpointError: there is no such tensor, or the file changed or is inconsistent.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.entries[name].read()
