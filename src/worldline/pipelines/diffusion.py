"""Prompt, image or clip -> latents -> denoised latents -> video.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/world_generation_pipeline.py`,
`diffusion/model/model_{t2w,v2w}.py`; NVIDIA/Cosmos, the same below `cosmos1/models/diffusion/`.
Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, E its width.

Rounding: networks compute in the dtype of their weights; pixels until the tokenizer, latents
between the networks, the sampler's state and colours are float32 or wider. As in the released
pipelines, statistics of latents are rounded to the tokenizer's dtype, the network's time is rounded
to the transformer's, and rotary angles are bf16 unless asked otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.loading import DiffusionFiles, DiffusionParts, WorldDefaults
from worldline.models.predict1_dit.model import Context
from worldline.pipelines.background import in_background
from worldline.pipelines.preview import show_colours
from worldline.pipelines.prompts import filled
from worldline.pipelines.requests import DiffusionRequest
from worldline.report import Recorder
from worldline.sampling.edm import SIGMA_DATA, Given, make_sigmas, sample
from worldline.sampling.noise import standard_noise
from worldline.shapes import LatentShape, latent_frames_of, nearest_frames
from worldline.text import embeddings
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.statistics import LatentStatistics
from worldline.tokenizers.cosmos.stream import decode_stream
from worldline.video.convert import signed_to_uint8, stretched_frames
from worldline.video.read import Clip

logger = logging.getLogger(__name__)

SAMPLER_OF = {"1.0": "res_2ab", "Predict1": "edm_euler"}
TRAINED_FPS = (12, 40)


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


def make_request(defaults: WorldDefaults, **options: Any) -> DiffusionRequest:
    """Return a request; what `options` leave out is as the world has it by default.

    Raises:
        InputError: an option is unknown or out of range.
    """
    known = [field.name for field in fields(DiffusionRequest)]
    if unknown := ", ".join(sorted(options.keys() - set(known))):
        raise InputError(f"unknown option {unknown}; there are: {', '.join(known)}")
    own = {
        field.name: getattr(defaults, field.name)
        for field in fields(defaults)
        if field.name in known
    }
    return DiffusionRequest(**{"prompt": None, **own, **options})


def check_request(files: DiffusionFiles, request: DiffusionRequest) -> None:
    """Refuse what a world cannot do; nothing is read for it.

    Raises:
        InputError: it cannot do this.
    """
    _check_kind(files, request)
    _check_size(files, request)
    if request.sampler == "res_2mid" and request.num_steps < 2:
        raise InputError("num_steps is 1; the sampler res_2mid needs 2 or more")
    if request.reinsertion == "march_2025" and sampler_of(files, request) != "edm_euler":
        raise InputError(
            f"reinsertion march_2025 is a fault of the sampler edm_euler; "
            f"{sampler_of(files, request)} never had it"
        )


def check_text(
    files: DiffusionFiles, request: DiffusionRequest, embeddings: Embeddings | None = None
) -> None:
    """Refuse a request whose words cannot become embeddings.

    Args:
        files: of the world.
        request: what is wanted.
        embeddings: given in place of prompts.

    Raises:
        InputError: there is no prompt.
        CheckpointError: there is no text encoder, and one is needed.
    """
    given = embeddings or Embeddings()
    if request.prompt is None and given.prompt is None:
        raise InputError("no prompt; give one, or prompt_embeddings")
    needed = to_encode(request, given)
    if not needed or files.text is not None:
        return
    if given.prompt is None:
        ways = "or give prompt_embeddings"
    else:
        ways = "or give negative_prompt_embeddings, or an empty negative_prompt, or guidance 0"
    raise CheckpointError(
        f"{files.why_no_text}; text_encoder_dir names another; {ways} "
        f"(needed for: {', '.join(needed)})"
    )


def to_encode(request: DiffusionRequest, given: Embeddings) -> dict[str, str]:
    """Return the prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    wanted: dict[str, str] = {}
    if given.prompt is None and request.prompt is not None:
        wanted["prompt"] = request.prompt
    if request.guidance and given.negative is None and request.negative_prompt:
        wanted["negative_prompt"] = request.negative_prompt
    return wanted


def _check_kind(files: DiffusionFiles, request: DiffusionRequest) -> None:
    if request.num_input_frames and not files.config.condition_mask:
        raise InputError(
            f"{files.folder} is a Text2World model, which continues no input; "
            "use a Video2World model (worldline diffusion video2world)"
        )
    if not request.num_input_frames and not files.defaults.text2world:
        raise InputError(
            f"{files.folder} is a Video2World model, which needs an image or a video to continue; "
            "for a prompt alone use a Text2World model (worldline diffusion text2world)"
        )


def _check_size(files: DiffusionFiles, request: DiffusionRequest) -> None:
    """Refuse a size that the model cannot make, with all that is wrong with it in one line."""
    tokenizer, config = files.tokenizer_config, files.config
    frames, temporal = request.num_video_frames, tokenizer.temporal
    given = request.num_input_frames
    least = 1 + latent_frames_of(given, temporal) * temporal
    latent_frames = min(files.statistics.frames, config.max_grid.frames * config.patch[0])
    most = 1 + (latent_frames - 1) * temporal
    wrong = []
    if (frames - 1) % temporal or frames > most:
        # one with something left to make, so that what is suggested is not refused next
        nearest = min(most, max(least, nearest_frames(frames, temporal)))
        wrong.append(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at most {most}: "
            f"the nearest is {nearest}"
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
        step = cells * tokenizer.spatial
        nearest = min(max(round(pixels / step), 1), tokens) * step
        if nearest != pixels:
            wrong.append(
                f"{name} is {pixels}; it must be a multiple of {step} and at most "
                f"{tokens * step}: the nearest is {nearest}"
            )
    if wrong:
        raise InputError("; ".join(wrong))


def notes(files: DiffusionFiles, request: DiffusionRequest) -> list[str]:
    """Return what is worth saying of a request that is allowed."""
    said = []
    least, most = TRAINED_FPS
    if not files.bundled and not least <= request.fps <= most:
        said.append(f"fps is {request.fps:g}; the released models know {least} to {most}")
    return said


def sampler_of(files: DiffusionFiles, request: DiffusionRequest) -> str:
    """Return the sampler of a request, by the model's generation if it names none."""
    return request.sampler or SAMPLER_OF[files.generation]


def _count_steps(files: DiffusionFiles, request: DiffusionRequest) -> int:
    return len(make_sigmas(sampler_of(files, request), request.num_steps)) - 1


def rotary_precision_of(files: DiffusionFiles, request: DiffusionRequest) -> str:
    """Return in what the angles of position are computed."""
    return request.rotary_precision or files.defaults.rotary_precision


def read_embeddings(
    files: DiffusionFiles,
    prompt: str | Path | Tensor | NDArray[Any] | None,
    negative: str | Path | Tensor | NDArray[Any] | None = None,
) -> Embeddings:
    """Return the embeddings that a caller gives, checked, with as many rows as the world takes.

    Args:
        files: of the world.
        prompt: (S, E) or (1, S, E), or a file of it and perhaps of the negative prompt's: see
            `worldline.text.embeddings.read_embeddings`. Rows that are missing are zeros, as those
            behind the end of a prompt are.
        negative: likewise, of the negative prompt.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    found: dict[str, tuple[Tensor, str]] = {}  # and what an error calls it
    for name, given in (("negative_prompt", negative), ("prompt", prompt)):
        if given is None:
            continue
        if isinstance(given, (str, Path)):
            read = embeddings.read_embeddings(Path(given))
            if name == "negative_prompt":  # a file of its own may call it "prompt" all the same
                read = {name: read.get(name, read["prompt"])}
            called = f"{name}_embeddings {given}"
            found = {**{kind: (tensor, called) for kind, tensor in read.items()}, **found}
        elif isinstance(given, (Tensor, np.ndarray)):
            found[name] = (torch.as_tensor(given), f"{name}_embeddings")
        else:
            raise InputError(
                f"{name}_embeddings is a {type(given).__name__}; give a file or tensor"
            )
    rows, width = files.context_length, files.config.context_width
    whole = {name: filled(tensor, rows, width, called) for name, (tensor, called) in found.items()}
    return Embeddings(whole.get("prompt"), whole.get("negative_prompt"))


def generate(
    parts: DiffusionParts,
    clip: Clip | None,
    request: DiffusionRequest,
    recorder: Recorder,
    embeddings: Embeddings | None = None,
) -> Iterator[Progress]:
    """Make a video; yield progress, at last with all its frames.

    The given frames in the result are the tokenizer's reconstruction of the input, as in the
    reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None for none.
        request: how.
        recorder: is told seconds and memory of each stage.
        embeddings: in place of prompts, of `read_embeddings`.

    Raises:
        InputError: the world cannot do this, or the clip is too short.
    """
    files, device = parts.files, parts.device
    check_request(files, request)
    check_text(files, request, embeddings)
    grid = request.video.latent(files.tokenizer_config.temporal, files.tokenizer_config.spatial)

    yield Progress("text", 0, 1)
    with separate_stage(recorder, "text"):
        prompt, negative = _embed(parts, request, embeddings or Embeddings())

    known = colours = None
    if request.num_input_frames or request.preview_every:
        yield Progress("encode", 0, 1)
        stage = separate_stage(recorder, "encode")
        with stage, torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
            if request.num_input_frames:
                known = _encode(tokenizer, files.statistics, clip, request)
            if request.preview_every:
                colours = parts.colours

    count = _count_steps(files, request)
    with separate_stage(recorder, "denoise"):
        yield Progress("denoise", 0, count)

        # a thread begins on the first GPU, whatever this one is on
        gpu = torch.cuda.current_device() if device.type == "cuda" else None
        if device.index is not None:
            gpu = device.index

        def denoise(tell: Callable[[Progress], None]) -> Tensor:
            with torch.cuda.device(gpu) if device.type == "cuda" else nullcontext():
                return _denoise(parts, request, grid, prompt, negative, known, colours, tell)

        latents = yield from in_background(denoise)

    frames: list[NDArray[np.uint8]] = []
    yield Progress("decode", 0, request.num_video_frames)
    with separate_stage(recorder, "decode"):
        for piece in _decode(parts, latents):
            frames.append(piece)
            done = sum(map(len, frames))
            yield Progress("decode", done, request.num_video_frames, piece)
    yield Progress("done", count, count, np.concatenate(frames))


@contextmanager
def separate_stage(recorder: Recorder, name: str) -> Iterator[None]:
    """Record a stage, whose peak is not to count what an earlier one has left to be used again."""
    if recorder.device.type == "cuda":
        torch.cuda.empty_cache()
    with recorder.stage(name):
        yield


def _embed(
    parts: DiffusionParts, request: DiffusionRequest, given: Embeddings
) -> tuple[Tensor, Tensor | None]:
    """Return the embedding of the prompt and of what guidance leads away from, (1, S, E).

    The second is None where there is no guidance, or none that would do anything.
    """
    wanted = to_encode(request, given)
    found: Mapping[str, Tensor] = {}
    if wanted and parts.text is not None:  # else told by `check_text`
        found = parts.text.embed(list(wanted.values()))
    prompt = given.prompt if given.prompt is not None else found[wanted["prompt"]]
    if not request.guidance:
        return prompt, None
    if given.negative is not None:
        return prompt, given.negative
    if "negative_prompt" in wanted:
        return prompt, found[wanted["negative_prompt"]]
    if not request.num_input_frames or parts.files.defaults.text2world:
        return prompt, torch.zeros_like(prompt)
    logger.warning(
        "without a negative prompt, guidance does nothing: as in the released code, a continued "
        "clip is then led away from its own prompt"
    )
    return prompt, None


def _encode(
    tokenizer: CosmosTokenizer,
    statistics: LatentStatistics,
    clip: Clip | None,
    request: DiffusionRequest,
) -> Tensor:
    """Return the given frames as normalised latents (1, C, t, H, W), float32."""
    if clip is None:
        raise InputError(f"no input, but num_input_frames is {request.num_input_frames}")
    # the tokenizer is causal: frames behind the given ones would not change their latents
    frames = stretched_frames(clip, request.num_input_frames, request.height, request.width)
    weight = tokenizer.quant_conv.weight
    latents = tokenizer.encode(frames.to(weight))
    # the statistics of a clip's first frame, not those of an image
    of_clip = rounded(statistics, weight.dtype)
    return SIGMA_DATA * of_clip.normalise(latents.float(), image=False)


def rounded(statistics: LatentStatistics, dtype: torch.dtype) -> LatentStatistics:
    """Return statistics with values that a tokenizer of this dtype is used with."""
    return replace(
        statistics,
        **{name: tensor.to(dtype).float() for name, tensor in statistics.tensors().items()},
    )


def _denoise(
    parts: DiffusionParts,
    request: DiffusionRequest,
    grid: LatentShape,
    prompt: Tensor,
    negative: Tensor | None,
    known: Tensor | None,
    colours: Tensor | None,
    tell: Callable[[Progress], None],
) -> Tensor:
    """Return the latents of the video, float32 (1, C, T, H, W)."""
    files, config, device = parts.files, parts.config, parts.device
    shape = (1, config.latent_channels, grid.frames, grid.height, grid.width)
    noise = standard_noise(request.seed, shape).to(device)
    given = None
    if known is not None:
        latents = torch.zeros(shape, device=device)
        latents[:, :, : known.shape[2]] = known
        # the same noise as the state's, as Cosmos 1.0 has it
        given = Given(latents, known.shape[2], noise, request.augment_sigma)
    mask = None
    if config.condition_mask:
        mask = torch.zeros(1, 1, *shape[2:], device=device)
        mask[:, :, : given.frames if given else 0] = 1
    with torch.inference_mode(), parts.transformer.on_device() as transformer:
        dtype = transformer.dtype
        positions = transformer.make_positions(
            grid, request.fps, rotary_dtype=getattr(torch, rotary_precision_of(files, request))
        )
        contexts: dict[bool, Context] = {
            conditional: transformer.encode_context(embedding.to(device, dtype))
            for conditional, embedding in ((True, prompt), (False, negative))
            if embedding is not None
        }

        def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
            context = contexts[conditional]
            return transformer(x, times, context, positions, condition_mask=mask)

        count = _count_steps(files, request)
        started = time.perf_counter()

        def on_step(step: int, _: Tensor, denoised: Tensor) -> None:
            nonlocal started
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            preview = None
            if colours is not None and (step + 1) % request.preview_every == 0:
                shown = _restore(files.statistics, denoised.float())
                preview = show_colours(shown, colours, files.tokenizer_config.spatial)
            tell(Progress("denoise", step + 1, count, preview=preview, seconds=seconds))
            started = time.perf_counter()

        return sample(
            network,
            noise,
            sampler=sampler_of(files, request),
            num_steps=request.num_steps,
            guidance=0.0 if negative is None else request.guidance,
            given=given,
            reinsertion=request.reinsertion,
            on_step=on_step,
        )


def _restore(statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Return latents as the tokenizer gives them, from the network's."""
    return statistics.denormalise(latents / SIGMA_DATA)


def _decode(parts: DiffusionParts, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video, uint8 (T, H, W, 3), piece by piece."""
    with parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        statistics = rounded(parts.files.statistics, weight.dtype)
        with torch.inference_mode():
            pieces = decode_stream(tokenizer, _restore(statistics, latents).to(weight))
        while True:
            with torch.inference_mode():  # not across a yield: it would leak to the caller
                piece = next(pieces, None)
                if piece is None:
                    return
                frames = signed_to_uint8(piece[0])
            yield frames
