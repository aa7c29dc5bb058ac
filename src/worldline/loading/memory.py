"""Whether a world fits on a device, and with which of its parts waiting in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from worldline.errors import InsufficientMemoryError
from worldline.files import GIGABYTE
from worldline.machine import Memory, device_memory

# offload flags that are set -> bytes that a request needs at most
Need = Callable[[Collection[str]], int]


@dataclass(frozen=True)
class Fit:
    """How a world fits.

    Attributes:
        need: bytes of the plan with `flags`, or of the smallest plan where nothing fits.
        flags: offload flags of that plan.
        fits: whether the need is met; None where the memory is not known.
    """

    need: int
    flags: tuple[str, ...]
    fits: bool | None


def fewest_flags(
    need: Need,
    flags: Sequence[str],
    device: torch.device,
    memory: Memory | None,
    given: Collection[str] = (),
) -> Fit:
    """Find the fewest offload flags with which a world fits.

    Args:
        need: of the world.
        flags: that it knows, cheapest first.
        device: where it would run.
        memory: of the device; None where it is not known.
        given: flags that are set already.
    """
    choices: list[tuple[str, ...]] = [()]
    if device.type == "cuda":  # elsewhere the parts have one home anyway
        choices = [
            choice
            for count in range(len(flags) + 1)
            for choice in combinations(flags, count)
            if set(given) <= set(choice)
        ]
    plans = []
    for choice in choices:
        peak = need(choice)
        plans.append(Fit(peak, choice, None if memory is None else peak <= memory.free))
        if plans[-1].fits is not False:
            return plans[-1]
    return min(plans, key=lambda plan: plan.need)


def check_memory(
    name: str,
    need: Need,
    flags: Sequence[str],
    device: torch.device,
    given: Collection[str],
) -> None:
    """Refuse a world that does not fit as it is asked for; name the flags that help.

    Args:
        name: of the world, for the message.
        need: of the world.
        flags: that it knows, cheapest first.
        device: where it is to run.
        given: flags that are set.

    Raises:
        InsufficientMemoryError: it does not fit.
    """
    memory = device_memory(device)
    if memory is None:
        return
    found = fewest_flags(need, flags, device, memory, given)
    more = [flag for flag in found.flags if flag not in given]
    if found.fits and not more:
        return
    asked = need(given if device.type == "cuda" else ())
    kind = "GPU" if device.type == "cuda" else "host"
    message = (
        f"{name} needs about {asked / GIGABYTE:.1f} GB of {kind} memory, "
        f"{memory.free / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB are free"
    )
    least = f"{found.need / GIGABYTE:.1f} GB"
    if found.fits:
        message += f"; with {' '.join(f'--{flag}' for flag in more)} it needs {least}, which fits"
    elif device.type == "cuda":
        message += f"; no offload flag is enough (at least {least} are needed)"
    raise InsufficientMemoryError(message)


def workspace(dtype: torch.dtype) -> int:
    """Return the bytes that the libraries take for themselves."""
    return 1_200_000_000 if dtype != torch.float32 else 0


@functools.cache
def count_parameters(kind: type[nn.Module], config: Hashable) -> int:
    """Return the number of weights of a network that is not built."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters())


def coding_bytes(cells: int, widest: int, size: int) -> int:
    """Return the bytes of a tokenizer's activations.

    Args:
        cells: wavelet patches of the clip.
        widest: channels of the finest level.
        size: bytes a number.
    """
    # the widest activation, held about six times by a residual block of the finest level
    return 6 * cells * widest * size
