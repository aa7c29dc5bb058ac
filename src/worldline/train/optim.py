"""Learning rates, AdamW and Muon, averaged weights."""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MUON_MOMENTUM = 0.95
_MUON_SCALE = 0.2  # root mean square of AdamW's updates, about, at a learning rate of one
# the quintic that is steepest at 0 of those that keep singular values near one
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


Rate = Callable[[int], float]  # step from 0 -> learning rate


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Learning rate that rises in a line and falls by half a cosine, to `floor` at step `decay`.

    The first step has a rate of 0; with `early` the rise is one step ahead.
    Source: nvidia-cosmos/cosmos-predict1 `utils/scheduler.py`.
    """

    peak: float
    warmup: int
    decay: int
    floor: float = 1e-8
    early: bool = False

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + self.early) / self.warmup
        if step >= self.decay:
            return self.floor
        progress = (step - self.warmup) / (self.decay - self.warmup)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    @property
    def released(self) -> dict[str, Any]:
        """Its fields in the state of the released scheduler."""
        fields = {"warmup_iters": self.warmup, "lr_decay_iters": self.decay}
        return {**fields, "min_lr": self.floor}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Learning rate that rises from `start` to `top`, then changes in a line to `end` at `cycle`.

    These are factors of `peak`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/training/
    functional/lr_scheduler.py`.
    """

    peak: float
    warmup: int
    cycle: float = 1e13
    start: float = 1e-6
    top: float = 1.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            factor = self.start + (self.top - self.start) * step / self.warmup
        elif step >= self.cycle:
            factor = self.end
        else:
            share = (self.cycle - step) / (self.cycle - self.warmup)
            factor = self.end + (self.top - self.end) * share
        return self.peak * factor

    @property
    def released(self) -> dict[str, Any]:
        """As of `Cosine`: one function, which is not saved."""
        return {"lr_lambdas": [{}]}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float,
    decay_all: bool = False,
    orthogonal: Sequence[str] = (),
) -> MuonAdamW:
    """AdamW that decays matrices and kernels, or all; Muon for some matrices.

    Moments have the precision of their parameter, and exist from the start, so that a CUDA graph
    of a step finds them in place. Muon trains the matrices whose names fit a pattern of
    `orthogonal`, such as `blocks.*.weight`. The learning rate of all is the tensor
    `defaults["lr"]`, 0 at first; a graph reads it from memory.

    Raises:
        ValueError: a pattern matches no matrix.
    """
    matrices = [name for name, parameter in parameters.items() if parameter.ndim == 2]
    muon: set[str] = set()
    for pattern in orthogonal:
        if not (matches := fnmatch.filter(matrices, pattern)):
            raise ValueError(f"no matrix to train has a name like {pattern}")
        muon.update(matches)
    members: defaultdict[tuple[object, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():  # Muon's by shape, AdamW's by whether they decay
        shape = parameter.shape if name in muon else None
        members[shape, weight_decay * (decay_all or parameter.ndim > 1)].append(parameter)
    groups = [
        {"params": each, "orthogonal": shape is not None, "weight_decay": decay}
        for (shape, decay), each in members.items()
    ]
    first = next(iter(parameters.values()))
    device, graphs = first.device, first.is_cuda
    # the fused one computes in float32, and rounds what it stores
    fused = graphs or first.dtype != torch.float32
    rate = torch.zeros((), device=device)
    optimizer = MuonAdamW(groups, lr=rate, betas=betas, eps=eps, fused=fused, capturable=graphs)
    for name, parameter in parameters.items():
        moments = {"exp_avg": torch.zeros_like(parameter)}
        if name not in muon:
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
            moments["step"] = torch.zeros((), device=device)
        optimizer.state[parameter] = moments
    return optimizer


class MuonAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), and Muon for the matrices of groups marked `orthogonal`.

    Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024);
    arXiv 2502.16982, section 2.2, for the factor that gives its updates the size of AdamW's, so
    that both take one learning rate.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters; gradients of Muon's matrices are dropped."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if matrices and group["orthogonal"]:
                self._muon_step(matrices, group["lr"], group["weight_decay"])
        super().step()

    def _muon_step(self, matrices: list[nn.Parameter], rate: float | Tensor, decay: float) -> None:
        """Muon's step for all matrices of one shape."""
        weights: list[Tensor] = [matrix.data for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self.state[matrix]["exp_avg"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - _MUON_MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MUON_MOMENTUM))  # Nesterov's
        size = _MUON_SCALE * math.sqrt(max(matrices[0].shape))
        steps = orthogonalise(ahead).float() * (rate * size)
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_sub_(weights, steps.unbind())
        for matrix in matrices:
            matrix.grad = None  # AdamW passes over it


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values come out between 0.7 and 1.2.

    A quintic Newton-Schulz iteration in bf16; (N, rows, columns) in and out.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).bfloat16()
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


Decay = Callable[[int], float]  # step from 1 -> weight of the old average


@dataclass(frozen=True)
class Rising:
    """Decay min(most, (1 + step) / (10 + step)), by which a young average forgets its start."""

    most: float

    def __call__(self, step: int) -> float:
        return min(self.most, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Power:
    """Decay of an average that weighs steps by a power of them; the first step takes all.

    Its deviation in time, relative to the length of the run, is `deviation`.
    Source: arXiv 2312.02696, section 3.1.
    """

    deviation: float

    @cached_property
    def exponent(self) -> float:
        inverse = self.deviation**-2
        return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))

    def __call__(self, step: int) -> float:
        return float((1 - 1 / step) ** (self.exponent + 1))


AT_ONCE = 1 << 28  # numbers of averages whose changes exist at once, or those of one tensor


class Average:
    """Exponential moving average of trainable parameters, float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: Decay) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {name: p.detach().float().clone() for name, p in parameters.items()}
        # of the newest parameters
        self._weight = torch.ones((), device=next(iter(parameters.values())).device)

    def set_weight(self, step: int) -> None:
        """Set the weight of the next update, that of `step`, counted from 1."""
        self._weight.fill_(1 - self.decay(step))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters by the weight that was set."""
        parameters, values, room = list[Tensor](), list[Tensor](), AT_ONCE
        for parameter, value in zip(self.parameters.values(), self.values.values(), strict=True):
            if value.numel() > room:
                self._change(values, parameters)
                parameters, values, room = [], [], AT_ONCE
            parameters.append(parameter)
            values.append(value)
            room -= value.numel()
        self._change(values, parameters)

    def _change(self, values: list[Tensor], parameters: list[Tensor]) -> None:
        if values:
            steps = torch._foreach_sub([parameter.float() for parameter in parameters], values)
            torch._foreach_mul_(steps, self._weight)
            torch._foreach_add_(values, steps)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
