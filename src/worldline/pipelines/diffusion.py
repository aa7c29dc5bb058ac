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
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldline.errors import InputError
from worldline.loading import DiffusionFiles, DiffusionParts, WorldDefaults
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
    rounded,
    stage,
)
from worldline.pipelines.prompts import GivenEmbedding, filled, read_both
from worldline.pipelines.requests import DiffusionRequest
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.sampling.edm import SAMPLER_OF, SIGMA_DATA, Conditioning, make_sigmas, sample
from worldline.sampling.schedules import standard_noise
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.statistics import LatentStatistics
from worldline.tokenizers.cosmos.stream import decode_stream
from worldline.video.convert import stretched_frames
from worldline.video.read import Clip

logger = logging.getLogger(__name__)

TRAINED_FPS = (12, 40)


@torch.inference_mode()
def generate(
    parts: DiffusionParts,
    clip: Clip | None,
    request: DiffusionRequest,
    recorder: Recorder,
    embeddings: Embeddings | None = None,
) -> Iterator[Step]:
    """Prompt, image or clip -> video; the last step holds all its frames.

    The known frames in the result are the tokenizer's reconstruction of the input, as in the
    reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None where these are 0.
        request: one that `check_request` and `check_text` accept.
        recorder: receives seconds and memory of each stage.
        embeddings: in place of prompts, of `read_embeddings`.

    Raises:
        InputError: the clip is absent or too short.
    """
    files, config = parts.files, parts.config
    grid = request.video.latent(files.tokenizer_config.temporal, files.tokenizer_config.spatial)

    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        prompt, negative = embed(parts, request, embeddings or Embeddings(), recorder)
    known, preview = yield from encode_inputs(
        parts,
        request,
        recorder,
        lambda coder: encode_frames(coder, files.statistics, clip, request),
    )

    count = count_steps(files, request)
    with stage(recorder, "denoise"), parts.transformer.on_device() as model:
        shape = (1, config.latent_channels, grid.frames, grid.height, grid.width)
        noise = standard_noise(request.seed, shape).to(parts.device)
        conditioning = None
        if known is not None:
            # the same noise as the state's, as Cosmos 1.0 has it
            same = noise[:, :, : known.shape[2]]
            conditioning = Conditioning(known, same, request.augment_sigma)
        mask = condition_mask(noise, known) if config.condition_mask else None
        rotary = getattr(torch, rotary_precision_of(files, request))
        positions = model.make_positions(grid, request.fps, rotary_dtype=rotary)
        steps = sample(
            conditioned(model, prompt, negative, positions, mask),
            noise,
            sampler=sampler_of(files, request),
            num_steps=request.num_steps,
            guidance=0.0 if negative is None else request.guidance,
            conditioning=conditioning,
            reinsertion=request.reinsertion,
        )
        latents = yield from report(
            steps,
            recorder,
            count,
            preview_every=request.preview_every,
            preview=preview and (lambda denoised: preview(restored(files.statistics, denoised))),
        )
        log_result("denoise", latents)
        del positions  # room for the decoder

    frames = np.empty((request.num_video_frames, request.height, request.width, 3), np.uint8)
    yield Step("decode", 0, len(frames))
    with stage(recorder, "decode"), parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        latents = restored(rounded(files.statistics, weight.dtype), latents)
        yield from decode(decode_stream(tokenizer, latents.to(weight)), frames)
    yield Step("done", count, count, frames)


def embed(
    parts: DiffusionParts, request: DiffusionRequest, embeddings: Embeddings, recorder: Recorder
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (1, S, E) of the prompt and of what guidance leads away from.

    The second is None without guidance, and where guidance would do nothing.
    """
    prompts = to_encode(request, embeddings)
    prompt, negative = encode_prompts(parts.text, prompts, embeddings, recorder)
    if not request.guidance:
        return prompt, None
    if negative is None and (not request.num_input_frames or parts.files.defaults.text2world):
        return prompt, torch.zeros_like(prompt)
    if negative is None:
        logger.warning(
            "without a negative prompt, guidance does nothing: as in the released code, a "
            "continued clip is then led away from its own prompt"
        )
    return prompt, negative


def encode_frames(
    tokenizer: CosmosTokenizer,
    statistics: LatentStatistics,
    clip: Clip | None,
    request: DiffusionRequest,
) -> Tensor:
    """Normalised latents (1, C, t, H, W) of the known frames, float32.

    Raises:
        InputError: there is no clip, or it is too short.
    """
    if clip is None:
        raise InputError(f"no input, but num_input_frames is {request.num_input_frames}")
    # the tokenizer is causal: frames behind the known ones would not change their latents
    frames = stretched_frames(clip, request.num_input_frames, request.height, request.width)
    weight = tokenizer.quant_conv.weight
    latents = tokenizer.encode(frames.to(weight))
    # the statistics of a clip's first frame, not those of an image
    return SIGMA_DATA * rounded(statistics, weight.dtype).normalise(latents.float(), image=False)


def restored(statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Latents as the tokenizer gives them, from the network's."""
    return statistics.denormalise(latents / SIGMA_DATA)


def make_request(defaults: WorldDefaults, **options: Any) -> DiffusionRequest:
    """Request of `options`, filled up from the world's defaults.

    Raises:
        InputError: an option is unknown or out of range.
    """
    return with_defaults(DiffusionRequest, defaults, options)


def check_request(files: DiffusionFiles, request: DiffusionRequest) -> None:
    """Refuse what a world cannot do; nothing is read for it.

    Raises:
        InputError: it cannot do this.
    """
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
    max_latents = min(files.statistics.frames, files.config.max_grid.frames * files.config.patch[0])
    tokenizer = files.tokenizer_config
    check_size(request, files.config, max_latents, tokenizer.temporal, tokenizer.spatial)
    sampler = sampler_of(files, request)
    if sampler == "res_2mid" and request.num_steps < 2:
        raise InputError("num_steps is 1; the sampler res_2mid needs 2 or more")
    if request.reinsertion == "march_2025" and sampler != "edm_euler":
        raise InputError(f"reinsertion march_2025 needs the sampler edm_euler, not {sampler}")


def check_text(
    files: DiffusionFiles, request: DiffusionRequest, embeddings: Embeddings | None = None
) -> None:
    """Refuse a request whose words cannot become embeddings.

    Raises:
        InputError: there is no prompt.
        CheckpointError: there is no text encoder, and one is needed.
    """
    embeddings = embeddings or Embeddings()
    why_no_text = None if files.text is not None else files.why_no_text
    check_prompts(request, embeddings, to_encode(request, embeddings), why_no_text)


def to_encode(request: DiffusionRequest, embeddings: Embeddings) -> dict[str, str]:
    """Prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    prompts: dict[str, str] = {}
    if embeddings.prompt is None and request.prompt is not None:
        prompts["prompt"] = request.prompt
    if request.guidance and embeddings.negative is None and request.negative_prompt:
        prompts["negative_prompt"] = request.negative_prompt
    return prompts


def notes(files: DiffusionFiles, request: DiffusionRequest) -> list[str]:
    """Remarks on a request that is allowed."""
    slowest, fastest = TRAINED_FPS
    if files.bundled or slowest <= request.fps <= fastest:
        return []
    return [f"fps is {request.fps:g}; the released models know {slowest} to {fastest}"]


def sampler_of(files: DiffusionFiles, request: DiffusionRequest) -> str:
    """Sampler of a request: its own, or that of the model's generation."""
    return request.sampler or SAMPLER_OF[files.generation]


def count_steps(files: DiffusionFiles, request: DiffusionRequest) -> int:
    """Steps of the sampler; those of "res_2mid" evaluate the network twice."""
    return len(make_sigmas(sampler_of(files, request), request.num_steps)) - 1


def rotary_precision_of(files: DiffusionFiles, request: DiffusionRequest) -> str:
    """Dtype in which the angles of position are computed."""
    return request.rotary_precision or files.defaults.rotary_precision


def read_embeddings(
    files: DiffusionFiles,
    prompt: GivenEmbedding | None,
    negative: GivenEmbedding | None = None,
) -> Embeddings:
    """Embeddings in place of prompts, checked, with as many rows as the world takes.

    Args:
        files: the world's.
        prompt: (S, E) or (1, S, E), or a file of it and perhaps of the negative prompt's: see
            `worldline.text.embeddings.read_embeddings`. Rows that are missing are zeros, as those
            behind the end of a prompt are.
        negative: the same of the negative prompt.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    tensors = read_both(prompt, negative)
    rows, width = files.context_length, files.config.context_width
    whole = {
        name: filled(tensor, rows, width, called) for name, (tensor, called) in tensors.items()
    }
    return Embeddings(whole.get("prompt"), whole.get("negative_prompt"))
