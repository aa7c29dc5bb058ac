"""Host memory that a GPU copies from by itself, beside what it computes."""

import logging
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from worldline.files import GIGABYTE

logger = logging.getLogger(__name__)


def pin(weights: Sequence[nn.Parameter], device: torch.device, owner: object) -> bool:
    """Pin weights where they lie, for as long as `owner` lives; whether all are pinned.

    torch's own pinned memory rounds each tensor up to a power of two, which would nearly double
    those of Reason1, and needs a copy; it is the second choice, and pageable memory the last.
    """
    driver: Any = torch.cuda.cudart()
    pinned: list[Tensor] = []
    pageable = 0
    with torch.cuda.device(device):
        for weight in weights:
            home = weight.data = _on_pages(weight.data)
            if driver.cudaHostRegister(home.data_ptr(), home.nbytes, 0) == driver.cudaError.success:
                pinned.append(home)
                continue
            with suppress(RuntimeError):  # the next check of a launch finds the error, once
                torch.ones(1, device=device)
            try:
                weight.data = home.pin_memory()
            except RuntimeError:
                pageable += home.nbytes
    # a finalizer, since memory must not be freed before; at exit the process takes it along
    weakref.finalize(owner, _release, driver, pinned).atexit = False
    if pageable:
        logger.warning(
            "%.1f GB of host memory cannot be pinned; copies to %s are slower",
            pageable / GIGABYTE,
            device,
        )
    return not pageable


def _on_pages(data: Tensor) -> Tensor:
    """The same numbers in memory pages of their own."""
    if data.data_ptr() % mmap.PAGESIZE == 0 or not data.numel():
        return data
    memory = mmap.mmap(-1, data.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=data.dtype).view(data.shape).copy_(data)


def _release(driver: Any, pinned: list[Tensor]) -> None:
    for home in pinned:
        driver.cudaHostUnregister(home.data_ptr())
