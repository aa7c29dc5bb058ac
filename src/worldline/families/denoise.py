"""Parts of a request that all denoising families share: prompts, known frames, steps, decoding.

Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, E its width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import InputError
from worldline.family import Parts
from worldline.nn.attention import backend_name
from worldline.nn.dit import PATCH, DiTSizes
from worldline.report import Recorder
from worldline.request import VideoRequest
from worldline.sampling.solvers import Stepped
from worldline.shapes import VideoShape, latent_frames_of, nearest_frames
from worldline.step import Step
from worldline.video.convert import signed_to_uint8

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Frames = NDArray[np.uint8]  # (T, H, W, 3)
Preview = Callable[[Tensor], Frames]  # of latents (1, C, T, H, W)
STEP_SECONDS = "seconds_of_steps"  # fact of a recorder, and entry of a report


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in place of prompts, (1, S, E) or (S, E), floating."""

    prompt: Tensor | None = None
    negative: Tensor | None = None


def read_embeddings(request: Any, width: int, rows: int | None = None) -> Embeddings:
    """Embeddings in place of a request's prompts, checked, float32 (1, S, E) on the CPU.

    Args:
        request: names files or holds tensors; a file may hold the negative prompt's, too.
        width: E.
        rows: S, filled with zeros as behind the end of a prompt; None keeps it.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    values = request.prompt_embeddings, getattr(request, "negative_prompt_embeddings", None)
    if all(value is None for value in values):
        return Embeddings()
    from worldline.text import embeddings as sources

    found = sources.read_embeddings(*values, width=width, rows=rows)
    if "negative_prompt" in found and not hasattr(request, "guidance"):
        _warn_unread(str(request.prompt_embeddings))
    return Embeddings(found.get("prompt"), found.get("negative_prompt"))


@lru_cache
def _warn_unread(path: str) -> None:
    logger.warning("%s: negative_prompt has no effect on this model", path)


def refuse_size(
    video: VideoShape,
    num_input_frames: int,
    config: DiTSizes,
    max_latents: int,
    tokenizer: Any,
    *,
    longer: str = "",
) -> None:
    """Refuse a size that a model cannot make, with all that is wrong with it in one line.

    Args:
        video: the size.
        num_input_frames: frames that are known.
        config: of the transformer.
        max_latents: latent frames of the longest video.
        tokenizer: configuration, with its `temporal` and `spatial` compression.
        longer: what makes longer videos, for the message.

    Raises:
        InputError: the nearest size that can be made is another, or no frame remains to make.
    """
    temporal = tokenizer.temporal
    frames, longest = video.frames, 1 + (max_latents - 1) * temporal
    least = 1 + latent_frames_of(num_input_frames, temporal) * temporal
    wrong = []
    if (frames - 1) % temporal or frames > longest:
        # one with frames to make, so that what is suggested is not refused next
        nearest = min(longest, max(least, nearest_frames(frames, temporal)))
        ways = f" ({longer})" if longer and frames > longest else ""
        wrong.append(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at most {longest}: "
            f"the nearest is {nearest}{ways}"
        )
    elif frames < least:
        wrong.append(
            f"num_video_frames is {frames}, num_input_frames is {num_input_frames}: nothing "
            f"remains to make; give {least} frames or more"
        )
    sides = (
        ("height", video.height, PATCH[1], config.max_grid.height),
        ("width", video.width, PATCH[2], config.max_grid.width),
    )
    for name, pixels, cells, tokens in sides:
        step = cells * tokenizer.spatial
        nearest = min(max(round(pixels / step), 1), tokens) * step
        if nearest != pixels:
            wrong.append(
                f"{name} is {pixels}; it must be a multiple of {step} and at most "
                f"{tokens * step}: the nearest is {nearest}"
            )
    if num_input_frames and (num_input_frames - 1) % temporal:
        wrong.append(f"num_input_frames is {num_input_frames}; it must be 0 or 1 + {temporal}k")
    if wrong:
        raise InputError("; ".join(wrong))


def attention_entries(parts: Parts, video: VideoShape) -> dict[str, Any]:
    """Report entries of the transformer's tokens and attention, for a video denoised at once."""
    tokenizer, config = parts.opened["tokenizer"].config, parts.config
    tokens = config.tokens(video.latent(tokenizer.temporal, tokenizer.spatial)).tokens
    name = backend_name(parts.device, parts.compute.dtype, tokens)
    return {"tokens": tokens, "attention": name}


@contextmanager
def stage(recorder: Recorder, name: str) -> Iterator[None]:
    """Record a stage, whose peak does not count unused memory that earlier stages cached."""
    if recorder.device.type == "cuda":
        torch.cuda.empty_cache()
    with recorder.stage(name):
        yield


def log_result(name: str, x: Tensor) -> None:
    """Log shape, dtype and statistics of a stage's result, with --debug."""
    if logger.isEnabledFor(logging.DEBUG):
        values = x.float()
        numbers = [float(of(values)) for of in (torch.mean, torch.std, torch.min, torch.max)]
        statistics = "mean %.4g, std %.4g, min %.4g, max %.4g"
        dtype = str(x.dtype).removeprefix("torch.")
        logger.debug(f"%s: %s %s, {statistics}", name, tuple(x.shape), dtype, *numbers)


def encode_prompts(
    text: Any | None,
    prompts: Mapping[str, str],
    embeddings: Embeddings,
    recorder: Recorder,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (1, S, E) of prompt and negative prompt; None for an absent negative one.

    Args:
        text: the text encoder; None where there are no prompts to encode.
        prompts: those to encode, by the names "prompt" and "negative_prompt".
        embeddings: in place of the others.
        recorder: receives how prompts were truncated.
    """
    tensors = {"prompt": embeddings.prompt, "negative_prompt": embeddings.negative}
    if prompts:
        assert text is not None
        encoded = text.embed(list(prompts.values()))
        tensors |= {name: encoded[words] for name, words in prompts.items()}
        recorder.facts["prompt_truncation"] = text.truncations(prompts)
    prompt, negative = (
        one[None] if one is not None and one.ndim == 2 else one for one in tensors.values()
    )
    assert prompt is not None
    log_result("text", prompt)
    return prompt, negative


def encode_inputs(
    parts: Parts,
    request: VideoRequest,
    recorder: Recorder,
    encode_frames: Callable[[Any], Tensor],
) -> Generator[Step, None, tuple[Tensor | None, Preview | None]]:
    """Latents of the known frames, and what makes previews; None where a request has none.

    Args:
        parts: the networks.
        request: how many frames are known, and whether there are previews.
        recorder: receives seconds and memory.
        encode_frames: the tokenizer on its device -> latents (1, C, known frames, H, W).
    """
    if not request.num_input_frames and not request.preview_every:
        return None, None
    yield Step("encode", 0, 1)
    with stage(recorder, "encode"), parts.tokenizer.on_device() as tokenizer:
        known = preview = None
        if request.num_input_frames:
            known = encode_frames(tokenizer)
            log_result("encode", known)
        if request.preview_every:
            spatial = parts.opened["tokenizer"].config.spatial
            preview = partial(preview_frames, colours=parts.colours, spatial=spatial)
        return known, preview


def condition_mask(noise: Tensor, known: Tensor | None) -> Tensor:
    """Mask (1, 1, T, H, W) of the latent frames that are known."""
    mask = torch.zeros_like(noise[:1, :1])
    mask[:, :, : 0 if known is None else known.shape[2]] = 1
    return mask


def conditioned(
    model: Any, prompt: Tensor, negative: Tensor | None, positions: Any, mask: Tensor | None
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """Network as samplers call it: (latents, times, branch with the prompt?) -> output.

    The text is encoded once for all steps: it does not change, and is by far the widest input.
    """
    contexts = {
        conditional: model.encode_context(embedding)
        for conditional, embedding in ((True, prompt), (False, negative))
        if embedding is not None
    }

    def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        output: Tensor = model(x, times, contexts[conditional], positions, condition_mask=mask)
        return output

    return network


def report(
    steps: Generator[Stepped, None, Result],
    recorder: Recorder,
    total: int,
    *,
    before: int = 0,
    preview_every: int = 1,
    preview: Preview | None = None,
) -> Generator[Step, None, Result]:
    """Run a sampler, yielding a `Step` before the first and after each of its steps.

    Args:
        steps: the sampler.
        recorder: receives the seconds of each step.
        total: steps of the whole request.
        before: of these, steps before this sampler's.
        preview_every: steps between previews, where there are any.
        preview: makes them of the estimate of the clean latents.

    Returns:
        What the sampler returns.
    """
    seconds = recorder.facts.setdefault(STEP_SECONDS, [])
    made = 0
    yield Step("denoise", before, total)
    while True:
        started = time.perf_counter()
        try:
            denoised = next(steps).denoised
        except StopIteration as stop:
            result: Result = stop.value
            return result
        if recorder.device.type == "cuda":
            torch.cuda.synchronize(recorder.device)
        seconds.append(round(time.perf_counter() - started, 4))
        made += 1
        look = None
        if preview is not None and made % preview_every == 0:
            look = preview(denoised.float())
        yield Step("denoise", before + made, total, preview=look)


def preview_frames(latents: Tensor, colours: Tensor, spatial: int) -> Frames:
    """Rough colours of latents, uint8 (T, h, w, 3), at a quarter of the video's size or more.

    Args:
        latents: (1, C, T, H, W), as the tokenizer gives them.
        colours: see `worldline.nn.pieces.fit_colours`.
        spatial: pixels of a cell on each side.
    """
    maps = colours.to(latents.device)
    chosen = maps[(torch.arange(latents.shape[2], device=latents.device) > 0).long()]  # (T, C+1, 3)
    cells = latents[0].float().permute(1, 2, 3, 0).flatten(1, 2)  # (T, H W, C)
    pixels = cells @ chosen[:, :-1] + chosen[:, -1:]
    pictures = pixels.unflatten(1, latents.shape[-2:]).permute(3, 0, 1, 2)
    times = -(-spatial // 4)
    return signed_to_uint8(pictures).repeat(times, axis=1).repeat(times, axis=2)


def decode(
    pieces: Iterator[Tensor],
    frames: Frames,
    made: int = 0,
    *,
    first: int = 0,
    last: int | None = None,
) -> Generator[Step, None, int]:
    """Write a video into `frames` as it is decoded.

    Args:
        pieces: of the video, (1, 3, T, H, W) in about [-1, 1]; asked for no further than needed.
        frames: all frames of the request; filled from `made` on.
        made: number of frames that are there.
        first: first frame of the pieces that is kept.
        last: end of those that are kept; None keeps all.

    Returns:
        The number of frames that are there now.
    """
    start = 0
    for piece in pieces:
        new = signed_to_uint8(piece[0])[
            max(first - start, 0) : None if last is None else last - start
        ]
        start += piece.shape[2]
        if len(new):
            frames[made : made + len(new)] = new
            made += len(new)
            yield Step("decode", made, len(frames), new)
        if last is not None and start >= last:
            break
    if logger.isEnabledFor(logging.DEBUG):  # of some pixels: all of them as float32 may be large
        log_result("decode", torch.from_numpy(frames[:made, ::8, ::8].copy()))
    return made
