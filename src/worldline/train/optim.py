"""Step sizes, parameter groups and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """Return the learning rate of `step` (from 0): a linear rise, then half a cosine to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def make_adamw(
    module: nn.Module, *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) that decays matrices and kernels, not norms and biases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)


class Average:
    """Exponential moving average of a module's parameters, float32.

    The decay rises with the step, min(decay, (1 + step) / (10 + step)), so that a young average
    forgets its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {
            name: parameter.detach().float().clone() for name, parameter in _parameters(module)
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()),
            [parameter.detach().float() for _, parameter in _parameters(module)],
            weight,
        )

    def swap(self, module: nn.Module) -> None:
        """Exchange the averages and the module's parameters; twice is no change."""
        with torch.no_grad():
            for name, parameter in _parameters(module):
                held = parameter.detach().float().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(held)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`; return the norm before."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit)


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
