"""Memory of a training run: what each process holds at the peak of a step, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from worldline.errors import InsufficientMemoryError
from worldline.files import GIGABYTE
from worldline.memory import WORKSPACE, Memory
from worldline.train.optim import AT_ONCE

_STATE = 4  # bytes of a number of the optimizer by default: weights, gradients, moments, averages
_UNITS = 2  # blocks whose weights are gathered at once: the one that computes, and the next


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a process through a step: those it always holds, and the largest of its phases.

    Attributes:
        weights: that are trained, in the optimizer's precision, or frozen ones.
        moments: two for each number that is trained.
        average: of what is trained.
        tokenizer: its weights.
        workspace: of libraries.
        phases: what a phase holds beside, by name.
    """

    weights: int
    moments: int
    average: int
    tokenizer: int
    workspace: int
    phases: tuple[dict[str, int], ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name at the peak."""
        held = {each.name: getattr(self, each.name) for each in fields(self)[:-1]}
        return held | max(self.phases, key=lambda phase: sum(phase.values()))

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        large = {name: n for name, n in self.parts.items() if n >= 0.05 * GIGABYTE}
        parts = (f"{name} {n / GIGABYTE:.1f}" for name, n in large.items())
        return f"{self.total / GIGABYTE:.1f} GB ({', '.join(parts)})"


@dataclass(frozen=True)
class Sizes:
    """Numbers from which the memory of a run follows.

    Attributes:
        parameters: of the network, of this process's layers.
        trained: of them, or of the adapters.
        blocks: number of blocks.
        block: parameters of one.
        tokens: of a batch.
        stream: bytes of a token between two blocks.
        inside: bytes of a token that a block keeps for the way back.
        gradients: bytes of a token that a block's gradients take beside.
        shared: bytes that all blocks share: positions, text.
        loss: bytes of the last layers and the loss, before blocks have gradients.
        tokenizer: bytes of its weights.
        coding: bytes in which it encodes a clip.
        accumulated: whether a step has several batches, and their gradients add up.
        state: bytes of a number of weights, gradients and moments.
    """

    parameters: int
    trained: int
    blocks: int
    block: int
    tokens: int
    stream: int
    inside: int
    gradients: int
    shared: int
    loss: int
    tokenizer: int
    coding: int
    accumulated: bool = False
    state: int = _STATE


def plan_memory(
    sizes: Sizes, dp: int, dtype: torch.dtype, *, average: bool, checkpointed: bool
) -> TrainingMemory:
    """Memory of each process.

    Activations go while gradients come, block by block: the way back needs most where it begins
    or where it ends.

    Args:
        sizes: of the network and the batch.
        dp: processes that share the weights.
        dtype: of the computation.
        average: whether averaged weights are kept.
        checkpointed: whether blocks compute their activations again on the way back.
    """
    size, frozen = dtype.itemsize, sizes.trained < sizes.parameters
    held = sizes.parameters * size if frozen else 0
    own = sizes.trained * sizes.state // dp
    rest = sizes.parameters - sizes.blocks * sizes.block
    gathered = (rest + _UNITS * sizes.block) * size
    # gradients that are not exchanged yet, of all but adapters, which are small
    outside, block = (0, 0) if frozen else (rest * size, 2 * sizes.block * _STATE)
    inside, beside = sizes.tokens * sizes.inside, sizes.tokens * sizes.gradients
    kept = sizes.tokens * sizes.stream if checkpointed else inside  # of a block
    one = beside + inside * checkpointed
    begin = {
        "gradients": own if sizes.accumulated else 0,
        "gathered": gathered,
        # a block's gradients come when its activations have gone
        "activations": sizes.blocks * kept
        + sizes.shared
        + outside
        + max(sizes.loss, one + max(0, block - kept)),
    }
    # gradients of the first block, and of what is outside, come last
    late = 0 if frozen else (rest + sizes.block) * sizes.state // dp
    end = {
        "gradients": own,
        "gathered": gathered,
        "activations": inside + beside + sizes.shared + outside + block - late,
    }
    averaged = sizes.trained * _STATE // dp if average else 0
    # of some tensors at once, and their weights in float32
    most = max(AT_ONCE, rest // dp) * _STATE
    changes = min(averaged, most) * (1 if sizes.state == _STATE else 2)
    return TrainingMemory(
        weights=held // dp + own,
        moments=2 * own,
        average=averaged,
        tokenizer=sizes.tokenizer,
        workspace=WORKSPACE if dtype != torch.float32 else 0,
        phases=(
            begin,
            end,
            {"gradients": own, "changes of the average": changes},
            {"gradients": own, "encoding": sizes.coding},  # those of the step before
        ),
    )


def choose_checkpointing(
    plans: dict[bool, TrainingMemory], chosen: str, memory: Memory, where: str
) -> bool:
    """Whether blocks compute their activations again: as chosen, or where memory asks for it.

    Args:
        plans: without and with it.
        chosen: "on", "off" or "auto".
        memory: of the device.
        where: beginning of a message.

    Raises:
        InsufficientMemoryError: what is chosen does not fit; what would make it fit is named.
    """
    options = {"on": [True], "off": [False], "auto": [False, True]}[chosen]
    for option in options:
        if plans[option].total <= memory.free:
            return option
    need, advice = plans[options[-1]], ""
    if not options[-1] and plans[True].total <= memory.free:
        advice = "give trainer.activation_checkpointing=auto"
    else:
        advice = "train an adapter (--lora), smaller or shorter clips, or on more GPUs"
    raise InsufficientMemoryError(f"{where} needs about {need}, {memory}; {advice}")
