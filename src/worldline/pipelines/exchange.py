"""What goes into a request for a video and what comes out of it, in all diffusion families."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import InputError
from worldline.nn.dit import DiTSizes
from worldline.pipelines.background import in_background
from worldline.pipelines.requests import VideoRequest
from worldline.report import Recorder
from worldline.sampling.solvers import Steps
from worldline.shapes import latent_frames_of, nearest_frames
from worldline.video.convert import signed_to_uint8

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result")
RequestType = TypeVar("RequestType", bound=VideoRequest)
Tell = Callable[["Progress"], None]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings that are given in place of prompts, (1, S, E) or (S, E), floating.

    Attributes:
        prompt: of what the video shows.
        negative: of what it does not show.
    """

    prompt: Tensor | None = None
    negative: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """Where a request stands.

    Attributes:
        kind: "text", "encode", "denoise", "decode" or "done".
        done: how much of it.
        total: of how much.
        frames: pixels that are final, uint8 (T, H, W, 3); of "decode" the new ones, of "done" all.
        preview: an early look, uint8 (T latent frames, h, w, 3).
        seconds: that a step of "denoise" took.
    """

    kind: str
    done: int
    total: int
    frames: NDArray[np.uint8] | None = None
    preview: NDArray[np.uint8] | None = None
    seconds: float | None = None


def with_defaults(
    kind: type[RequestType], defaults: DataclassInstance, options: Mapping[str, Any]
) -> RequestType:
    """Return a request; what `options` leave out is as `defaults` say, where they do.

    Raises:
        InputError: an option is unknown or out of range.
    """
    known = [field.name for field in fields(kind)]
    if unknown := ", ".join(sorted(options.keys() - set(known))):
        raise InputError(f"unknown option {unknown}; there are: {', '.join(known)}")
    own = {
        field.name: getattr(defaults, field.name)
        for field in fields(defaults)
        if field.name in known
    }
    return kind(**{"prompt": None, **own, **options})


def check_size(
    request: VideoRequest,
    config: DiTSizes,
    most: int,
    temporal: int,
    spatial: int,
    *,
    longer: str = "",
) -> None:
    """Refuse a size that a world cannot make, with all that is wrong with it in one line.

    Args:
        request: what is wanted.
        config: of the transformer.
        most: latent frames of the longest video.
        temporal: frames that a latent frame covers.
        spatial: pixels that a latent cell covers on each side.
        longer: what makes longer videos, for the message.

    Raises:
        InputError: the nearest size that can be made is another, or nothing is left to make.
    """
    frames, longest = request.num_video_frames, 1 + (most - 1) * temporal
    given = request.num_input_frames
    least = 1 + latent_frames_of(given, temporal) * temporal
    wrong = []
    if (frames - 1) % temporal or frames > longest:
        # one with something left to make, so that what is suggested is not refused next
        nearest = min(longest, max(least, nearest_frames(frames, temporal)))
        ways = f" ({longer})" if longer and frames > longest else ""
        wrong.append(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at most {longest}: "
            f"the nearest is {nearest}{ways}"
        )
    elif frames < least:
        wrong.append(
            f"num_video_frames is {frames}, but num_input_frames is {given}: nothing is left to "
            f"make; give {least} frames or more"
        )
    sides = (
        ("height", request.height, config.patch[1], config.max_grid.height),
        ("width", request.width, config.patch[2], config.max_grid.width),
    )
    for name, pixels, cells, tokens in sides:
        step = cells * spatial
        nearest = min(max(round(pixels / step), 1), tokens) * step
        if nearest != pixels:
            wrong.append(
                f"{name} is {pixels}; it must be a multiple of {step} and at most "
                f"{tokens * step}: the nearest is {nearest}"
            )
    if wrong:
        raise InputError("; ".join(wrong))


@contextmanager
def stage(recorder: Recorder, name: str) -> Iterator[None]:
    """Record a stage, whose peak is not to count what an earlier one has left to be used again."""
    if recorder.device.type == "cuda":
        torch.cuda.empty_cache()
    with recorder.stage(name):
        yield


def on_thread(
    work: Callable[[Tell], Result], device: torch.device
) -> Generator[Progress, None, Result]:
    """Do what `in_background` does, on this device: a thread begins on the first GPU."""
    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    if device.index is not None:
        gpu = device.index

    def run(tell: Tell) -> Result:
        with torch.cuda.device(gpu) if device.type == "cuda" else nullcontext():
            return work(tell)

    return in_background(run)


def step_teller(
    tell: Tell,
    device: torch.device,
    count: int,
    preview_every: int,
    look: Callable[[Tensor], NDArray[np.uint8] | None],
    before: int = 0,
) -> Callable[[Steps], Tensor]:
    """Return what runs a sampler and tells of each step, from now on.

    Args:
        tell: is told.
        device: of the sampler.
        count: steps in all.
        preview_every: steps between early looks; 0 for none.
        look: gives the early look of an estimate of the clean latents.
        before: steps that were made before.
    """
    started = time.perf_counter()

    def run(steps: Steps) -> Tensor:
        nonlocal started
        step = before
        while True:
            try:
                denoised = next(steps).denoised
            except StopIteration as stop:
                return stop.value
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            step += 1
            wanted = preview_every and (step - before) % preview_every == 0
            preview = look(denoised) if wanted else None
            tell(Progress("denoise", step, count, preview=preview, seconds=seconds))
            started = time.perf_counter()

    return run


def shown_pieces(pieces: Iterator[Tensor]) -> Iterator[NDArray[np.uint8]]:
    """Yield uint8 (T, H, W, 3) of pieces (1, 3, T, H, W) about [-1, 1], made as they are asked."""
    while True:
        with torch.inference_mode():  # not across a yield: it would leak to the caller
            piece = next(pieces, None)
            if piece is None:
                return
            frames = signed_to_uint8(piece[0])
        yield frames
