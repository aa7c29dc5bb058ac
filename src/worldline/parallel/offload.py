"""Which part of a world is on the device, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

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
