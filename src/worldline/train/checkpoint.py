"""The whole state of a run in a folder, so that a killed run goes on bit for bit.

`state.json` is written last and names the files that belong to it: a run that dies while it
saves leaves the previous state untouched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.files import read_json, replacing
from worldline.train.optim import Average
from worldline.weights.checkpoint import save

_STATE = "state.json"


def save_state(
    folder: Path, step: int, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, averages and moments after `step` steps (one file each), then state.json."""
    parts = _tensors(module, average, optimizer)
    files = {part: f"{part}-{step:07d}.safetensors" for part in parts}
    for part, tensors in parts.items():
        save(tensors, folder / files[part])
    previous = _read_state(folder).get("files", {})
    with replacing(folder / _STATE) as temporary:
        temporary.write_text(json.dumps({"step": step, "files": files}, indent=1))
    for name in set(previous.values()) - set(files.values()):
        (folder / name).unlink(missing_ok=True)


def load_state(
    folder: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_state` wrote; the number of steps done, 0 in a new folder.

    Raises:
        CheckpointError: the saved tensors do not fit the module or the optimizer.
    """
    state = _read_state(folder)
    if not state:
        return 0
    for part, tensors in _tensors(module, average, optimizer).items():
        stored = load_file(folder / state["files"][part])
        if stored.keys() != tensors.keys() or any(
            stored[name].shape != tensor.shape for name, tensor in tensors.items()
        ):
            raise CheckpointError(
                f"{folder} holds the state of another model or optimizer; choose another folder"
            )
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    for moments in optimizer.state.values():
        if "step" in moments:
            moments["step"].fill_(float(state["step"]))
    return int(state["step"])


def _tensors(
    module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Tensors of a state by part and parameter; Muon's matrices have no second moment."""
    parameters = dict(module.named_parameters())
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    return {
        "weights": {name: parameter.detach() for name, parameter in parameters.items()},
        "average": average.values,
        "first_moment": {n: s["exp_avg"] for n, s in states.items() if "exp_avg" in s},
        "second_moment": {n: s["exp_avg_sq"] for n, s in states.items() if "exp_avg_sq" in s},
    }


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    return read_json(path) if path.exists() else {}
