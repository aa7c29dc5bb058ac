"""Files of the released trainer of the autoregressive transformer.

Source: nvidia-cosmos/cosmos-predict1 `utils/checkpointer.py`, `checkpointer/{ddp,tp}.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from worldline.weights.trainings import TrainerState, by_index

MOMENTS_DTYPE = torch.bfloat16
STATE = torch.bfloat16  # of weights and moments while it trains
_PARTS = ("tok_embeddings", "layers", "norm", "output")
# of a layer, as its module has them
_LAYERS = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
    *(f"cross_attention.{name}" for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
    *("cross_attention_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("attention_norm", "ffn_norm"),
)


def order(name: str) -> tuple[int, ...]:
    """Place of a released name among those that the optimizer numbers."""
    part, _, rest = name.removeprefix("model.").partition(".")
    number, _, inside = rest.partition(".")
    if not number.isdigit():
        return (_PARTS.index(part),)
    layers = (place for place, layer in enumerate(_LAYERS) if f"{inside}.".startswith(f"{layer}."))
    return _PARTS.index(part), int(number), next(layers)


def files(state: TrainerState) -> dict[str, Any]:
    """Names and contents of the files of a step; of processes that share layers, their own."""
    weights = dict(state.weights)
    optimizer = by_index(state.steps(), state.adamw())
    facts = {"grad_scaler": {}, "iteration": state.step}
    if state.count == 1:
        training = {"model": weights, "optimizer": optimizer, "scheduler": state.scheduler()}
        return {f"{state.name}.pt": training | facts}
    parts = {"model": weights, "optim": optimizer, "scheduler": state.scheduler()}
    shards = {f"{state.name}_{kind}_mp_{state.rank}.pt": each for kind, each in parts.items()}
    return shards | ({} if state.rank else {f"{state.name}.pt": facts})
