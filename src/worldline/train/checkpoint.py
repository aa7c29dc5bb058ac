"""The whole state of a run in a folder, so that a killed run goes on bit for bit.

`state.json` is written last and names the files that belong to it: a run that dies while it
saves leaves the state before untouched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.train.optim import Average
from worldline.weights.write import save as save_tensors

_PARTS = ("weights", "average", "first_moment", "second_moment")


def save_state(
    folder: Path, step: int, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, averages and moments after `step` steps (one file each), then state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, parameter in module.named_parameters():
        parts["weights"][name] = parameter.detach()
        if parameter in optimizer.state:
            moments = optimizer.state[parameter]
            parts["first_moment"][name] = moments["exp_avg"]
            if "exp_avg_sq" in moments:  # Muon has none
                parts["second_moment"][name] = moments["exp_avg_sq"]
    parts["average"] = average.values
    files = {part: f"{part}-{step:07d}.safetensors" for part in _PARTS}
    for part, tensors in parts.items():
        save_tensors(
            {name: t.cpu().contiguous() for name, t in tensors.items()}, folder / files[part]
        )
    before = _read_state(folder)
    state = folder / "state.json"
    temporary = state.with_suffix(".tmp")
    temporary.write_text(json.dumps({"step": step, "files": files}, indent=1))
    os.replace(temporary, state)
    if before is not None and before["step"] != step:
        for name in before["files"].values():
            (folder / name).unlink(missing_ok=True)


def load_state(
    folder: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_state` wrote; return the number of steps done, 0 where nothing is saved.

    Raises:
        CheckpointError: the saved tensors do not fit the module.
    """
    state = _read_state(folder)
    if state is None:
        return 0
    parts = {part: load_file(folder / state["files"][part]) for part in _PARTS}
    second = {
        name
        for name, parameter in module.named_parameters()
        if "exp_avg_sq" in optimizer.state.get(parameter, {})
    }
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    stored = {name: tensor.shape for name, tensor in parts["weights"].items()}
    if stored != expected or parts["second_moment"].keys() != second:
        raise CheckpointError(
            f"{folder} holds the state of another model or optimizer; give another folder"
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(parts["weights"][name])
            average.values[name].copy_(parts["average"][name])
            if parameter in optimizer.state:
                moments = optimizer.state[parameter]
                moments["exp_avg"].copy_(parts["first_moment"][name])
                if "exp_avg_sq" in moments:
                    moments["exp_avg_sq"].copy_(parts["second_moment"][name])
                    moments["step"].fill_(float(state["step"]))
    return int(state["step"])


def _read_state(folder: Path) -> dict[str, Any] | None:
    path = folder / "state.json"
    if not path.exists():
        return None
    state: dict[str, Any] = json.loads(path.read_text())
    return state
