"""Tensor parallelism: processes that each hold a part of every large matrix of a network.

A part is a network of its own, with fewer heads and channels (Megatron-LM, arXiv 1909.08053): it
reads slices of the weights, and hooks join what its layers compute. Its code knows of neither.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.parallel.mesh import Axis, kept


@dataclass(frozen=True)
class ShardPlan:
    """How processes share a network, beside the axes on which its tensors are cut.

    Attributes:
        part: configuration and number of processes -> configuration of one's part.
        joined: pattern of layers' names -> what makes their results whole: "sum" of products of
            parts of the columns, "rows" looked up by the process that holds them, "columns" that
            follow one another. Results of other layers stay in parts.
        partial: patterns of names of whole weights that act on a process's own heads: each computes
            a part of their gradients.
    """

    part: Callable[[Any, int], Any]
    joined: Mapping[str, Literal["sum", "rows", "columns"]]
    partial: tuple[str, ...] = ()

    def join(self, module: nn.Module, axis: Axis) -> None:
        """Make the layers of a part give the results of the whole network."""
        for name, layer in module.named_modules():
            ways = [way for pattern, way in self.joined.items() if fnmatchcase(name, pattern)]
            if axis.count == 1 or not ways:
                continue
            if ways[0] == "rows":
                setattr(layer, "forward", partial(_look_up, layer.weight, axis))  # noqa: B010
            elif ways[0] == "sum":
                layer.register_forward_hook(lambda _layer, _x, y: axis.all_reduce(y))
            else:
                layer.register_forward_hook(lambda _layer, _x, y: axis.all_gather(y, y.dim() - 1))


def _look_up(weight: Tensor, axis: Axis, ids: Tensor) -> Tensor:
    """Rows of a table of which each process holds a part."""
    return axis.all_reduce(own_rows(weight, axis, ids))


def own_rows(weight: Tensor, axis: Axis, ids: Tensor) -> Tensor:
    """Those rows of a table that this process holds; zeros for the others."""
    own = ids - axis.rank * len(weight)
    near = own.clamp(0, len(weight) - 1)
    return F.embedding(near, weight).masked_fill((own != near)[..., None], 0)


class Rehearsal(Axis):
    """Axis of a process that computes without the others, to compile: nothing is sent."""

    @classmethod
    def of(cls, axis: Axis) -> Rehearsal:
        return cls(axis.rank, axis.count, device=axis.device)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def parts(self, x: Tensor) -> list[Tensor]:
        return [x] * self.count

    def share(self, x: Tensor) -> Tensor:
        return x


class Places(NamedTuple):
    """Where GPUs that write to each other's memory exchange addends.

    Attributes:
        addends: (count, B, width) float32, of all processes, in this one's memory.
        elsewhere: places (B, width) of this process's addend in the memory of the others.
        addresses: (count - 1,) int64, of these.
        flags: number of this process, and what `add_and_normalise` needs to wait for all.
    """

    addends: Tensor
    elsewhere: list[Tensor]
    addresses: Tensor
    flags: tuple[int, Tensor, Tensor]


class SmallSum:
    """Sum over processes of what their layers add to the residual stream of a few tokens.

    On GPUs that reach each other's memory, products are written to all of them, and the kernel that
    norms the stream adds them; a CUDA graph can hold both. Elsewhere the axis sums. Two places of
    an addend alternate: who has begun a sum knows that the others have read all of the one before.
    Something that waits for all must come between two passes over the layers, the first sums of
    which use the same place, also where a pass fails; and all sums of a process of one shape are
    launched in one stream, for they share places.

    Attributes:
        places: that take turns; None where the axis sums.
    """

    def __init__(self, axis: Axis, shape: tuple[int, ...], device: torch.device) -> None:
        self.axis, self.turn = axis, 0
        self.places: list[Places] | None = None
        if axis.device.type == "cuda":
            if (axis, shape) not in kept:
                kept[axis, shape] = _places(axis, shape)
            self.places = kept[axis, shape]
        self.own = torch.empty(shape, device=device)

    @property
    def addend(self) -> Tensor:
        """Where this process writes its addend of the next sum, (B, width) float32."""
        if self.places is None:
            return self.own
        return self.places[self.turn].addends[self.axis.rank]

    @property
    def others(self) -> Tensor | None:
        """Addresses where it is written, too."""
        return None if self.places is None else self.places[self.turn].addresses

    def write(self, addend: Tensor) -> None:
        """Give an addend as it is."""
        for place in (self.addend, *(self.places[self.turn].elsewhere if self.places else ())):
            place.copy_(addend)

    def begin(self) -> None:
        """Start a pass over the layers."""
        self.turn = 0

    def __call__(
        self, stream: Tensor | None, norm: Tensor, eps: float, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream with the sum, and its norm, as `add_and_normalise` gives them."""
        from worldline.parallel import sum_kernel

        if self.places is None:
            addends, flags = self.axis.all_reduce(self.own)[None], None
        else:
            addends, _, _, flags = self.places[self.turn]
            self.turn = 1 - self.turn
        return sum_kernel.add_and_normalise(addends, stream, norm, eps, added=added, flags=flags)


def _places(axis: Axis, shape: tuple[int, ...]) -> list[Places] | None:
    """Two places for a sum's addends in memory that all GPUs reach; None without it."""
    sizes, rank = (2, axis.count, *shape), axis.rank  # turns, processes, and of an addend
    size = math.prod(sizes)
    numbers = size + shape[0] * axis.count  # addends, then flags
    if isinstance(axis, Rehearsal):  # nobody else comes, whom the flags show as far ahead
        own = torch.zeros(numbers, dtype=torch.float32, device=axis.device)
        own[size:].view(torch.int32).fill_(1 << 30)
        every = [own] * axis.count
    elif not (every := _symmetric(axis, numbers)):
        return None
    flags = torch.tensor([memory[size:].data_ptr() for memory in every], device=axis.device)
    begun = torch.zeros(shape[0], dtype=torch.int32, device=axis.device)
    places = []
    for turn in range(2):
        addends = [memory[:size].view(sizes)[turn] for memory in every]
        elsewhere = [each[rank] for other, each in enumerate(addends) if other != rank]
        addresses = torch.tensor([each.data_ptr() for each in elsewhere], device=axis.device)
        places.append(Places(addends[rank], elsewhere, addresses, (rank, flags, begun)))
    return places


def _symmetric(axis: Axis, numbers: int) -> list[Tensor]:
    """Memory (numbers,) float32 of each GPU that all reach, first 0; empty where they do not."""
    import torch.distributed._symmetric_memory as symmetric

    own = torch.cuda.current_device()
    devices = {*axis.every(own)}  # one, where each process sees its GPU alone
    near = len({*axis.every(socket.gethostname())}) == 1 and len(devices) == axis.count
    if near:
        near = all(torch.cuda.can_device_access_peer(own, other) for other in devices - {own})
    if axis.any(not near):
        return []
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which nothing here uses
    group: Any = axis.group or dist.group.WORLD
    memory: Any = None
    joined: Any = None
    with suppress(RuntimeError):  # of drivers, containers and torch's without it
        memory = symmetric.empty(numbers, dtype=torch.float32, device=axis.device)
        memory.zero_()
        torch.cuda.synchronize()
    if axis.any(memory is None):  # in the rendezvous each waits for all
        return []
    with suppress(RuntimeError):
        joined = symmetric.rendezvous(memory, group)
        if joined.buffer_ptrs[axis.rank] != memory.data_ptr():  # within a larger block
            joined = None
    if axis.any(joined is None):
        return []
    # a handle's own tensor would not keep the memory
    return [
        memory if other == axis.rank else joined.get_buffer(other, (numbers,), torch.float32)
        for other in range(axis.count)
    ]
