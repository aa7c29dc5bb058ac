"""Learning rates, AdamW and Muon, averaged weights."""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_MUON_MOMENTUM = 0.95
_MUON_SCALE = 0.2  # root mean square of AdamW's updates, about, at a learning rate of one
# the quintic that is steepest at 0 of those that keep singular values near one
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_FINAL_RATE = 0.01  # of the peak


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Learning rate of `step` (from 0): a linear rise, then half a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    final = peak * _FINAL_RATE
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def cosine_rate(step: int, *, peak: float, warmup: int, decay: int, floor: float = 1e-8) -> float:
    """Learning rate of `step` (from 0) in the released autoregressive recipe; 0 at the first step.

    A linear rise, then half a cosine to `floor` at step `decay`.
    Source: nvidia-cosmos/cosmos-predict1 `utils/scheduler.py`.
    """
    if step < warmup:
        return peak * step / warmup
    if step >= decay:
        return floor
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) / 2


def linear_factor(
    step: int, *, warmup: int, cycle: float, start: float = 1e-6, top: float = 1.0, end: float = 1.0
) -> float:
    """Factor of the learning rate of `step` (from 0) in the released diffusion recipes.

    A linear rise from `start` to `top`, then a line that reaches `end` at step `cycle`.
    Source: nvidia-cosmos/cosmos-predict1 `diffusion/training/functional/lr_scheduler.py`.
    """
    if step < warmup:
        return start + (top - start) * step / warmup
    return end + (top - end) * (cycle - step) / (cycle - warmup)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of `most`; their norm before.

    NaN and infinite ones become 0 first, as in the released recipes.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0, 0, 0)
    return nn.utils.clip_grad_norm_(parameters, most, foreach=True)


def make_optimizer(
    module: nn.Module,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    orthogonal: Sequence[str] = (),
) -> MuonAdamW:
    """AdamW that decays matrices and kernels, not norms and biases; Muon for some matrices.

    Moments exist from the start, so that a CUDA graph of a step finds them in place. Muon trains
    the matrices whose names fit a pattern of `orthogonal`, such as `blocks.*.weight`. The learning
    rate of all is the tensor `defaults["lr"]`, 0 at first; a graph reads it from memory.

    Raises:
        ValueError: a pattern matches no matrix.
    """
    parameters = trainable(module)
    matrices = [name for name, parameter in parameters.items() if parameter.ndim == 2]
    muon: set[str] = set()
    for pattern in orthogonal:
        if not (matches := fnmatch.filter(matrices, pattern)):
            raise ValueError(f"no matrix to train has a name like {pattern}")
        muon.update(matches)
    members: defaultdict[tuple[object, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():  # Muon's by shape, AdamW's by whether they decay
        shape = parameter.shape if name in muon else None
        members[shape, weight_decay * (parameter.ndim > 1)].append(parameter)
    groups = [
        {"params": each, "orthogonal": shape is not None, "weight_decay": decay}
        for (shape, decay), each in members.items()
    ]
    device = next(module.parameters()).device
    graphs = device.type == "cuda"
    optimizer = MuonAdamW(
        groups, lr=torch.zeros((), device=device), betas=betas, fused=graphs, capturable=graphs
    )
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


class Average:
    """Exponential moving average of a module's trainable parameters, float32.

    The decay rises with the step, min(decay, (1 + step) / (10 + step)), so that a young average
    forgets its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = trainable(module)
        self.values = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        # of the newest parameters
        self._weight = torch.ones((), device=next(module.parameters()).device)

    def set_weight(self, step: int) -> None:
        """Set the weight of the next update, that of `step`, counted from 1."""
        self._weight.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters by the weight that was set."""
        newest = [parameter.float() for parameter in self.parameters.values()]
        steps = torch._foreach_sub(newest, [*self.values.values()])
        torch._foreach_mul_(steps, self._weight)
        torch._foreach_add_([*self.values.values()], steps)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the module's parameters; twice is no change."""
        for name, parameter in self.parameters.items():
            newest = parameter.float().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(newest)


class PowerAverage(Average):
    """Average whose weights are a power of the step, of a relative deviation in time.

    Source: arXiv 2312.02696, section 3.1.
    """

    def __init__(self, module: nn.Module, deviation: float) -> None:
        super().__init__(module, deviation)
        self.exponent = power_exponent(deviation)

    def set_weight(self, step: int) -> None:
        self._weight.fill_(1 - power_decay(step, self.exponent))


def power_exponent(deviation: float) -> float:
    """Exponent of the power function whose relative deviation is `deviation`."""
    inverse = deviation**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def power_decay(step: int, exponent: float) -> float:
    """Weight of the old average at `step`, counted from 1; the first step takes all."""
    return float((1 - 1 / step) ** (exponent + 1))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
