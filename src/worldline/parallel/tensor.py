"""Tensor parallelism: processes that each hold a part of every large matrix of a network.

A part is a network of its own, with fewer heads and channels (Megatron-LM, arXiv 1909.08053): it
reads slices of the weights, and hooks join what its layers compute. Its code knows of neither.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.parallel.mesh import Axis, kept

_ORDERED = (2, 4, 8)  # numbers of processes that torch's one-shot kernel sums in the same order


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
        return cls(axis.rank, axis.count)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def parts(self, x: Tensor) -> list[Tensor]:
        return [x] * self.count

    def share(self, x: Tensor) -> Tensor:
        return x


class SmallSum:
    """Sum over processes of a small float32 matrix, which a CUDA graph can hold.

    On GPUs of one host that reach each other's memory, each reads all addends in one kernel (6.4 us
    for a token, between two H200); elsewhere the sum is the axis's.

    Attributes:
        addend: of this process, on the device; the sum may take its place.
        group: of processes whose memory each can read; "" without.
    """

    def __init__(self, axis: Axis, shape: tuple[int, ...], device: torch.device) -> None:
        self.axis, self.addend, self.group = axis, torch.empty(shape, device=device), ""
        if axis.device.type == "cuda":
            if (axis, shape) not in kept:
                kept[axis, shape] = _symmetric(axis, shape)
            self.addend, self.group = kept[axis, shape] or (self.addend, "")

    def __call__(self, addend: Tensor) -> Tensor:
        """The sum of what all have written to their `addend`."""
        if self.group:
            total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(addend, "sum", self.group)
            return total
        return self.axis.all_reduce(addend)


def _symmetric(axis: Axis, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    """Memory that all processes of an axis read, and the name of their group; None without."""
    import torch.distributed._symmetric_memory as symmetric

    own = torch.cuda.current_device()
    devices = {*axis.every(own)}  # one, where each process sees its GPU alone
    near = axis.count in _ORDERED and len({*axis.every(socket.gethostname())}) == 1
    if near := near and len(devices) == axis.count:
        near = all(torch.cuda.can_device_access_peer(own, other) for other in devices - {own})
    if axis.any(not near):
        return None
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which nothing here uses
    group: Any = axis.group or dist.group.WORLD
    memory: Any = None
    joined: Any = None
    with suppress(RuntimeError):  # of drivers, containers and torch's without it
        memory = symmetric.empty(shape, dtype=torch.float32, device=axis.device)
    if axis.any(memory is None):  # in the rendezvous each waits for all
        return None
    with suppress(RuntimeError):
        joined = symmetric.rendezvous(memory, group)
    return None if axis.any(joined is None) else (memory, group.group_name)
