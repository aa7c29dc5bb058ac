"""Step sizes, parameter groups and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

_MUON_MOMENTUM = 0.95
_MUON_SIZE = 0.2  # root mean square of AdamW's updates, about, at a learning rate of one
# steepest at 0 of the quintics that keep singular values near one
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """Return the learning rate of `step` (from 0): a linear rise, then half a cosine to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(
    module: nn.Module,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    orthogonal: Sequence[str] = (),
) -> MuonAdamW:
    """Return AdamW that decays matrices and kernels, not norms and biases; Muon where it is asked.

    Its moments exist from the start, so that a CUDA graph of its step finds them in place.

    Args:
        module: its parameters that want gradients, float32.
        betas: of AdamW.
        weight_decay: of both.
        orthogonal: patterns of the names of matrices that Muon trains (`blocks.*.weight`); what
            they fit beside matrices is left to AdamW.

    Raises:
        ValueError: a pattern fits no matrix.
    """
    matrices = [name for name, parameter in _parameters(module) if parameter.ndim == 2]
    for pattern in orthogonal:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(f"no matrix to train has a name like {pattern}")
    parameters: dict[str, list[nn.Parameter]] = {"muon": [], "decayed": [], "free": []}
    for name, parameter in _parameters(module):
        muon = parameter.ndim == 2 and any(fnmatchcase(name, one) for one in orthogonal)
        kind = "muon" if muon else "decayed" if parameter.ndim > 1 else "free"
        parameters[kind].append(parameter)
    groups = [
        {"params": parameters["muon"], "weight_decay": weight_decay, "orthogonal": True},
        {"params": parameters["decayed"], "weight_decay": weight_decay},
        {"params": parameters["free"], "weight_decay": 0.0},
    ]
    device = next(module.parameters()).device
    on_gpu = device.type == "cuda"
    rate: Any = torch.zeros((), device=device) if on_gpu else 0.0  # a graph reads it from memory
    optimizer = MuonAdamW(groups, lr=rate, betas=betas, fused=on_gpu, capturable=on_gpu)
    for kind, members in parameters.items():
        for parameter in members:
            moments = {"exp_avg": torch.zeros_like(parameter)}
            if kind != "muon":
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
                moments["step"] = torch.zeros((), device=device if on_gpu else "cpu")
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
        """Change all parameters by their gradients; those of Muon's matrices are let go."""
        for group in self.param_groups:
            if group.get("orthogonal"):
                alike: dict[torch.Size, list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        alike.setdefault(parameter.shape, []).append(parameter)
                for matrices in alike.values():
                    self._step_of(matrices, group["lr"], group["weight_decay"])
        super().step()

    def _step_of(self, matrices: list[nn.Parameter], rate: float | Tensor, decay: float) -> None:
        """Do Muon's step for matrices of one shape at once."""
        weights: list[Tensor] = [matrix.data for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self.state[matrix]["exp_avg"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - _MUON_MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MUON_MOMENTUM))  # Nesterov's
        size = _MUON_SIZE * math.sqrt(max(matrices[0].shape))
        steps = orthogonalise(ahead).float() * (rate * size)
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_sub_(weights, steps.unbind())
        for matrix in matrices:
            matrix.grad = None  # AdamW passes over it


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return U V^T of each matrix U S V^T, roughly: singular values come out between 0.7 and 1.2.

    A quintic Newton-Schulz iteration, in bf16.

    Args:
        matrices: (N, rows, columns).

    Returns:
        bf16, in the same shape.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).bfloat16()
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups this learning rate, in place where it lies on a device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
        device = next(iter(self.values.values())).device
        self._weight = torch.ones((), device=device)  # of the newest parameters

    def set_weight(self, step: int) -> None:
        """Say that the next update is that of `step`, counted from 1."""
        self._weight.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the parameters by the weight that was set."""
        values = list(self.values.values())
        steps = torch._foreach_sub([p.detach().float() for _, p in _parameters(module)], values)
        torch._foreach_mul_(steps, self._weight)
        torch._foreach_add_(values, steps)

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
