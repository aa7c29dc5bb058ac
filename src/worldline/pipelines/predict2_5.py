"""Prompt, image or clip -> latents -> a flow from noise to data -> video: Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py` and
`_src/predict2/models/{text,video}2world_model_rectified_flow.py`.
Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, F its features.

Rounding: networks compute in the dtype of their weights, the tokenizer's input and latents too;
latents between the networks, the velocity, the sampler's state and colours are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.choices import MAX_SEED
from worldline.errors import CheckpointError, InputError
from worldline.loading.predict2_5 import FlowFiles, FlowParts
from worldline.nn.dit import Context
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.pipelines.exchange import (
    Embeddings,
    Progress,
    check_size,
    on_thread,
    shown_pieces,
    stage,
    step_teller,
    with_defaults,
)
from worldline.pipelines.preview import show_colours
from worldline.pipelines.prompts import TRUNCATION, GivenEmbedding, read_both
from worldline.pipelines.requests import FlowRequest
from worldline.report import Recorder
from worldline.sampling.flow import Given, make_schedule, sample
from worldline.sampling.noise import standard_noise
from worldline.shapes import VideoShape, latent_frames_of
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.video.convert import covering_frames
from worldline.video.read import Clip

TRAINED_FRAMES = 93
TRAINED_FPS = 16
# height x width, of the resolution "720"
TRAINED_SIZES = ((960, 960), (704, 960), (960, 704), (704, 1280), (1280, 704))


def make_request(files: FlowFiles, **options: Any) -> FlowRequest:
    """Return a request; what `options` leave out is as the world has it by default.

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
    most = config.max_grid.frames * config.patch[0]
    window = window_of(files, request)
    if request.chunk_size is not None and request.chunk_size > window.frames:
        raise InputError(
            f"chunk_size is {request.chunk_size}; it must be at most {window.frames}, what the "
            "world makes at once"
        )
    alone = replace(request, num_video_frames=window.frames, chunk_size=None, chunk_overlap=1)
    longer = "chunk_size makes longer videos" if request.chunk_size is None else ""
    check_size(alone, config, most, tokenizer.temporal, tokenizer.spatial, longer=longer)
    given = request.num_input_frames
    if given and (given - 1) % tokenizer.temporal:
        raise InputError(f"num_input_frames is {given}; it must be 0 or 1 + {tokenizer.temporal}k")


@dataclass(frozen=True)
class Window:
    """A stretch of a video that is denoised at once.

    Attributes:
        request: of this stretch alone.
        first: of its frames that is kept; those before are the end of the stretch before.
        last: the one behind the last that is kept.
    """

    request: FlowRequest
    first: int
    last: int

    def cut(self, pieces: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """Yield what is kept of the frames; what comes behind is not even decoded."""
        start = 0
        for piece in pieces:
            kept = piece[max(self.first - start, 0) : self.last - start]
            start += len(piece)
            if len(kept):
                yield kept
            if start >= self.last:
                return


def window_of(files: FlowFiles, request: FlowRequest) -> VideoShape:
    """Return the size of what is denoised at once.

    For a long video that is as many frames as the world makes unless told otherwise: those behind a
    chunk are made and left out, as in the reference, for the models know this length alone.
    """
    if request.chunk_size is None:
        return request.video
    return replace(request.video, frames=files.defaults.num_video_frames)


def cut_windows(files: FlowFiles, request: FlowRequest) -> list[Window]:
    """Return the windows of a request: one, or those of the chunks of a long video.

    A chunk goes on from the last frames of the one before. The reference takes their number for one
    of latent frames, so that it gives more frames than it has made unless the number is 1.
    """
    frames, size = request.num_video_frames, request.chunk_size
    if size is None:
        return [Window(request, 0, frames)]
    overlap = request.chunk_overlap
    found = []
    for number in range(1 + max(0, ceil((frames - size) / (size - overlap)))):
        start = number * (size - overlap)
        own = replace(
            request,
            num_video_frames=window_of(files, request).frames,
            num_input_frames=overlap if number else request.num_input_frames,
            seed=(request.seed + number) % (MAX_SEED + 1),
            chunk_size=None,
            chunk_overlap=1,
        )
        found.append(Window(own, overlap if number else 0, min(size, frames - start)))
    return found


def check_text(
    files: FlowFiles, request: FlowRequest, embeddings: Embeddings | None = None
) -> None:
    """Refuse a request whose words cannot become embeddings, or embeddings of another encoder.

    Args:
        files: of the world.
        request: what is wanted.
        embeddings: given in place of prompts.

    Raises:
        InputError: there is no prompt, or an embedding does not fit.
        CheckpointError: there is no text encoder, and one is needed.
    """
    given = embeddings or Embeddings()
    if request.prompt is None and given.prompt is None:
        raise InputError("no prompt; give one, or its embedding")
    width = files.config.feature_width
    for name, tensor in (("prompt", given.prompt), ("negative_prompt", given.negative)):
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
    needed = to_encode(request, given)
    if needed and files.text is None:
        raise CheckpointError(
            f"{files.why_no_text}; text_encoder_dir names another (needed for: {', '.join(needed)})"
        )


def read_embeddings(
    prompt: GivenEmbedding | None, negative: GivenEmbedding | None = None
) -> Embeddings:
    """Return the embeddings that a caller gives; `check_text` says whether they fit.

    Args:
        prompt: (S, F) or (1, S, F), or a file of it and perhaps of the negative prompt's: see
            `worldline.text.embeddings.read_embeddings`. Rows are taken as they are: of the released
            encoder there are 512, padding among them.
        negative: likewise, of the negative prompt.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    found = {name: tensor for name, (tensor, _) in read_both(prompt, negative).items()}
    return Embeddings(found.get("prompt"), found.get("negative_prompt"))


def to_encode(request: FlowRequest, given: Embeddings) -> dict[str, str]:
    """Return the prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    wanted: dict[str, str] = {}
    if given.prompt is None and request.prompt is not None:
        wanted["prompt"] = request.prompt
    if request.guidance and given.negative is None:
        # no words are words too: zeros, which no text gives, were never learnt
        wanted["negative_prompt"] = request.negative_prompt or ""
    return wanted


def notes(files: FlowFiles, request: FlowRequest) -> list[str]:
    """Return what is worth saying of a request that is allowed."""
    if files.bundled:
        return []
    said = []
    frames = window_of(files, request).frames
    if frames not in (1, TRAINED_FRAMES):
        said.append(
            f"{frames} frames at once; the released models were trained on {TRAINED_FRAMES}"
        )
    if (request.height, request.width) not in TRAINED_SIZES:
        known = ", ".join(f"{height} x {width}" for height, width in TRAINED_SIZES)
        said.append(
            f"{request.height} x {request.width} pixels (height x width); the released models were "
            f"trained on {known}"
        )
    if request.fps != TRAINED_FPS:
        said.append(
            f"fps is {request.fps:g}; the released models move at {TRAINED_FPS}, whatever a file "
            "says"
        )
    return said


def count_steps(files: FlowFiles, request: FlowRequest) -> int:
    """Return how many times the velocity is evaluated; of the schedule "karras" one step more."""
    return len(make_schedule(files.rules.schedule, request.num_steps).timesteps)


def generate(
    parts: FlowParts,
    clip: Clip | None,
    request: FlowRequest,
    recorder: Recorder,
    embeddings: Embeddings | None = None,
) -> Iterator[Progress]:
    """Make a video; yield progress, at last with all its frames.

    The given frames in the result are the tokenizer's reconstruction of the input, with the trace
    of noise that the sampler leaves in them, as in the reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None for none.
        request: how.
        recorder: is told seconds and memory of each stage.
        embeddings: in place of prompts, (S, F) or (1, S, F).

    Raises:
        InputError: the world cannot do this, or the clip is too short.
    """
    files = parts.files
    check_request(files, request)
    check_text(files, request, embeddings)
    windows = cut_windows(files, request)

    yield Progress("text", 0, 1)
    with stage(recorder, "text"):
        words = _embed(parts, request, embeddings or Embeddings(), recorder)

    steps = count_steps(files, request)
    total = steps * len(windows)
    # all at once, as long as they are: to join pieces would hold a long video twice
    frames = np.empty((request.num_video_frames, request.height, request.width, 3), np.uint8)
    made = 0
    for number, window in enumerate(windows):
        latents = yield from _make_latents(
            parts, clip, window.request, recorder, words, number * steps, total
        )
        yield Progress("decode", made, request.num_video_frames)
        with stage(recorder, "decode"), parts.tokenizer.on_device() as tokenizer:
            for piece in window.cut(shown_pieces(decode_stream(tokenizer, latents))):
                frames[made : made + len(piece)] = piece
                made += len(piece)
                yield Progress("decode", made, request.num_video_frames, piece)
        if number + 1 < len(windows):
            given = windows[number + 1].request.num_input_frames
            clip = Clip(frames[made - given : made], request.fps)
    yield Progress("done", total, total, frames)


def _make_latents(
    parts: FlowParts,
    clip: Clip | None,
    request: FlowRequest,
    recorder: Recorder,
    words: tuple[Tensor, Tensor | None],
    before: int,
    total: int,
) -> Generator[Progress, None, Tensor]:
    """Encode what is given of a window and denoise the rest; return its latents."""
    known = colours = None
    if request.num_input_frames or request.preview_every:
        yield Progress("encode", 0, 1)
        encoding = stage(recorder, "encode")
        with encoding, torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
            if request.num_input_frames:
                known = encode_given(tokenizer, clip, request)
            if request.preview_every:
                colours = parts.colours

    with stage(recorder, "denoise"):
        yield Progress("denoise", before, total)

        def denoise(tell: Callable[[Progress], None]) -> Tensor:
            return _denoise(parts, request, *words, known, colours, tell, before, total)

        return (yield from on_thread(denoise, parts.device))


def _embed(
    parts: FlowParts,
    request: FlowRequest,
    given: Embeddings,
    recorder: Recorder,
) -> tuple[Tensor, Tensor | None]:
    """Return the embedding of the prompt and of what guidance leads away from, (1, S, F).

    The second is None where there is no guidance.
    """
    wanted = to_encode(request, given)
    found: dict[str, Tensor] = {}
    if wanted and parts.text is not None:  # else told by `check_text`
        found = parts.text.embed(list(wanted.values()))
        recorder.facts[TRUNCATION] = parts.text.truncations(wanted)
    prompt = given.prompt if given.prompt is not None else found[wanted["prompt"]]
    if not request.guidance:
        return _batched(prompt), None
    negative = given.negative
    if negative is None:
        negative = found[wanted["negative_prompt"]]
    return _batched(prompt), _batched(negative)


def _batched(embedding: Tensor) -> Tensor:
    return embedding if embedding.ndim == 3 else embedding[None]


def encode_given(tokenizer: WanTokenizer, clip: Clip | None, request: FlowRequest) -> Tensor:
    """Return the given frames as latents (1, C, t, H, W), float32.

    The tokenizer is causal: frames behind the given ones, with which the reference fills the clip,
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


def _denoise(
    parts: FlowParts,
    request: FlowRequest,
    prompt: Tensor,
    negative: Tensor | None,
    known: Tensor | None,
    colours: Tensor | None,
    tell: Callable[[Progress], None],
    before: int,
    total: int,
) -> Tensor:
    """Return the latents of a window, float32 (1, C, T, H, W)."""
    files, device = parts.files, parts.device
    rules, temporal = files.rules, files.tokenizer_config.temporal
    grid = request.video.latent(temporal, files.tokenizer_config.spatial)
    shape = (1, parts.config.latent_channels, grid.frames, grid.height, grid.width)
    noise = standard_noise(request.seed, shape).to(device)
    count = latent_frames_of(request.num_input_frames, temporal)
    given = None if known is None else Given(known, count, rules.known_timestep)
    mask = torch.zeros(1, 1, *shape[2:], device=device)
    mask[:, :, :count] = 1

    def look(denoised: Tensor) -> NDArray[np.uint8] | None:
        if colours is None:
            return None
        return show_colours(denoised.float(), colours, files.tokenizer_config.spatial)

    with torch.inference_mode(), parts.transformer.on_device() as transformer:
        positions = transformer.make_positions(grid)
        # once for all steps: the text does not change, and is by far the widest input
        contexts: dict[bool, Context] = {
            conditional: transformer.encode_context(embedding)
            for conditional, embedding in ((True, prompt), (False, negative))
            if embedding is not None
        }

        def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
            return transformer(x, times, contexts[conditional], positions, condition_mask=mask)

        on_step = step_teller(tell, device, total, request.preview_every, look, before)
        return sample(
            network,
            noise,
            schedule=rules.schedule,
            num_steps=request.num_steps,
            guidance=request.guidance,
            given=given,
            on_step=on_step,
        )
