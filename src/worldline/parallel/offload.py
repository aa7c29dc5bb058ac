"""Which part of a world is on the device, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class Part(Generic[ModuleType]):
    """A module that stays on its device, or waits in host memory until it is used.

    An offloaded module's weights have one home, the host. They are copied to the device for as long
    as `on_device` lasts and then dropped there: nothing is copied back, nothing is read from disk
    again.

    Attributes:
        module: in evaluation mode.
        device: where it runs.
        offload: whether its home is the host.
    """

    def __init__(self, module: ModuleType, device: torch.device, *, offload: bool) -> None:
        self.module = module
        self.device = device
        self.offload = offload and device.type != "cpu"

    @contextmanager
    def on_device(self) -> Iterator[ModuleType]:
        """Give the module, with its weights on the device."""
        if not self.offload:
            yield self.module
            return
        tensors = [*self.module.parameters(), *self.module.buffers()]
        home = [tensor.data for tensor in tensors]
        try:
            for tensor, host in zip(tensors, home, strict=True):
                tensor.data = host.to(self.device, non_blocking=True)
            yield self.module
        finally:
            for tensor, host in zip(tensors, home, strict=True):
                tensor.data = host
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()  # so that the next part finds the room


@dataclass(frozen=True)
class BlockPlan:
    """How a network can run with few of its blocks on the device.

    Attributes:
        blocks: name of the list of blocks, which are called in order and are alike.
        kept: ends of the names of weights that are used from outside of a block's own call, too,
            and stay on the device.
    """

    blocks: str
    kept: tuple[str, ...] = ()

    def split(self, module: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Return, for each block, the weights that come and go, by their names in the block."""
        return [
            {
                name: parameter
                for name, parameter in block.named_parameters()
                if not name.endswith(self.kept)
            }
            for block in module.get_submodule(self.blocks).children()
        ]

    def count(self, module: nn.Module) -> int:
        """Return how many weights are on the device at most, of a module on any device."""
        coming = [sum(p.numel() for p in block.values()) for block in self.split(module)]
        whole = sum(parameter.numel() for parameter in module.parameters())
        return whole - sum(coming) + _SLOTS * max(coming, default=0)


_SLOTS = 2  # the block that computes, and the one that arrives


class StreamedPart(Part[ModuleType]):
    """A module whose blocks come to the device one after another, each ahead of its use.

    Their home is the host, in pinned memory where the device is a GPU, so that the copy of a block
    runs beside the work of the one before: it costs no time where a block computes for longer than
    it travels. The device holds two blocks, and what belongs to none.
    """

    def __init__(self, module: ModuleType, device: torch.device, plan: BlockPlan) -> None:
        super().__init__(module, device, offload=True)
        self.plan = plan
        self.cuda = device.type == "cuda"
        if self.cuda:
            for block in plan.split(module):
                for parameter in block.values():
                    parameter.data = parameter.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[ModuleType]:
        """Give the module; it can be called, not changed."""
        blocks = self.plan.split(self.module)
        coming = {id(parameter) for block in blocks for parameter in block.values()}
        others = [
            tensor
            for tensor in (*self.module.parameters(), *self.module.buffers())
            if id(tensor) not in coming
        ]
        home = [(tensor, tensor.data) for tensor in others]
        home += [(p, p.data) for block in blocks for p in block.values()]
        stream = _BlockStream(blocks, self.device)
        modules = list(self.module.get_submodule(self.plan.blocks).children())
        hooks: list[RemovableHandle] = []
        try:
            for tensor in others:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            for number, module in enumerate(modules):
                hooks.append(module.register_forward_pre_hook(stream.before(number)))
                hooks.append(module.register_forward_hook(stream.after(number)))
            yield self.module
        finally:
            for hook in hooks:
                hook.remove()
            if self.cuda:
                torch.cuda.synchronize(self.device)
            for tensor, host in home:
                tensor.data = host
            del stream
            if self.cuda:
                torch.cuda.empty_cache()  # so that the next part finds the room


class _BlockStream:
    """Copies blocks into slots on the device, one ahead of the block that computes."""

    def __init__(self, blocks: list[dict[str, nn.Parameter]], device: torch.device) -> None:
        self.home = [{name: p.data for name, p in block.items()} for block in blocks]
        self.cuda = device.type == "cuda"
        self.device = device
        self.slots: list[dict[str, Tensor]] = [
            {name: torch.empty_like(t, device=device) for name, t in self.home[0].items()}
            for _ in range(_SLOTS)
        ]
        self.copying: torch.cuda.Stream | None = None
        if self.cuda:
            self.copying = torch.cuda.Stream(device)
            # what had the memory of the slots before may not have been used to its end
            self.copying.wait_stream(torch.cuda.current_stream(device))
        self.arrived = [torch.cuda.Event() for _ in self.slots] if self.cuda else []
        self.used = [torch.cuda.Event() for _ in self.slots] if self.cuda else []
        # an odd number of blocks: the last and the first would share a slot, and one must wait
        self.place = [number % _SLOTS for number in range(len(blocks))]
        for block, place in zip(blocks, self.place, strict=True):
            for name, parameter in block.items():
                parameter.data = self.slots[place][name]
        self.held: list[int | None] = [None] * _SLOTS

    def fetch(self, number: int) -> None:
        """Begin to copy a block, unless it is there or on its way."""
        place = self.place[number]
        if self.held[place] == number:
            return
        self.held[place] = number
        with torch.cuda.stream(self.copying) if self.copying else nullcontext():
            if self.copying:
                self.copying.wait_event(self.used[place])
            for name, host in self.home[number].items():
                self.slots[place][name].copy_(host, non_blocking=True)
            if self.copying:
                self.arrived[place].record(self.copying)

    def before(self, number: int) -> Callable[..., None]:
        """Return the hook before block `number`: it is there, and the next one is on its way."""

        def hook(*_: object) -> None:
            self.fetch(number)
            if self.cuda:
                torch.cuda.current_stream(self.device).wait_event(self.arrived[self.place[number]])
            following = (number + 1) % len(self.home)
            if self.place[following] != self.place[number]:
                self.fetch(following)

        return hook

    def after(self, number: int) -> Callable[..., None]:
        """Return the hook behind block `number`: its place is free once the device has used it."""

        def hook(*_: object) -> None:
            place = self.place[number]
            if self.cuda:
                self.used[place].record(torch.cuda.current_stream(self.device))
            following = (number + 1) % len(self.home)
            if self.place[following] == place and len(self.home) > 1:
                self.fetch(following)

        return hook
