"""Networks that wait in host memory until they are used."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

ModuleType = TypeVar("ModuleType", bound=nn.Module)

_SLOTS = 2  # the block that computes, and the one that arrives


class Offloadable(Generic[ModuleType]):
    """A module that stays on its device, or waits in host memory until it is used.

    An offloaded module's weights have one home, the host. They are copied to the device for as long
    as `on_device` lasts and then dropped there: nothing is copied back, nothing is read from disk
    again. On a CPU nothing is offloaded.
    """

    def __init__(self, module: ModuleType, device: torch.device | str, *, offload: bool) -> None:
        self.module = module
        self.device = torch.device(device)
        self.offload = offload and self.device.type != "cpu"

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    @contextmanager
    def on_device(self) -> Iterator[ModuleType]:
        """The module, with its weights on the device."""
        tensors = [*self.module.parameters(), *self.module.buffers()] if self.offload else []
        with self._at_home_again(tensors):
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield self.module

    @contextmanager
    def _at_home_again(self, tensors: list[Tensor]) -> Iterator[None]:
        """Bring tensors back to where they are now, and free what they had on the device."""
        home = [tensor.data for tensor in tensors]
        on_gpu = bool(tensors) and self.device.type == "cuda"
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self.device)
            for tensor, host in zip(tensors, home, strict=True):
                tensor.data = host
            if on_gpu:
                torch.cuda.empty_cache()  # so that the next part finds the room


@dataclass(frozen=True)
class BlockPlan:
    """How a network can run with few of its blocks on the device."""

    blocks: str  # name of the list of blocks, which are called in order and are alike
    kept: tuple[str, ...] = ()  # ends of names of weights used outside of a block's call, too

    def split(self, module: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Weights of each block that come and go, without those kept on the device, by name."""
        return [
            {name: p for name, p in block.named_parameters() if not name.endswith(self.kept)}
            for block in module.get_submodule(self.blocks).children()
        ]

    def count(self, module: nn.Module) -> int:
        """Number of weights on the device at most, of a module on any device."""
        coming = [sum(p.numel() for p in block.values()) for block in self.split(module)]
        whole = sum(parameter.numel() for parameter in module.parameters())
        return whole - sum(coming) + _SLOTS * max(coming, default=0)


class StreamedModule(Offloadable[ModuleType]):
    """A module whose blocks come to the device one after another, each ahead of its use.

    Their home is the host, in pinned memory where the device is a GPU, so that the copy of a block
    runs beside the work of the one before: it costs no time where a block computes for longer than
    it travels. The device holds two blocks, and what belongs to none.
    """

    def __init__(self, module: ModuleType, device: torch.device, plan: BlockPlan) -> None:
        super().__init__(module, device, offload=True)
        self.plan = plan
        if device.type == "cuda":
            for block in plan.split(module):
                for parameter in block.values():
                    parameter.data = parameter.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[ModuleType]:
        """The module; it can be called, not changed."""
        blocks = self.plan.split(self.module)
        coming = {id(parameter) for block in blocks for parameter in block.values()}
        tensors = [*self.module.parameters(), *self.module.buffers()]
        with self._at_home_again(tensors), self._streaming(blocks):
            for tensor in tensors:
                if id(tensor) not in coming:
                    tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield self.module

    @contextmanager
    def _streaming(self, blocks: list[dict[str, nn.Parameter]]) -> Iterator[None]:
        # a frame of its own: its slots are freed before the cache is emptied
        stream = _BlockStream(blocks, self.device)
        with ExitStack() as hooks:
            for number, block in enumerate(self.module.get_submodule(self.plan.blocks).children()):
                before, after = partial(stream.before, number), partial(stream.after, number)
                hooks.enter_context(block.register_forward_pre_hook(before))
                hooks.enter_context(block.register_forward_hook(after))
            yield


class _BlockStream:
    """Copies blocks into two slots on the device: one computes, the next arrives."""

    def __init__(self, blocks: list[dict[str, nn.Parameter]], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.home = [{name: p.data for name, p in block.items()} for block in blocks]
        self.slots = [
            {name: torch.empty_like(t, device=device) for name, t in self.home[0].items()}
            for _ in range(_SLOTS)
        ]
        self.contents = [-1] * _SLOTS  # numbers of blocks
        self.copying: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copying = torch.cuda.Stream(device)
            # what had the memory of the slots before may not have been used to its end
            self.copying.wait_stream(torch.cuda.current_stream(device))
            self.arrived = [torch.cuda.Event() for _ in self.slots]
            self.used = [torch.cuda.Event() for _ in self.slots]

    def fetch(self, number: int, slot: int) -> None:
        """Begin to copy a block, unless it is there or on its way."""
        if number in self.contents:
            return
        self.contents[slot] = number
        with torch.cuda.stream(self.copying):  # None changes nothing
            if self.copying:
                self.copying.wait_event(self.used[slot])
            for name, parameter in self.blocks[number].items():
                parameter.data = self.slots[slot][name]
                parameter.data.copy_(self.home[number][name], non_blocking=True)
            if self.copying:
                self.arrived[slot].record(self.copying)

    def before(self, number: int, *_: object) -> None:
        """Wait for block `number`, and send for the next."""
        self.fetch(number, 0)
        slot = self.contents.index(number)
        if self.copying:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        self.fetch((number + 1) % len(self.blocks), 1 - slot)

    def after(self, number: int, *_: object) -> None:
        """Free the slot of block `number` once its work is done."""
        if self.copying:
            slot = self.contents.index(number)
            self.used[slot].record(torch.cuda.current_stream(self.device))
