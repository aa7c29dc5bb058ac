"""Files of the released trainer of the flow transformer: distributed checkpoints.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/checkpointer/dcp.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from worldline.weights.trainings import AVERAGE, NETWORK, WRAPPED, TrainerState

MOMENTS_DTYPE = torch.bfloat16
STATE = torch.bfloat16  # of weights and moments while it trains


def files(state: TrainerState) -> dict[str, Any]:
    """Names and contents of the folders of a step."""
    whole = torch.zeros((), dtype=torch.int64)
    counters = {"accum_video_sample_counter": whole, "accum_image_sample_counter": whole}
    counters |= {"accum_iteration": whole + state.step, "accum_train_in_hours": torch.tensor(0.0)}
    weights = {f"{NETWORK}{name}": tensor for name, tensor in counters.items()}
    weights = {n: t.bfloat16() if t.is_floating_point() else t for n, t in weights.items()}
    weights |= state.weights
    model = dict(weights)
    if state.averaged:
        for name, tensor in weights.items():
            wide = state.average.get(name, tensor)
            key = f"{AVERAGE}{name.removeprefix(NETWORK)}"
            model[key] = wide.float() if wide.is_floating_point() else wide
    # PEFT wraps a network with an adapter, and only names of weights lose the wrapper
    outer = f"{NETWORK}{WRAPPED}" if state.adapter else NETWORK
    optimizer: dict[str, Any] = {}
    for name, kinds in state.steps().items():
        inner = f"{outer}{name.removeprefix(NETWORK)}"
        optimizer |= {f"state.{inner}.{kind}": each for kind, each in kinds.items()}
        optimizer |= {f"param_groups.{inner}.{key}": each for key, each in state.adamw().items()}
    scheduler = state.scheduler()
    scheduler.pop("lr_lambdas", None)  # empty, which a distributed checkpoint does not hold
    folders = {"model": model, "optim": optimizer, "scheduler": scheduler}
    folders["trainer"] = {"iteration": state.step}
    return {f"{state.name}/{kind}": each for kind, each in folders.items()}
