"""Parts of a request that all denoising families share: prompts, known frames, steps, decoding.

Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, E its width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import InputError
from worldline.family import Compute, Opened, Parts
from worldline.guards import rewrites
from worldline.memory import Stage, denoise_bytes
from worldline.nn.attention import backend_name
from worldline.nn.dit import PATCH
from worldline.report import Recorder, log_result
from worldline.request import VideoRequest
from worldline.sampling.solvers import Stepped, standard_noise
from worldline.shapes import LatentShape, VideoShape, latent_frames_of, nearest_frames
from worldline.step import Step
from worldline.video.convert import signed_to_uint8
from worldline.video.read import Clip

Result = TypeVar("Result")
Frames = NDArray[np.uint8]  # (T, H, W, 3)
Preview = Callable[[Tensor], Frames]  # of latents (1, C, T, H, W)
STEP_SECONDS = "seconds_of_steps"  # fact of a recorder, and entry of a report


def read_prompts(opened: Opened, request: VideoRequest) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embeddings, float32 (1, S, E), and texts to encode, by "prompt" and "negative_prompt".

    Without guidance the negative prompt is in neither.
    """
    config = opened["transformer"].config
    embeddings: dict[str, Tensor] = {}
    sources = (request.prompt_embeddings, request.negative_prompt_embeddings)
    if any(source is not None for source in sources):
        from worldline.text.embeddings import read_embeddings

        rows = opened.text_length if config.zero_padded else None
        embeddings = read_embeddings(*sources, width=config.text_width, rows=rows)
    texts = {"prompt": request.prompt}
    if not request.guidance:
        embeddings.pop("negative_prompt", None)
    elif request.negative_prompt or not config.zero_padded:
        # where zeros were never learnt, an absent prompt is an empty one
        texts["negative_prompt"] = request.negative_prompt or ""
    missing = {name: text for name, text in texts.items() if name not in embeddings}
    return embeddings, {name: text for name, text in missing.items() if text is not None}


def check_prompts(opened: Opened, request: VideoRequest) -> None:
    """Refuse a request that has no prompt, or needs a text encoder that is missing."""
    embeddings, texts = read_prompts(opened, request)
    if "prompt" not in embeddings | texts and not rewrites(opened, request):
        raise InputError("there is no prompt; give prompt or prompt_embeddings")
    if texts or "prompt" not in embeddings:  # which is going to be written
        opened.require("text", " and ".join(texts) or "prompt")


def unused(opened: Opened, request: VideoRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    found = request.unused()
    if request.prompt_embeddings is not None and not read_prompts(opened, request)[1]:
        found |= opened.encoder_unused
    return found


def check_size(
    opened: Opened, video: VideoShape, num_input_frames: int, longest: int | None = None
) -> None:
    """Refuse a size that cannot be denoised at once, with the nearest that can.

    `longest` counts latent frames; None is as many as the transformer has positions for.
    """
    most, tokenizer = opened["transformer"].config.max_grid, opened["tokenizer"].config
    temporal, step = tokenizer.temporal, PATCH[1] * tokenizer.spatial
    last = 1 + ((longest or most.frames) - 1) * temporal
    # one with frames to make, so that what is suggested is not refused next
    least = 1 + latent_frames_of(num_input_frames, temporal) * temporal
    nearest = min(last, max(least, nearest_frames(video.frames, temporal)))
    rule = f"1 + {temporal}k, at most {last} and more than num_input_frames ({num_input_frames})"
    sizes = [("num_video_frames", video.frames, nearest, rule)]
    for name, tokens in (("height", most.height), ("width", most.width)):
        pixels = getattr(video, name)
        nearest = min(max(round(pixels / step), 1), tokens) * step
        sizes.append((name, pixels, nearest, f"a multiple of {step} and at most {tokens * step}"))
    wrong = [
        f"{name} is {value}; it must be {rule}: the nearest is {nearest}"
        for name, value, nearest, rule in sizes
        if value != nearest
    ]
    if wrong:
        raise InputError("; ".join(wrong))


def grid_of(opened: Opened, video: VideoShape) -> LatentShape:
    tokenizer = opened["tokenizer"].config
    return video.latent(tokenizer.temporal, tokenizer.spatial)


def stages(
    opened: Opened,
    request: VideoRequest,
    compute: Compute,
    video: VideoShape,
    coding: tuple[int, int],
    features: int = 0,
) -> Iterator[Stage]:
    """Memory beside the weights, for a video denoised at once.

    `coding` is bytes that the tokenizer needs to encode the known frames, and to decode; `features`
    is bytes of the prompts' embeddings.
    """
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20 + features)
    yield Stage("encode", "tokenizer", coding[0])
    config, grid = opened["transformer"].config, grid_of(opened, video)
    denoising = denoise_bytes(config, grid, compute.dtype, opened.text_length, fused=compute.fused)
    yield Stage("denoise", "transformer", features + denoising)
    yield Stage("decode", "tokenizer", coding[1])


def attention_entries(parts: Parts, video: VideoShape) -> dict[str, Any]:
    """Report entries of the transformer's tokens and attention, for a video denoised at once."""
    tokens = parts.config.tokens(grid_of(parts.opened, video)).tokens
    attention = backend_name(parts.device, parts.compute.dtype, tokens)
    return {"tokens": tokens, "attention": attention}


@contextmanager
def stage(recorder: Recorder, name: str) -> Iterator[None]:
    """Record a stage, whose peak does not count unused memory that earlier stages cached."""
    if recorder.device.type == "cuda":
        torch.cuda.empty_cache()
    with recorder.stage(name):
        yield


def encode_prompts(
    parts: Parts, request: VideoRequest, recorder: Recorder
) -> Generator[Step, None, tuple[Tensor, Tensor | None]]:
    """Embeddings (1, S, E) of prompt and negative prompt; None for an absent negative one."""
    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        embeddings, texts = read_prompts(parts.opened, request)
        if texts:
            encoder = parts.loaded["text"]
            encoded = encoder.embed([*texts.values()])
            embeddings |= {name: encoded[text] for name, text in texts.items()}
            recorder.facts["prompt_truncation"] = encoder.truncations(texts)
        log_result("text", embeddings["prompt"])
        return embeddings["prompt"], embeddings.get("negative_prompt")


def encode_inputs(
    parts: Parts,
    clip: Clip | None,
    request: VideoRequest,
    recorder: Recorder,
    encode_frames: Callable[[Parts, Any, Any], Tensor],  # called with the tokenizer on its device
) -> Generator[Step, None, tuple[Tensor | None, Preview | None]]:
    """Latents (1, C, t, H, W) of the known frames, and what makes previews, where there are any."""
    known = preview = None
    if request.num_input_frames or request.preview_every:
        yield Step("encode", 0, 1)
        with stage(recorder, "encode"), parts.tokenizer.on_device():
            if request.num_input_frames:
                known = encode_frames(parts, clip, request)
                log_result("encode", known)
            if request.preview_every:
                spatial = parts.opened["tokenizer"].config.spatial
                preview = partial(preview_frames, colours=parts.colours, spatial=spatial)
    return known, preview


def draw_noise(parts: Parts, seed: int, grid: LatentShape) -> Tensor:
    """Noise that sampling starts from, float32 (1, C, T, H, W)."""
    shape = (1, parts.config.latent_channels, *astuple(grid))
    return standard_noise(seed, shape).to(parts.device)


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
    contexts = [None if x is None else model.encode_context(x) for x in (negative, prompt)]

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
    preview_every: int = 0,
    preview: Preview | None = None,
) -> Generator[Step, None, Result]:
    """Result of a sampler, with a `Step` before the first and after each of its steps.

    `total` is steps of the whole request, `before` those of earlier samplers. The recorder receives
    the seconds of each step.
    """
    seconds = recorder.facts.setdefault(STEP_SECONDS, [])
    done = before
    yield Step("denoise", done, total)
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
        done += 1
        due = preview_every and (done - before) % preview_every == 0
        look = preview(denoised.float()) if preview and due else None
        yield Step("denoise", done, total, preview=look)


def preview_frames(latents: Tensor, colours: Tensor, spatial: int) -> Frames:
    """Rough colours of latents, uint8 (T, h, w, 3), at a quarter of the video's size or more.

    The latents (1, C, T, H, W) are as the tokenizer gives them, `colours` of `fit_colours`.
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
    count: int | None = None,
) -> Generator[Step, None, int]:
    """Write a video into `frames`, from frame `made` on, as it is decoded; the number made then.

    Args:
        pieces: of the video, (1, 3, T, H, W) in about [-1, 1]; asked for no further than needed.
        frames: all frames of the request.
        made: number of frames that are there.
        first: first frame of the pieces that is kept.
        count: number of those that are kept; None keeps all.
    """
    end = len(frames) if count is None else made + count
    for piece in pieces:
        new = signed_to_uint8(piece[0])[first : first + end - made]
        first = max(0, first - piece.shape[2])
        if len(new):
            frames[made : made + len(new)] = new
            made += len(new)
            yield Step("decode", made, len(frames), new)
        if made == end:
            break
    log_result("decode", torch.from_numpy(frames[:made, ::8, ::8].copy()))  # some pixels
    return made
