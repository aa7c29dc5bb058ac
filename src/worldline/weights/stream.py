"""Fill a module that was built on the meta device, tensor by tensor, with no second full copy.

Bytes are read by a few threads straight from the file to their place: the tensor itself on a CPU,
one of two pinned buffers for a GPU. While the GPU fetches one buffer, the threads fill the other;
`preadv` from the page cache needs no page faults, which is what bounds a copy out of a mapping.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, Entry
from worldline.weights.source import FileTensor, Source

STAGING_BYTES = 64 << 20  # each of two; 1.3 ms at 50 GB/s, far above the cost of starting a copy
_SLICE_BYTES = 4 << 20  # below this a second thread costs more than it brings
_READERS = 8


@dataclass(frozen=True)
class _Slot:
    """A place in the module that holds a tensor."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: Tensor
    stored: bool  # a parameter or persistent buffer, which a checkpoint holds

    def put(self, tensor: Tensor) -> None:
        if self.leaf in self.owner._parameters:
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
            self.owner._parameters[self.leaf] = tensor
        else:
            self.owner._buffers[self.leaf] = tensor


def _slots(module: nn.Module) -> Iterator[_Slot]:
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield _Slot(prefix + leaf, owner, leaf, parameter, True)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                stored = leaf not in owner._non_persistent_buffers_set
                yield _Slot(prefix + leaf, owner, leaf, buffer, stored)


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
        module: built under `torch.device("meta")`.
        checkpoint: opened.
        keymap: from the checkpoint's names to the module's.
        device: where the tensors go.
        dtype: of floating tensors; None keeps the file's. Integer ones keep the module's.
        optional: our names, or patterns with `*`, that the file may lack.

    Raises:
        CheckpointError: the file does not fit the module (all that is wrong is named), or a tensor
            would be left without a value.
    """
    device = torch.device(device)
    groups: dict[int, list[_Slot]] = {}
    for slot in _slots(module):
        groups.setdefault(id(slot.tensor), []).append(slot)
    expected = {
        slot.name: tuple(slot.tensor.shape)
        for group in groups.values()
        for slot in group
        if slot.stored
    }
    # Of names that share a tensor, the file may hold any; that it holds one is checked below.
    shared = [slot.name for group in groups.values() if len(group) > 1 for slot in group]
    source = str(checkpoint.path)
    pairs = match(checkpoint.tensors, expected, keymap, source, [*optional, *shared])

    plan: list[tuple[list[_Slot], str | None]] = []
    for group in groups.values():
        names = [pairs[slot.name] for slot in group if slot.name in pairs]
        slot = group[0]
        needed = slot.stored and not any(fnmatchcase(slot.name, pattern) for pattern in optional)
        if not names and (needed or slot.tensor.is_meta):
            raise CheckpointError(f"{source} does not fit the model: nothing gives {slot.name}")
        if names:
            kind = checkpoint.tensors[names[0]].dtype
            if kind.is_floating_point != slot.tensor.dtype.is_floating_point:
                raise CheckpointError(
                    f"{source} does not fit the model: {names[0]} is {kind} in the file, "
                    f"expected {slot.tensor.dtype}"
                )
        plan.append((group, names[0] if names else None))

    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), on_device, _Copier(device) as copier:
        for group, name in plan:
            if name is None:
                filled = group[0].tensor.to(device)
            else:
                entry = checkpoint.entries[name]
                wanted = group[0].tensor.dtype
                if wanted.is_floating_point:
                    wanted = dtype or entry.info.dtype
                filled = torch.empty(entry.info.shape, dtype=wanted, device=device)
                if entry.dim is None and len(entry.parts) > 1:
                    filled.copy_(checkpoint.read(name))  # replicas: small, and to be compared
                else:
                    copier.fill_entry(filled, entry)
            _put(group, filled)


def _put(group: list[_Slot], tensor: Tensor) -> None:
    for slot in group:
        slot.put(tensor)
        # The second name of a shared tensor must get the very Parameter that the first one made.
        if slot.leaf in slot.owner._parameters:
            tensor = slot.owner._parameters[slot.leaf]  # type: ignore[assignment]


class _Copier:
    """Carries bytes from files to tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.files: dict[Path, BinaryIO] = {}
        self.staging: list[Tensor] = []
        self.fetched: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def __enter__(self) -> _Copier:
        self.stack = ExitStack()
        self.pool = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "weights")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            # After an error threads may still be reading: they end before their files are closed.
            self.pool.shutdown(wait=True, cancel_futures=True)
            if self.cuda:
                torch.cuda.current_stream(self.device).synchronize()
        finally:
            self.staging.clear()
            self.stack.close()

    def fill_entry(self, destination: Tensor, entry: Entry) -> None:
        if entry.dim is None:
            self.fill(destination, entry.parts[0])
            return
        start = 0
        for part in entry.parts:
            count = part.info.shape[entry.dim]
            self.fill(destination.narrow(entry.dim, start, count), part)
            start += count

    def fill(self, destination: Tensor, source: Source) -> None:
        """Write all of `source` to `destination`, of equal shape and perhaps another dtype."""
        if not isinstance(source, FileTensor) or not source.plain:
            destination.copy_(source.read())
            return
        if not destination.is_contiguous():  # a column shard
            whole = torch.empty(source.info.shape, dtype=source.info.dtype, device=self.device)
            self.fill(whole, source)
            destination.copy_(whole)
            return
        flat = destination.view(-1)
        stored = source.info.dtype
        same = stored == flat.dtype
        if same and self.device.type == "cpu":
            self._read(flat.view(torch.uint8), source.path, source.position)
            return
        step = STAGING_BYTES // stored.itemsize
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            staged = self._stage(
                source.path,
                source.position + start * stored.itemsize,
                part.numel() * stored.itemsize,
            ).view(stored)
            if same:
                part.copy_(staged, non_blocking=self.cuda)
            elif self.cuda:
                part.copy_(staged.to(self.device, non_blocking=True))  # cast on the device
            else:
                part.copy_(staged.to(part.dtype))
            self._sent()

    def _stage(self, path: Path, position: int, count: int) -> Tensor:
        """Fill the buffer whose turn it is, once the device has fetched what was in it."""
        if not self.staging:
            self.staging = [
                torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)
                for _ in range(2 if self.cuda else 1)
            ]
        fetched = self.fetched[self.turn]
        if fetched is not None:
            fetched.synchronize()
        buffer = self.staging[self.turn][:count]
        self._read(buffer, path, position)
        return buffer

    def _sent(self) -> None:
        """Mark, in the stream of the copies, the point where the buffer is free again."""
        if self.cuda:
            # The copies go through the current stream: nothing else runs while weights load, and
            # memory that the allocator hands out here is then safe to use without another event.
            event = torch.cuda.Event()
            event.record()
            self.fetched[self.turn] = event
            self.turn = 1 - self.turn

    def _read(self, buffer: Tensor, path: Path, position: int) -> None:
        """Read bytes from a position of a file to a uint8 CPU tensor, by several threads."""
        if path not in self.files:
            try:
                self.files[path] = self.stack.enter_context(path.open("rb", buffering=0))
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read any more: {error}") from error
        number = self.files[path].fileno()
        view = memoryview(buffer.numpy().data)
        if len(view) <= _SLICE_BYTES:
            _read_exactly(number, view, position, path)
            return
        slices = range(0, len(view), _SLICE_BYTES)
        jobs = [
            self.pool.submit(
                _read_exactly, number, view[start : start + _SLICE_BYTES], position + start, path
            )
            for start in slices
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
