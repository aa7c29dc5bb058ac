"""Files of the released trainers of the diffusion transformer: of all weights, or of an adapter.

Source: nvidia-cosmos/cosmos-predict1 `utils/fsdp_checkpointer.py`, `utils/fused_adam.py`,
`checkpointer/peft_checkpointer.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from worldline.weights.trainings import MOMENTS, TrainerState, by_index

MOMENTS_DTYPE = torch.float32
STATE = torch.float32  # the weights that compute are a copy, rounded


def files(state: TrainerState) -> dict[str, Any]:
    """Names and contents of the files of a step."""
    moments = {name: dict(zip(MOMENTS, pair, strict=True)) for name, pair in state.moments.items()}
    settings = {
        **state.optimizer,
        **{name: torch.tensor(state.optimizer.get(name, 0.0)) for name in ("lr", "initial_lr")},
        "bias_correction": True,
        "step": torch.tensor([state.step], dtype=torch.int32),
    }
    scheduler = state.scheduler()
    for name in ("base_lrs", "_last_lr"):
        scheduler[name] = [torch.tensor(float(rate or 0)) for rate in scheduler[name]]
    if not state.adapter:
        named = {"state": moments, "param_groups": [{**settings, "params": [*moments]}]}
        weights = {"reg": dict(state.weights)}
        if state.averaged:
            both = {name: state.average.get(name, each) for name, each in state.weights.items()}
            weights["ema"] = {name: tensor.float() for name, tensor in both.items()}
        return {
            **{f"{state.name}_{kind}_model.pt": each for kind, each in weights.items()},
            f"{state.name}_optim.pt": {"optimizer": named, "scheduler": scheduler},
            f"{state.name}.pt": {"iteration": state.step},
        }
    average = {name.replace(".", "-"): tensor for name, tensor in state.average.items()}
    record = {"image": 0, "video": state.step, "iteration": state.step}
    model = {"model": dict(state.weights), "ema": average or None, "trained_data_record": record}
    return {
        f"{state.name}_model.pt": model,
        f"{state.name}_optim.pt": by_index(moments, settings),
        f"{state.name}_scheduler.pt": scheduler,
        f"{state.name}_trained_data_record.json": record,
        f"{state.name}.pt": {"grad_scaler": {}, "iteration": state.step},
    }
