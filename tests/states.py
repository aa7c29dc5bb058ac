"""The newest state of a run, as tests read it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from worldline.train.states import States
from worldline.weights.checkpoint import open_checkpoint


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors, by kind and name."""
    states = States(folder)
    source = open_checkpoint(states.path(states.steps()[-1]))
    return {name: source.read(name) for name in source.tensors}
