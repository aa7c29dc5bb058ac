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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.loading import DiffusionFiles, DiffusionParts, WorldDefaults
from worldline.nn.dit import Context
from worldline.nn.pieces import decode_stream
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
from worldline.pipelines.prompts import TRUNCATION, GivenEmbedding, filled, read_both
from worldline.pipelines.requests import DiffusionRequest
from worldline.report import Recorder
from worldline.sampling.edm import SIGMA_DATA, Given, make_sigmas, sample
from worldline.sampling.noise import standard_noise
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, LatentStatistics
from worldline.video.convert import stretched_frames
from worldline.video.read import Clip

logger = logging.getLogger(__name__)

SAMPLER_OF = {"1.0": "res_2ab", "Predict1": "edm_euler"}
TRAINED_FPS = (12, 40)


def make_request(defaults: WorldDefaults, **options: Any) -> DiffusionRequest:
    """Return a request; what `options` leave out is as the world has it by default.

    Raises:
        InputError: an option is unknown or out of range.
    """
    return with_defaults(DiffusionRequest, defaults, options)


def check_request(files: DiffusionFiles, request: DiffusionRequest) -> None:
    """Refuse what a world cannot do; nothing is read for it.

    Raises:
        InputError: it cannot do this.
    """
    _check_kind(files, request)
    most = min(files.statistics.frames, files.config.max_grid.frames * files.config.patch[0])
    tokenizer = files.tokenizer_config
    check_size(request, files.config, most, tokenizer.temporal, tokenizer.spatial)
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
    prompt: GivenEmbedding | None,
    negative: GivenEmbedding | None = None,
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
    found = read_both(prompt, negative)
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
    with stage(recorder, "text"):
        prompt, negative = _embed(parts, request, embeddings or Embeddings(), recorder)

    known = colours = None
    if request.num_input_frames or request.preview_every:
        yield Progress("encode", 0, 1)
        encoding = stage(recorder, "encode")
        with encoding, torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
            if request.num_input_frames:
                known = _encode(tokenizer, files.statistics, clip, request)
            if request.preview_every:
                colours = parts.colours

    count = _count_steps(files, request)
    with stage(recorder, "denoise"):
        yield Progress("denoise", 0, count)

        def denoise(tell: Callable[[Progress], None]) -> Tensor:
            return _denoise(parts, request, grid, prompt, negative, known, colours, tell)

        latents = yield from on_thread(denoise, device)

    frames: list[NDArray[np.uint8]] = []
    yield Progress("decode", 0, request.num_video_frames)
    with stage(recorder, "decode"):
        for piece in _decode(parts, latents):
            frames.append(piece)
            done = sum(map(len, frames))
            yield Progress("decode", done, request.num_video_frames, piece)
    yield Progress("done", count, count, np.concatenate(frames))


def _embed(
    parts: DiffusionParts,
    request: DiffusionRequest,
    given: Embeddings,
    recorder: Recorder,
) -> tuple[Tensor, Tensor | None]:
    """Return the embedding of the prompt and of what guidance leads away from, (1, S, E).

    The second is None where there is no guidance, or none that would do anything.
    """
    wanted = to_encode(request, given)
    found: Mapping[str, Tensor] = {}
    if wanted and parts.text is not None:  # else told by `check_text`
        found = parts.text.embed(list(wanted.values()))
        recorder.facts[TRUNCATION] = parts.text.truncations(wanted)
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

        def look(denoised: Tensor) -> NDArray[np.uint8] | None:
            if colours is None:
                return None
            shown = _restore(files.statistics, denoised.float())
            return show_colours(shown, colours, files.tokenizer_config.spatial)

        on_step = step_teller(tell, device, count, request.preview_every, look)
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
        yield from shown_pieces(pieces)
