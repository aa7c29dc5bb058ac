"""Whether a world fits on a device, and with which of its parts waiting in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from worldline.errors import InsufficientMemoryError
from worldline.files import GIGABYTE
from worldline.machine import Memory, device_memory
from worldline.nn.dit import HIDDEN_BYTES, DiTSizes
from worldline.shapes import LatentShape, VideoShape

# offload flags that are set -> bytes that a request needs at most
Need = Callable[[Collection[str]], int]


_STREAMS = 7  # activations of every token that a block holds at once (measured)
_PLAIN_STREAMS = 9  # likewise without kernels, which change nothing in place
_PLAIN_HEADS = 4  # and while heads are normed and turned, in float32 or wider


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


def check_frames(video: VideoShape, *, guarded: bool, clips: int = 1, beside: int = 0) -> None:
    """Refuse a video whose frames find no room in host memory, which holds all of them at last.

    Args:
        video: its size.
        guarded: guardrails check them, and blur faces in others: one video is held twice.
        clips: that are held at once.
        beside: bytes of host memory that the world takes itself, if that fits.

    Raises:
        InsufficientMemoryError: they find none.
    """
    memory = device_memory(torch.device("cpu"))
    need = (clips + guarded) * 3 * video.frames * video.height * video.width
    if memory is None or need + (beside if beside <= memory.free else 0) <= memory.free:
        return
    held = " (twice, for the guardrails)" if guarded else ""
    if clips > 1:
        held = f" ({clips} videos in step{', and one more for the guardrails' if guarded else ''})"
    world = f" and the world {beside / GIGABYTE:.1f} GB" if need <= memory.free else ""
    raise InsufficientMemoryError(
        f"num_video_frames is {video.frames}: all frames of {video.height} x {video.width} pixels "
        f"take {need / GIGABYTE:.1f} GB of host memory{held}{world}, {memory.free / GIGABYTE:.1f} "
        f"of {memory.total / GIGABYTE:.1f} GB are free; fewer or smaller frames take less"
    )


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


@dataclass(frozen=True)
class DiffusionPlan:
    """Bytes that a request will hold on its device, stage by stage.

    Attributes:
        text: while prompts are encoded.
        encode: while given frames become latents.
        denoise: while the sampler runs.
        decode: while latents become pixels.
        visit: while a network that is none of the world's, such as an offloaded guard, is used.
    """

    text: int
    encode: int
    denoise: int
    decode: int
    visit: int = 0

    @property
    def peak(self) -> int:
        return max(self.text, self.encode, self.denoise, self.decode, self.visit)


def residents(
    weights: Mapping[str, int], offloaded: Mapping[str, bool], dtype: torch.dtype
) -> Callable[[str], int]:
    """Return what tells the bytes of the weights that are on a device while one part is used.

    While another network visits it, that is no part: "".

    Args:
        weights: bytes of each part.
        offloaded: whether it waits in host memory while it is not used.
        dtype: of the parts.
    """

    def resident(used: str) -> int:
        there = (n for part, n in weights.items() if part == used or not offloaded[part])
        return sum(there) + workspace(dtype)

    return resident


def denoise_bytes(
    config: DiTSizes,
    grid: LatentShape,
    dtype: torch.dtype,
    context_length: int,
    *,
    fused: bool,
    batch: int = 1,
) -> int:
    """Return the bytes that a sampler and its transformer need beside the weights.

    Args:
        config: of the transformer.
        grid: of the latents.
        dtype: of the transformer.
        context_length: rows of a text embedding.
        fused: kernels do the work between the layers, see `worldline.nn.modulation`.
        batch: branches of the guidance that the transformer computes at once.
    """
    size = dtype.itemsize
    _, rows, columns = config.patch
    tokens = grid.tokens // (rows * columns)
    stream = batch * tokens * config.width * size
    # the stream, positions, the norm's output, q, k, v before and after their norms, and the result
    hidden = min(batch * tokens * config.hidden * size, HIDDEN_BYTES)
    inner = config.num_heads * config.head_size
    activations = _STREAMS * stream + hidden
    if not fused:
        heads = _PLAIN_HEADS * batch * tokens * inner * max(size, torch.float32.itemsize)
        activations = _PLAIN_STREAMS * stream + max(2 * hidden, heads)
    contexts = 2 * 2 * config.depth * context_length * inner * size
    latents = 12 * config.latent_channels * grid.tokens * 8  # states of the sampler, up to float64
    return activations + contexts + latents
