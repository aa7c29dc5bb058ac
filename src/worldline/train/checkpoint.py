"""The whole state of a run in one file, so that a killed run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.train.optim import Average
from worldline.weights.checkpoint import open_checkpoint, save

STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # the second is AdamW's alone


def save_state(
    folder: Path, step: int, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, averages and moments after `step` steps."""
    save(_tensors(module, average, optimizer), folder / STATE, {"step": step})


def load_state(
    folder: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_state` wrote; the number of steps done, 0 in a new folder.

    Raises:
        CheckpointError: the saved tensors do not fit the module or the optimizer.
    """
    if not (folder / STATE).exists():
        return 0
    stored = open_checkpoint(folder / STATE)
    tensors = _tensors(module, average, optimizer)
    if {name: t.shape for name, t in tensors.items()} != {
        name: torch.Size(info.shape) for name, info in stored.tensors.items()
    }:
        raise CheckpointError(
            f"{folder} holds the state of another model or optimizer; choose another folder"
        )
    for name, tensor in tensors.items():
        tensor.copy_(stored.read(name))
    step = int(stored.metadata["step"])
    for moments in optimizer.state.values():
        if "step" in moments:
            moments["step"].fill_(step)
    return step


def _tensors(
    module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Tensors of a state, each by its kind and parameter."""
    tensors = {f"average/{name}": value for name, value in average.values.items()}
    for name, parameter in module.named_parameters():
        tensors[f"weights/{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{kind}/{name}": moments[kind] for kind in _MOMENTS if kind in moments}
    return tensors
