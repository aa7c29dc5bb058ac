"""Where one tensor of a file lies, and how its bytes become a tensor.

A `FileTensor` is all that a header tells: position, dtype, shape, strides. Nothing is read until
`read`, which maps the tensor's own bytes and no others, so that a mapping ends with its tensor.
"""

from __future__ import annotations

import math
import mmap
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from worldline.errors import CheckpointError


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
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Source(Protocol):
    """What can be read to a tensor, once: a `FileTensor`, or a caller's own."""

    @property
    def info(self) -> TensorInfo:
        """Its dtype and shape."""

    @property
    def path(self) -> Path | None:
        """The file; None for a tensor that is of none."""

    def read(self) -> Tensor:
        """Return the tensor, on the CPU."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor inside a file, not read yet.

    Attributes:
        path: the file.
        info: dtype and shape.
        position: of the first element: bytes from the file's start, or from the start of `member`.
        strides: in elements.
        swapped: the bytes are in the other byte order than this machine's.
        member: name of a compressed zip member that holds the bytes; None if they lie in the file.
    """

    path: Path
    info: TensorInfo
    position: int
    strides: tuple[int, ...]
    swapped: bool = False
    member: str | None = None

    @property
    def plain(self) -> bool:
        """Whether the elements lie in the file one after another, ready to be copied as bytes."""
        if self.member is not None or self.swapped:
            return False
        row_major = contiguous_strides(self.info.shape)
        # The stride of an axis of one element is never used and may be anything.
        return all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(self.info.shape, self.strides, row_major, strict=True)
        )

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.info.numel == 0:
            return 0
        last = sum(
            (size - 1) * stride for size, stride in zip(self.info.shape, self.strides, strict=True)
        )
        return (last + 1) * self.info.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor on the CPU; memory-mapped (private, writable) unless it is compressed.

        Raises:
            CheckpointError: the file vanished or shrank since its header was read.
        """
        dtype, shape = self.info.dtype, self.info.shape
        if self.info.numel == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        data = self._mapped() if self.member is None else self._decompressed()
        unit = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        if self.swapped and unit > 1:
            data = data.view(-1, unit).flip(1).reshape(-1)
        if self.position % dtype.itemsize:
            data = data.clone()  # kernels may expect an address that is a multiple of the item size
        return data.view(dtype).as_strided(shape, self.strides)

    def _mapped(self) -> Tensor:
        start = self.position - self.position % mmap.ALLOCATIONGRANULARITY
        length = self.position + self.span - start
        try:
            with self.path.open("rb") as file:
                # A copy-on-write mapping: torch wants writable memory, and the file stays as it is.
                mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read any more: {error}; it was changed while in use"
            ) from error
        return torch.frombuffer(
            mapping, dtype=torch.uint8, count=self.span, offset=self.position - start
        )

    def _decompressed(self) -> Tensor:
        assert self.member is not None
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                file.seek(self.position)
                data = file.read(self.span)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CheckpointError(
                f"{self.path} is damaged in {self.member}: {error}; download it again"
            ) from error
        if len(data) < self.span:
            raise CheckpointError(f"{self.path} is damaged in {self.member}; download it again")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)
