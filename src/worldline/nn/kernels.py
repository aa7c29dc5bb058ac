"""Whether fused Triton kernels can do the work of plain modules."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


_load = cache(import_module)


def kernels_for(x: Tensor, module: str) -> ModuleType | None:
    """The module of kernels, where no gradient is wanted and `x` is on a GPU with Triton."""
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype not in _DTYPES or not has_triton():
        return None
    return _load(module)
