"""Fill a module that was built on the meta device, tensor by tensor, with no second full copy.

Bytes are read by a few threads straight from the file to their place: the tensor itself on a CPU,
one of two pinned buffers for a GPU. While the GPU fetches one buffer, the threads fill the other;
`preadv` from the page cache needs no page faults, which is what bounds a copy out of a mapping.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import Checkpoint, FileTensor, ShardedTensor, Source
from worldline.weights.keymap import KeyMap, match, matches

STAGING_BYTES = 64 << 20  # each of two; 1.3 ms at 50 GB/s, far above the cost of starting a copy
_SLICE_BYTES = 4 << 20  # below this a second thread costs more than it brings
_READERS = 8


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    keymap: KeyMap,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    optional: Collection[str] = (),
) -> None:
    """Give every parameter and persistent buffer of `module` its value from `checkpoint`.

    Names, shapes and kinds are checked before the first byte of data is read. A tensor that two
    names share is read once and stays shared. A buffer that the file does not hold keeps its value
    and moves to `device`; it must not be on the meta device.

    Args:
        module: built on the meta device.
        checkpoint: where the tensors come from.
        keymap: from its names to the module's.
        device: where they go.
        dtype: of floating tensors; None keeps the file's. Integer ones keep the module's.
        optional: our names, or patterns with `*`, that the file may lack.

    Raises:
        CheckpointError: the file does not fit the module (all that is wrong is named), or a tensor
            would be left without a value.
    """
    device = torch.device(device)
    stored: dict[str, Tensor] = module.state_dict(keep_vars=True)
    names: defaultdict[Tensor, list[str]] = defaultdict(list)
    for name, tensor in (dict(module.named_buffers()) | stored).items():
        names[tensor].append(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    # Under which of several names the file holds a shared tensor is all the same.
    shared = [name for group in names.values() if len(group) > 1 for name in group]
    pairs = match(checkpoint.tensors, shapes, keymap, str(checkpoint.path), [*optional, *shared])

    sources: dict[Tensor, Source] = {}
    for tensor, group in names.items():
        if inside := [pairs[name] for name in group if name in pairs]:
            sources[tensor] = checkpoint.entries[inside[0]]
            kind = sources[tensor].meta.dtype
            if kind.is_floating_point != tensor.dtype.is_floating_point:
                raise CheckpointError(
                    f"{checkpoint.path} does not fit the model: {inside[0]} is {kind} in the file, "
                    f"expected {tensor.dtype}"
                )
        elif tensor.is_meta or (group[0] in stored and not matches(group[0], optional)):
            raise CheckpointError(
                f"{checkpoint.path} does not fit the model: nothing gives {group[0]}"
            )

    values: dict[str, Tensor] = {}
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), on_device, _Copier(device) as copier:
        for tensor, source in sources.items():
            kind = dtype or source.meta.dtype if tensor.is_floating_point() else tensor.dtype
            value = torch.empty(source.meta.shape, dtype=kind, device=device)
            copier.fill(value, source)
            if isinstance(tensor, nn.Parameter):  # one for all its names
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            values |= dict.fromkeys(names[tensor], value)
    module.load_state_dict(values, strict=False, assign=True)
    module.to(device)  # buffers that are not in the file


class _Copier:
    """Carries bytes from files to tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.files: dict[Path, BinaryIO] = {}
        self.staging: list[Tensor] = []
        self.fetched: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0
        self.pool = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "weights")

    def __enter__(self) -> _Copier:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an error threads may still be reading: they end before their files are closed.
        self.pool.shutdown(cancel_futures=True)
        for file in self.files.values():
            file.close()
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def fill(self, destination: Tensor, source: Source) -> None:
        """Write all of `source` to `destination`, of equal shape and perhaps another dtype."""
        if isinstance(source, ShardedTensor) and source.dim is not None:
            counts = [part.meta.shape[source.dim] for part in source.parts]
            slices = destination.split(counts, source.dim)
            for part, slice_ in zip(source.parts, slices, strict=True):
                self.fill(slice_, part)
        elif not isinstance(source, FileTensor) or not source.meta.is_contiguous():
            destination.copy_(source.read())
        elif not destination.is_contiguous():  # a column shard
            whole = torch.empty_like(source.meta, device=self.device)
            self.fill(whole, source)
            destination.copy_(whole)
        elif self.cuda or destination.dtype != source.meta.dtype:
            self._stage(destination.view(-1), source)
        else:
            self._read(destination.view(-1).view(torch.uint8), source.path, source.position)

    def _stage(self, flat: Tensor, source: FileTensor) -> None:
        """Fill a tensor by way of the staging buffers."""
        if not self.staging:
            self.staging = [
                torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)
                for _ in range(2 if self.cuda else 1)
            ]
        size = source.meta.dtype.itemsize
        step = STAGING_BYTES // size
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            if fetched := self.fetched[self.turn]:
                fetched.synchronize()
            buffer = self.staging[self.turn][: part.numel() * size]
            self._read(buffer, source.path, source.position + start * size)
            staged = buffer.view(source.meta.dtype)
            if self.cuda and part.dtype != staged.dtype:
                staged = staged.to(self.device, non_blocking=True)  # cast on the device
            part.copy_(staged, non_blocking=self.cuda)
            if self.cuda:
                # The copies go through the current stream: nothing else runs while weights load,
                # and memory that the allocator hands out here is then safe without another event.
                event = torch.cuda.Event()
                event.record()
                self.fetched[self.turn] = event
                self.turn = 1 - self.turn

    def _read(self, buffer: Tensor, path: Path, position: int) -> None:
        """Read bytes from a position of a file to a uint8 CPU tensor, by several threads."""
        if path not in self.files:
            try:
                self.files[path] = path.open("rb", buffering=0)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read any more: {error}") from error
        number = self.files[path].fileno()
        view = memoryview(buffer.numpy().data)
        if len(view) <= _SLICE_BYTES:
            _read_exactly(number, view, position, path)
            return
        jobs = [
            self.pool.submit(
                _read_exactly, number, view[start : start + _SLICE_BYTES], position + start, path
            )
            for start in range(0, len(view), _SLICE_BYTES)
        ]
        for job in jobs:
            job.result()


def _read_exactly(number: int, view: memoryview, position: int, path: Path) -> None:
    while view:
        try:
            count = os.preadv(number, [view], position)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path} was cut short while it was read")
        view = view[count:]
        position += count
