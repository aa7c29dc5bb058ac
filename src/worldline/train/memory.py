"""Memory of a training run: what each process holds at the peak of a step, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from worldline.errors import InsufficientMemoryError
from worldline.files import GIGABYTE
from worldline.memory import WORKSPACE, Memory

_STATE = 4  # bytes of a number of the optimizer by default: weights, gradients, moments, averages
_UNITS = 2  # blocks whose weights are gathered at once: the one that computes, and the next


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a process at the peak of a step.

    Attributes:
        weights: that are trained, in the optimizer's precision, or frozen ones.
        gradients: of what is trained.
        moments: two for each.
        average: of what is trained.
        gathered: weights of the blocks that compute, in the computation's precision.
        activations: that wait for the way back.
        tokenizer: its weights, and what it needs for a clip.
        workspace: of libraries.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int
    activations: int
    tokenizer: int
    workspace: int

    @property
    def total(self) -> int:
        # a clip is encoded before the step's activations are there
        beside = max(self.activations, self.tokenizer)
        held = (self.weights, self.gradients, self.moments, self.average, self.gathered)
        return sum(held) + beside + self.workspace

    def __str__(self) -> str:
        each = ((field.name, getattr(self, field.name)) for field in fields(self))
        parts = ", ".join(f"{name} {nbytes / GIGABYTE:.1f}" for name, nbytes in each if nbytes)
        return f"{self.total / GIGABYTE:.1f} GB ({parts})"


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
        loss: bytes of the loss beside.
        tokenizer: bytes of its weights and of a clip.
        state: bytes of a number of weights, gradients and moments.
    """

    parameters: int
    trained: int
    blocks: int
    block: int
    tokens: int
    stream: int
    inside: int
    loss: int
    tokenizer: int
    state: int = _STATE


def plan_memory(
    sizes: Sizes, dp: int, dtype: torch.dtype, *, average: bool, checkpointed: bool
) -> TrainingMemory:
    """Memory of each process.

    Args:
        sizes: of the network and the batch.
        dp: processes that share the weights.
        dtype: of the computation.
        average: whether averaged weights are kept.
        checkpointed: whether blocks compute their activations again on the way back.
    """
    size, frozen = dtype.itemsize, sizes.trained < sizes.parameters
    held = sizes.parameters * size if frozen else 0
    own = sizes.trained * sizes.state
    rest = sizes.parameters - sizes.blocks * sizes.block
    kept = sizes.blocks * (sizes.stream if checkpointed else sizes.inside)
    kept += sizes.inside if checkpointed else 0
    return TrainingMemory(
        weights=(held + own) // dp,
        gradients=own // dp,
        moments=2 * own // dp,
        average=sizes.trained * _STATE // dp if average else 0,
        gathered=(rest + _UNITS * sizes.block) * size + (0 if frozen else sizes.block * _STATE),
        activations=sizes.tokens * kept + sizes.loss,
        tokenizer=sizes.tokenizer,
        workspace=WORKSPACE if dtype != torch.float32 else 0,
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
