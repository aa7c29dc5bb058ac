"""State of a training in files of the released trainers: what they hold, and how it is read.

Each trainer has files and names of its own; in all of them what is trained has two moments, beside
the settings of torch's AdamW or of apex's FusedAdam. Source: nvidia-cosmos/cosmos-predict1
`utils/checkpointer.py`, `checkpointer/{tp,peft_checkpointer}.py`, `utils/fsdp_checkpointer.py`;
nvidia-cosmos/cosmos-predict2.5 `_src/predict2/checkpointer/dcp.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import (
    METADATA,
    FileTensor,
    ShardedTensor,
    Source,
    open_checkpoint,
    refuse_nonfinite,
    sharded_axes,
)
from worldline.weights.names import with_dots

MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = re.compile(r"(?:optimizer\.)?state\.(.+)\.(exp_avg|exp_avg_sq|step)")
_STEP = re.compile(r"(?:optimizer\.)?param_groups\.0\.step")  # of FusedAdam
_RANK = re.compile(r"_mp_(\d+)\.pt$")
# before the names of weights and of their averages, where one file holds both
NETWORK, AVERAGE = "net.", "net_ema."
# of networks that PEFT wraps, in names that only the optimizer has
WRAPPED = "base_model.model."


@dataclass(frozen=True)
class TrainerState:
    """A training after a step, by released names; what is trained has the order of the network.

    Attributes:
        step: steps done.
        weights: of the network, and buffers of its files.
        averaged: whether averages are kept.
        average: of what is trained, float32.
        moments: name of what is trained -> its two moments.
        optimizer: its settings: lr, initial_lr, betas, eps, weight_decay.
        schedule: what its learning rates have beside, as the released schedulers name it.
        adapter: whether an adapter is trained, which is among the weights.
        rank: place among the processes that share layers.
        count: number of these.
    """

    step: int
    averaged: bool
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    adapter: bool = False
    rank: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """Beginning of the names of all files."""
        return f"iter_{self.step:09}"

    def adamw(self) -> dict[str, Any]:
        """Settings as torch's AdamW has them."""
        flags = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
        flags |= {"differentiable": False, "fused": True, "decoupled_weight_decay": True}
        return {**self.optimizer, **flags}

    def steps(self) -> dict[str, dict[str, Tensor]]:
        """Name of what is trained -> its state as torch's AdamW has it."""
        count = torch.tensor(float(self.step))
        return {
            name: {"step": count.clone(), **dict(zip(MOMENTS, pair, strict=True))}
            for name, pair in self.moments.items()
        }

    def scheduler(self) -> dict[str, Any]:
        """State of the schedule as torch has it."""
        rate, peak = (self.optimizer.get(name) for name in ("lr", "initial_lr"))
        facts = {"base_lrs": [peak], "last_epoch": self.step, "_step_count": self.step + 1}
        facts |= {"_is_initial": False, "_get_lr_called_within_step": False, "_last_lr": [rate]}
        return {**self.schedule, **facts}


def by_index(states: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """State of an optimizer by the places of its parameters, as torch has it."""
    group = {**settings, "params": [*range(len(states))]}
    return {"state": dict(enumerate(states.values())), "param_groups": [group]}


@dataclass(frozen=True)
class StoredState:
    """A training on disk, opened by headers.

    Attributes:
        path: beginning of its files, such as `.../iter_000000200`.
        entries: kind and released name -> tensor; kinds are weights, average, exp_avg,
            exp_avg_sq and step.
    """

    path: Path
    entries: Mapping[tuple[str, str], Source]

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor of a kind; weights where no average was kept.

        Raises:
            CheckpointError: there is none, as in files of another training.
        """
        entry, weight = (self.entries.get((each, name)) for each in (kind, "weights"))
        if entry is None and kind == "average" and not self._has(kind):
            entry = weight
        if entry is None or weight is None or entry.meta.shape != weight.meta.shape:
            raise CheckpointError(
                f"{self.path}: of {name} there is no {kind}; it is the training of another model "
                "or adapter, or its optimizer's files are absent (checkpoint.load_training_state)"
            )
        value = entry.read()
        refuse_nonfinite(entry.path, name, value)
        return value

    def _has(self, kind: str) -> bool:
        return any(each == kind for each, _ in self.entries)

    @property
    def step(self) -> int:
        """Steps that its optimizer has done."""
        steps = {int(entry.read()) for (kind, _), entry in self.entries.items() if kind == "step"}
        return max(steps, default=int(self.path.name.partition("_")[2]))


def open_state(file: Path, trained: Sequence[str]) -> StoredState:
    """Open all files of a training by one of them.

    Args:
        file: of weights, as `open_weights` found it.
        trained: released names of what is trained, in the order of the trainer's optimizer.

    Raises:
        CheckpointError: it is of no training, or damaged.
    """
    found, paths = _files(file)
    ranks: dict[int, dict[tuple[str, str], Source]] = {}
    for path in paths:
        rank = _RANK.search(path.name)
        place = ranks.setdefault(int(rank[1]) if rank else 0, {})
        for name, entry in _open(path).items():
            place |= dict.fromkeys(_keys(path, name, trained), entry)
    first, *others = (ranks[rank] for rank in sorted(ranks))
    if any(kind == MOMENTS[0] and not name for kind, name in first):
        raise CheckpointError(
            f"{found}: its optimizer has not {len(trained):,} parameters, as the run; such a "
            "training does not go on (checkpoint.load_training_state)"
        )
    entries = dict(first)
    if others:
        shared = [key for key in first if all(key in each for each in others)]
        entries = {
            key: _join(found, key, [first[key], *(o[key] for o in others)]) for key in shared
        }
    return StoredState(found, entries)


def steps_of(file: Path) -> int:
    """Steps that a training has done, by one of its files.

    Raises:
        CheckpointError: as `open_state`.
    """
    found, paths = _files(file)
    counts = {
        ("step", f"{path}: {name}"): entry
        for path in paths
        for name, entry in _open(path).items()
        if any(kind == "step" for kind, _ in _keys(path, name, ()))
    }
    return StoredState(found, counts).step


def _files(file: Path) -> tuple[Path, list[Path]]:
    """Beginning of the names of a training's files, and those with tensors of its state."""
    names = ((path, re.match(r"iter_\d+", path.name)) for path in (file, *file.parents[:2]))
    found = next((path.with_name(match[0]) for path, match in names if match), None)
    if found is None:
        raise CheckpointError(f"{file}: its name is none of a training, such as iter_000000200.pt")
    paths = [*found.parent.glob(f"{found.name}.pt"), *found.parent.glob(f"{found.name}_*.pt")]
    paths = [path for path in paths if "_RANK" not in path.name]  # averages of other lengths
    paths += [path for name in ("model", "optim") if (path := found / name / METADATA).is_file()]
    if not paths:
        raise CheckpointError(
            f"{file}: beside these weights there is no training ({found.name}/optim); give files "
            "of a released trainer, or of checkpoint.format=reference"
        )
    return found, sorted(paths)


def _join(place: Path, key: tuple[str, str], parts: Sequence[Source]) -> ShardedTensor:
    """A tensor of processes that share layers."""
    kind, name = key
    axes = sharded_axes(name) if kind != "step" else []
    return ShardedTensor(f"{place}: {kind} of {name}", tuple(parts), axes[0] if axes else None)


def _open(path: Path) -> Mapping[str, Source]:
    """Every tensor by its dotted name; of a file of PyTorch, also those of its training state."""
    if path.name == METADATA:
        return open_checkpoint(path).entries
    from worldline.weights.archive import everything, open_pickled

    tensors = open_pickled(path, everything)[1]
    return {name: FileTensor(path, *tensor) for name, tensor in tensors.items()}


def _keys(path: Path, name: str, trained: Sequence[str]) -> list[tuple[str, str]]:
    """Kinds and released names that a dotted name may stand for."""
    if state := _STATE.fullmatch(name):
        owner = state[1].replace(WRAPPED, "")
        if owner.isdigit():
            owner = trained[int(owner)] if int(owner) < len(trained) else ""
        return [(state[2], owner)]
    if _STEP.fullmatch(name):
        return [("step", "")]
    if path.name.endswith("_ema_model.pt"):
        return [("average", name)]
    outer, _, inner = name.partition(".")
    if name.startswith(AVERAGE):
        return [("average", f"{NETWORK}{with_dots(inner)}")]
    if outer == "ema":
        return [("average", with_dots(inner))]
    # a dict of weights inside the file, or names that begin so
    nested = [("weights", inner)] if outer == "model" else []
    return [*nested, ("weights", name)]
