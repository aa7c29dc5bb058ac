"""Memory plan: bytes that each stage of a request holds on its device, and what fits."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from worldline.errors import InsufficientMemoryError, as_flags, option
from worldline.files import GIGABYTE
from worldline.parallel import job
from worldline.shapes import LatentShape

if TYPE_CHECKING:
    from worldline.nn.dit import DiTSizes, Tokens

WORKSPACE = 1_200_000_000  # of cuDNN, cuBLAS and the allocator beside bf16 networks (measured)
_STREAMS = 7  # activations of every token that a block holds at once (measured)
_PLAIN_STREAMS = 9  # without kernels, which work in place
_PLAIN_HEADS = 4  # heads being normalised and rotated in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of host or device memory, of which each of so many processes may take `free`."""

    free: int
    total: int
    processes: int = 1

    def after(self, nbytes: int) -> Memory:
        """Memory once so many bytes are free, too."""
        return replace(self, free=min(self.total, self.free + nbytes))

    def __str__(self) -> str:
        each = " for each process" if self.processes > 1 else ""
        return f"{self.free / GIGABYTE:.1f} of {self.total / GIGABYTE:.1f} GB are free{each}"


@dataclass(frozen=True)
class Weights:
    """Weights of one part.

    Attributes:
        flag: offload flag that keeps them in host memory while they are not used.
        streamed: bytes on the device while they are used and offloaded block by block, if only
            where there is no room for all; None where offloading always moves them whole.
    """

    nbytes: int
    flag: str
    streamed: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a request.

    Attributes:
        name: text, encode, tokens, denoise, decode or guardrail.
        uses: name of the part that computes; "" for one outside the plan's weights.
        activations: bytes beside the weights.
    """

    name: str
    uses: str
    activations: int


@dataclass(frozen=True)
class Plan:
    """Memory of one or several requests, run one after another.

    Attributes:
        name: of the model, for messages.
        flags: offload flags, cheapest first.
        workspace: bytes that libraries take beside tensors.
    """

    name: str
    weights: dict[str, Weights]
    stages: tuple[Stage, ...]
    flags: tuple[str, ...]
    workspace: int = 0

    def need(self, stage: Stage, offloaded: Collection[str]) -> int:
        """Bytes that a stage holds: of all weights that stay, of its own, and beside them."""
        nbytes = self.workspace + stage.activations
        for part, weights in self.weights.items():
            if weights.flag not in offloaded:
                nbytes += weights.nbytes
            elif part == stage.uses:
                nbytes += weights.streamed or weights.nbytes
        return nbytes

    def peak(self, offloaded: Collection[str] = ()) -> int:
        """Bytes of the stage that needs most."""
        return max(self.need(stage, offloaded) for stage in self.stages)

    def describe(self, offloaded: Collection[str] = ()) -> str:
        """Gigabytes of each stage, and which stream their weights."""
        needs: dict[tuple[str, str], int] = {}
        for stage in self.stages:
            weights = self.weights.get(stage.uses)
            streamed = weights and weights.flag in offloaded and weights.streamed is not None
            key = stage.name, " (streamed)" if streamed else ""
            needs[key] = max(needs.get(key, 0), self.need(stage, offloaded))
        return ", ".join(
            f"{name} {need / GIGABYTE:.1f} GB{way}" for (name, way), need in needs.items()
        )

    def fit(self, device: torch.device, memory: Memory, offloaded: Collection[str] = ()) -> Fit:
        """The fewest offload flags, beside those in `offloaded`, with which the plan fits.

        Args:
            device: where it runs.
            memory: of the device.
            offloaded: flags that are set already.
        """
        flags = self.flags if device.type == "cuda" else ()  # elsewhere offloading moves nothing
        fixed = set(offloaded) & set(flags)
        choices = [c for count in range(len(flags) + 1) for c in combinations(flags, count)]
        fits = [
            Fit(peak := self.peak(choice), choice, peak <= memory.free)
            for choice in choices
            if fixed <= {*choice}
        ]
        return next((fit for fit in fits if fit.fits), min(fits, key=lambda fit: fit.need))

    def refuse_unless_fits(
        self, device: torch.device, offloaded: Collection[str], advice: str = "", held: int = 0
    ) -> None:
        """Raise `InsufficientMemoryError`, naming the flags that help, where the plan is too large.

        Args:
            device: where it runs.
            offloaded: flags that are set.
            advice: end of the message.
            held: bytes of the plan that are there already, so that they are not free.
        """
        memory, cuda = device_memory(device).after(held), device.type == "cuda"
        waiting = sum(each.nbytes for each in self.weights.values() if each.flag in offloaded)
        # of a process alone, embeddings may be cached, and swapped memory may do
        if cuda and job.neighbours() > 1 and waiting > (host := host_memory()).free:
            raise InsufficientMemoryError(
                f"{self.name}: offloaded weights need {waiting / GIGABYTE:.1f} GB of host memory "
                f"in each of {job.neighbours()} processes, {host}; offload less, or add "
                f"{option('fsdp', 'on')}"
            )
        fit = self.fit(device, memory, offloaded)
        missing = [name for name in fit.flags if name not in offloaded]
        if fit.fits and not missing:
            return
        kind = "GPU" if cuda else "host"
        need = self.peak(offloaded if cuda else ())
        message = f"{self.name} needs about {need / GIGABYTE:.1f} GB of {kind} memory, {memory}"
        if fit.fits:
            added = (" " if as_flags.get() else ", ").join(option(name, True) for name in missing)
            message += f"; add {added}, which needs {fit.need / GIGABYTE:.1f} GB"
        elif cuda:
            message += f"; all offload options together need {fit.need / GIGABYTE:.1f} GB"
        raise InsufficientMemoryError(message + advice)


@dataclass(frozen=True)
class Fit:
    """How a plan fits: bytes with the offload flags, the least possible where nothing fits."""

    need: int
    flags: tuple[str, ...]
    fits: bool

    def __str__(self) -> str:
        flags = (f" --{name}" for name in self.flags)
        return f"yes{''.join(flags)}" if self.fits else "no, too little memory"


def coding_bytes(cells: int, widest: int, size: int) -> int:
    """Bytes of a tokenizer's activations.

    Args:
        cells: pixels or wavelet patches computed at once.
        widest: channels of the finest level.
        size: bytes of a number.
    """
    return 6 * cells * widest * size  # a residual block of the finest level holds about six


def denoise_bytes(
    config: DiTSizes,
    grid: LatentShape,
    dtype: torch.dtype,
    context_length: int,
    *,
    fused: bool,
    batch: int = 1,
    sharing: Tokens | None = None,
    cached: int = 0,
) -> int:
    """Bytes that a sampler and its diffusion transformer need beside the weights.

    Args:
        config: of the transformer.
        grid: of the latents.
        dtype: of the transformer.
        context_length: rows of a text embedding.
        fused: whether kernels work between the layers, see `worldline.nn.modulation`.
        batch: guidance branches computed at once.
        sharing: how processes share the tokens.
        cached: calls of the network whose residuals a step cache holds.
    """
    from worldline.nn.dit import ALL_TOKENS, HIDDEN_BYTES, PATCH_CELLS

    size, sharing, whole = dtype.itemsize, sharing or ALL_TOKENS, grid.tokens // PATCH_CELLS
    rows = sharing.num_rows(whole)
    tokens = batch * rows
    residual = tokens * config.width * size
    # residual, positions, the norm's output, q, k, v before and after their norms, and the result
    hidden = min(tokens * config.hidden * size, HIDDEN_BYTES)
    inner = config.num_heads * config.head_size
    activations = _STREAMS * residual + hidden
    if not fused:
        heads = _PLAIN_HEADS * tokens * inner * max(size, torch.float32.itemsize)
        activations = _PLAIN_STREAMS * residual + max(2 * hidden, heads)
    activations += sharing.exchanged * tokens * inner * size + cached * residual
    if getattr(config, "learned_positions", False):  # made for all tokens
        activations += (whole - rows) * config.width * size
    contexts = 2 * 2 * config.depth * context_length * inner * size
    latents = 12 * config.latent_channels * grid.tokens * 8  # sampler states, up to float64
    return activations + contexts + latents


def host_memory() -> Memory:
    """Host memory that this process may take: its share, beside others of its job."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, group = total, Path("/sys/fs/cgroup")
    with suppress(OSError, LookupError):  # macOS has no such file
        free = _number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    with suppress(OSError, ValueError, LookupError):  # a container's limit; its file cache is free
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        used -= _number(group / "memory.stat", "inactive_file")
        if limit < total:
            free, total = min(free, max(0, limit - used)), limit
    count = job.neighbours()
    return Memory(free // count, total, count)


def _number(file: Path, name: str) -> int:
    """Number behind a name that begins a line."""
    lines = map(str.split, file.read_text().splitlines())
    return int({line[0]: line[1] for line in lines if len(line) > 1}[name])


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with suppress(OSError, LookupError):  # macOS has no such file
        return _number(Path("/proc/self/status"), "RssAnon:") * 1024
    return 0


def device_memory(device: torch.device) -> Memory:
    """Memory where networks on `device` would lie."""
    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    return host_memory()
