"""Prompt, image or clip -> latents -> a flow from noise to data -> video: Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py` and
`_src/predict2/models/{text,video}2world_model_rectified_flow.py`.
Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, F its features.

Rounding: networks compute in the dtype of their weights, the tokenizer's input and latents too;
latents between the networks, the velocity, the sampler's state and colours are float32.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldline.choices import MAX_SEED
from worldline.errors import InputError
from worldline.loading.predict2_5 import FlowFiles, FlowParts
from worldline.pipelines.checks import check_prompts, check_size, with_defaults
from worldline.pipelines.denoise import (
    Embeddings,
    condition_mask,
    conditioned,
    decode,
    encode_inputs,
    encode_prompts,
    log_result,
    report,
    stage,
)
from worldline.pipelines.prompts import GivenEmbedding, read_both
from worldline.pipelines.requests import FlowRequest
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.sampling.flow import Conditioning, make_schedule, sample
from worldline.sampling.schedules import standard_noise
from worldline.shapes import VideoShape
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.tokenizers.wan.stream import decode_stream, encode_stream
from worldline.video.convert import covering_frames
from worldline.video.read import Clip

TRAINED_FRAMES = 93
TRAINED_FPS = 16
# height x width, of the resolution "720"
TRAINED_SIZES = ((960, 960), (704, 960), (960, 704), (704, 1280), (1280, 704))


@torch.inference_mode()
def generate(
    parts: FlowParts,
    clip: Clip | None,
    request: FlowRequest,
    recorder: Recorder,
    embeddings: Embeddings | None = None,
) -> Iterator[Step]:
    """Prompt, image or clip -> video; the last step holds all its frames.

    The known frames in the result are the tokenizer's reconstruction of the input, with the trace
    of noise that the sampler leaves in them, as in the reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None where these are 0.
        request: one that `check_request` and `check_text` accept.
        recorder: receives seconds and memory of each stage.
        embeddings: in place of prompts, (S, F) or (1, S, F).

    Raises:
        InputError: the clip is absent or too short.
    """
    embeddings, windows = embeddings or Embeddings(), cut_windows(parts.files, request)

    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        context = encode_prompts(parts.text, to_encode(request, embeddings), embeddings, recorder)

    count = count_steps(parts.files, request) * len(windows)
    # all at once, as long as they are: to join pieces would hold a long video twice
    frames = np.empty((request.num_video_frames, request.height, request.width, 3), np.uint8)
    made = 0
    for window in windows:  # one, or the chunks of a long video
        if made:
            clip = Clip(frames[made - window.request.num_input_frames : made], request.fps)
        latents = yield from denoise_window(parts, clip, window, recorder, context, count)
        yield Step("decode", made, len(frames))
        with stage(recorder, "decode"), parts.tokenizer.on_device() as tokenizer:
            pieces = decode_stream(tokenizer, latents)
            made = yield from decode(pieces, frames, made, first=window.first, last=window.last)
    yield Step("done", count, count, frames)


def denoise_window(
    parts: FlowParts,
    clip: Clip | None,
    window: Window,
    recorder: Recorder,
    context: tuple[Tensor, Tensor | None],
    count: int,
) -> Generator[Step, None, Tensor]:
    """Latents of a window, float32 (1, C, T, H, W).

    Args:
        parts: the networks.
        clip: ends with the known frames.
        window: the window.
        recorder: receives seconds and memory.
        context: embeddings of prompt and negative prompt.
        count: steps of all windows.
    """
    files, request = parts.files, window.request
    rules, tokenizer = files.rules, files.tokenizer_config
    grid = request.video.latent(tokenizer.temporal, tokenizer.spatial)
    known, preview = yield from encode_inputs(
        parts, request, recorder, lambda coder: encode_frames(coder, clip, request)
    )

    with stage(recorder, "denoise"), parts.transformer.on_device() as model:
        shape = (1, parts.config.latent_channels, grid.frames, grid.height, grid.width)
        noise = standard_noise(request.seed, shape).to(parts.device)
        mask, positions = condition_mask(noise, known), model.make_positions(grid)
        steps = sample(
            conditioned(model, *context, positions, mask),
            noise,
            make_schedule(rules.schedule, request.num_steps),
            guidance=request.guidance,
            conditioning=None if known is None else Conditioning(known, rules.known_timestep),
        )
        latents = yield from report(
            steps,
            recorder,
            count,
            before=window.number * count_steps(files, request),
            preview_every=request.preview_every,
            preview=preview,
        )
        log_result("denoise", latents)
        return latents


def encode_frames(tokenizer: WanTokenizer, clip: Clip | None, request: FlowRequest) -> Tensor:
    """Latents (1, C, t, H, W) of the known frames, float32.

    The tokenizer is causal: frames behind the known ones, with which the reference fills the clip,
    would not change these.

    Raises:
        InputError: there is no clip, or it is too short.
    """
    if clip is None:
        raise InputError(f"no input, but num_input_frames is {request.num_input_frames}")
    frames = covering_frames(clip, request.num_input_frames, request.height, request.width)
    # in the tokenizer's dtype, as in the reference
    video = frames.to(next(tokenizer.parameters())) / 127.5 - 1
    return torch.cat(list(encode_stream(tokenizer, [video])), dim=2).float()


@dataclass(frozen=True)
class Window:
    """Stretch of a video that is denoised at once.

    Attributes:
        number: index of the window.
        request: of this window alone.
        first: first frame that is kept; those before are the end of the previous window.
        last: end of the frames that are kept.
    """

    number: int
    request: FlowRequest
    first: int
    last: int


def window_of(files: FlowFiles, request: FlowRequest) -> VideoShape:
    """Size of what is denoised at once.

    For a long video that is the world's default number of frames: those behind a chunk are made
    and left out, as in the reference, for the models know this length alone.
    """
    if request.chunk_size is None:
        return request.video
    return replace(request.video, frames=files.defaults.num_video_frames)


def cut_windows(files: FlowFiles, request: FlowRequest) -> list[Window]:
    """Windows of a request: one, or those of the chunks of a long video.

    A chunk goes on from the last frames of the one before. The reference takes their number for one
    of latent frames, so that it gives more frames than it has made unless the number is 1.
    """
    frames, size = request.num_video_frames, request.chunk_size
    if size is None:
        return [Window(0, request, 0, frames)]
    overlap = request.chunk_overlap
    windows = []
    for number in range(1 + max(0, ceil((frames - size) / (size - overlap)))):
        start = number * (size - overlap)
        alone = replace(
            request,
            num_video_frames=window_of(files, request).frames,
            num_input_frames=overlap if number else request.num_input_frames,
            seed=(request.seed + number) % (MAX_SEED + 1),
            chunk_size=None,
            chunk_overlap=1,
        )
        first, last = overlap if number else 0, min(size, frames - start)
        windows.append(Window(number, alone, first, last))
    return windows


def make_request(files: FlowFiles, **options: Any) -> FlowRequest:
    """Request of `options`, filled up from the world's defaults.

    Raises:
        InputError: an option is unknown or out of range.
    """
    return with_defaults(FlowRequest, files.defaults, options)


def check_request(files: FlowFiles, request: FlowRequest) -> None:
    """Refuse what a world cannot do; nothing is read for it.

    Raises:
        InputError: it cannot do this.
    """
    tokenizer, config = files.tokenizer_config, files.config
    max_latents = config.max_grid.frames * config.patch[0]
    window = window_of(files, request)
    if request.chunk_size is not None and request.chunk_size > window.frames:
        raise InputError(
            f"chunk_size is {request.chunk_size}; it must be at most {window.frames}, what the "
            "world makes at once"
        )
    alone = replace(request, num_video_frames=window.frames, chunk_size=None, chunk_overlap=1)
    longer = "chunk_size makes longer videos" if request.chunk_size is None else ""
    check_size(alone, config, max_latents, tokenizer.temporal, tokenizer.spatial, longer=longer)
    known = request.num_input_frames
    if known and (known - 1) % tokenizer.temporal:
        raise InputError(f"num_input_frames is {known}; it must be 0 or 1 + {tokenizer.temporal}k")


def check_text(
    files: FlowFiles, request: FlowRequest, embeddings: Embeddings | None = None
) -> None:
    """Refuse a request whose words cannot become embeddings, or embeddings of another encoder.

    Raises:
        InputError: there is no prompt, or an embedding does not fit.
        CheckpointError: there is no text encoder, and one is needed.
    """
    embeddings = embeddings or Embeddings()
    width = files.config.feature_width
    for name, tensor in (("prompt", embeddings.prompt), ("negative_prompt", embeddings.negative)):
        if tensor is None:
            continue
        rows = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
        fits = rows.ndim == 2 and len(rows) > 0 and rows.shape[1] == width
        if not fits or not rows.is_floating_point() or not rows.isfinite().all():
            raise InputError(
                f"the embedding of {name} is {str(tensor.dtype).removeprefix('torch.')} "
                f"{tuple(tensor.shape)}; it must be floating and finite, (S, {width}) or "
                f"(1, S, {width})"
            )
    why_no_text = None if files.text is not None else files.why_no_text
    check_prompts(request, embeddings, to_encode(request, embeddings), why_no_text)


def read_embeddings(
    prompt: GivenEmbedding | None, negative: GivenEmbedding | None = None
) -> Embeddings:
    """Embeddings in place of prompts; `check_text` refuses those that do not fit.

    Args:
        prompt: (S, F) or (1, S, F), or a file of it and perhaps of the negative prompt's: see
            `worldline.text.embeddings.read_embeddings`. Rows are taken as they are: of the released
            encoder there are 512, padding among them.
        negative: the same of the negative prompt.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    tensors = {name: tensor for name, (tensor, _) in read_both(prompt, negative).items()}
    return Embeddings(tensors.get("prompt"), tensors.get("negative_prompt"))


def to_encode(request: FlowRequest, embeddings: Embeddings) -> dict[str, str]:
    """Prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    prompts: dict[str, str] = {}
    if embeddings.prompt is None and request.prompt is not None:
        prompts["prompt"] = request.prompt
    if request.guidance and embeddings.negative is None:
        # no words are words too: zeros, which no text gives, were never learnt
        prompts["negative_prompt"] = request.negative_prompt or ""
    return prompts


def notes(files: FlowFiles, request: FlowRequest) -> list[str]:
    """Remarks on a request that is allowed."""
    if files.bundled:
        return []
    remarks = []
    frames = window_of(files, request).frames
    if frames not in (1, TRAINED_FRAMES):
        remarks.append(
            f"{frames} frames at once; the released models were trained on {TRAINED_FRAMES}"
        )
    if (request.height, request.width) not in TRAINED_SIZES:
        known = ", ".join(f"{height} x {width}" for height, width in TRAINED_SIZES)
        remarks.append(
            f"{request.height} x {request.width} pixels (height x width); the released models were "
            f"trained on {known}"
        )
    if request.fps != TRAINED_FPS:
        remarks.append(
            f"fps is {request.fps:g}; the released models move at {TRAINED_FPS}, whatever the "
            "file's rate"
        )
    return remarks


def count_steps(files: FlowFiles, request: FlowRequest) -> int:
    """Evaluations of the velocity; the schedule "karras" has one more than its steps."""
    return len(make_schedule(files.rules.schedule, request.num_steps).timesteps)
