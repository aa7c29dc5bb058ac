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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldline.catalog import Entry, Generation, generation_by_name
from worldline.errors import CheckpointError, InputError
from worldline.families.denoise import (
    Embeddings,
    attention_entries,
    condition_mask,
    conditioned,
    decode,
    encode_inputs,
    encode_prompts,
    log_result,
    read_embeddings,
    refuse_size,
    report,
    stage,
)
from worldline.families.diffusion.model import PRESETS, DiT, DiTConfig
from worldline.families.diffusion.request import (
    DiffusionOptions,
    DiffusionRequest,
)
from worldline.families.diffusion.weights import is_decoder, open_network, read_settings
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.files import holds_diffusers, unfinished
from worldline.guards import rewrites
from worldline.memory import Stage, coding_bytes, denoise_bytes
from worldline.nn.pieces import decode_stream
from worldline.report import Recorder
from worldline.sampling.edm import SAMPLER_OF, SIGMA_DATA, Conditioning, make_sigmas, sample
from worldline.sampling.solvers import standard_noise
from worldline.shapes import VideoShape
from worldline.step import Step
from worldline.text.encoder import TextPart
from worldline.text.t5 import NUM_PARAMETERS, T5Files
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import (
    CosmosTokenizer,
    CosmosTokenizerConfig,
    LatentStatistics,
)
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.tokenizers.cosmos.weights import open_tokenizer as open_cosmos
from worldline.video.convert import stretched_frames
from worldline.video.read import Clip
from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

TRAINED_FPS = (12, 40)
TOKENIZERS: dict[str, tuple[str, str]] = {
    "Predict1": ("Cosmos-Tokenize1-CV8x8x8-720p", "Cosmos-1.0-Tokenizer-CV8x8x8"),
    "1.0": ("Cosmos-1.0-Tokenizer-CV8x8x8", "Cosmos-Tokenize1-CV8x8x8-720p"),
}


@torch.inference_mode()
def generate(
    parts: Parts, clip: Clip | None, request: DiffusionRequest, recorder: Recorder
) -> Iterator[Step]:
    """Prompt, image or clip -> video; the last step holds all its frames.

    The known frames in the result are the tokenizer's reconstruction of the input, as in the
    reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None where these are 0.
        request: a checked one.
        recorder: receives seconds and memory of each stage.

    Raises:
        InputError: the clip is absent or too short.
    """
    opened, config = parts.opened, parts.config
    codec, statistics = opened["tokenizer"].config, opened["tokenizer"].statistics
    grid = request.video.latent(codec.temporal, codec.spatial)

    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        prompt, negative = embed(parts, request, recorder)
    known, preview = yield from encode_inputs(
        parts,
        request,
        recorder,
        lambda coder: encode_frames(coder, statistics, clip, request),
    )

    count = len(make_sigmas(str(request.sampler), request.num_steps)) - 1
    with stage(recorder, "denoise"), parts.transformer.on_device() as model:
        shape = (1, config.latent_channels, grid.frames, grid.height, grid.width)
        noise = standard_noise(request.seed, shape).to(parts.device)
        conditioning = None
        if known is not None:
            # the same noise as the state's, as Cosmos 1.0 has it
            same = noise[:, :, : known.shape[2]]
            conditioning = Conditioning(known, same, request.augment_sigma)
        mask = condition_mask(noise, known) if config.condition_mask else None
        rotary = getattr(torch, str(request.rotary_precision))
        positions = model.make_positions(grid, request.fps, rotary_dtype=rotary)
        steps = sample(
            conditioned(model, prompt, negative, positions, mask),
            noise,
            sampler=str(request.sampler),
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
            preview=preview and (lambda denoised: preview(restored(statistics, denoised))),
        )
        log_result("denoise", latents)
        del positions  # room for the decoder

    frames = np.empty((request.num_video_frames, request.height, request.width, 3), np.uint8)
    yield Step("decode", 0, len(frames))
    with stage(recorder, "decode"), parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        latents = restored(statistics.rounded(weight.dtype), latents)
        yield from decode(decode_stream(tokenizer, latents.to(weight)), frames)
    yield Step("done", count, count, frames)


def embed(
    parts: Parts, request: DiffusionRequest, recorder: Recorder
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (1, S, E) of the prompt and of what guidance leads away from.

    The second is None without guidance, and where guidance would do nothing.
    """
    embeddings = embeddings_of(parts.opened, request)
    prompts = prompts_to_encode(request, embeddings)
    prompt, negative = encode_prompts(parts.text, prompts, embeddings, recorder)
    if not request.guidance:
        return prompt, None
    if negative is None and (not request.num_input_frames or starts_from_text(parts.opened)):
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
    return SIGMA_DATA * statistics.rounded(weight.dtype).normalise(latents.float(), image=False)


def restored(statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Latents as the tokenizer gives them, from the network's."""
    return statistics.denormalise(latents / SIGMA_DATA)


def embeddings_of(opened: Opened, request: DiffusionRequest) -> Embeddings:
    """Embeddings in place of prompts, with as many rows as the model takes."""
    return read_embeddings(request, opened["transformer"].config.context_width, opened.text_length)


def prompts_to_encode(request: DiffusionRequest, given: Embeddings) -> dict[str, str]:
    """Prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    prompts: dict[str, str] = {}
    if given.prompt is None and request.prompt is not None:
        prompts["prompt"] = request.prompt
    if request.guidance and given.negative is None and request.negative_prompt:
        prompts["negative_prompt"] = request.negative_prompt
    return prompts


def starts_from_text(opened: Opened) -> bool:
    """Whether a model makes videos of a prompt alone."""
    condition_mask = opened["transformer"].config.condition_mask
    return bool(opened.settings.get("text2world", not condition_mask))


def check(opened: Opened, request: DiffusionRequest) -> DiffusionRequest:
    """Refuse what the model cannot do; fill in sampler and precision.

    Raises:
        InputError: it cannot do this, or there is no prompt.
        CheckpointError: the text encoder is needed, and missing.
    """
    config, tokenizer = opened["transformer"].config, opened["tokenizer"]
    if request.num_input_frames and not config.condition_mask:
        raise InputError(
            f"{opened.name} is a Text2World model without inputs; use a Video2World model"
        )
    if not request.num_input_frames and not starts_from_text(opened):
        raise InputError(
            f"{opened.name} is a Video2World model; give an image or a video to continue, or use a "
            "Text2World model"
        )
    longest = min(tokenizer.statistics.frames, config.max_grid.frames)
    refuse_size(request.video, request.num_input_frames, config, longest, tokenizer.config)
    sampler = request.sampler or SAMPLER_OF[generation_of(opened)]
    if sampler == "res_2mid" and request.num_steps < 2:
        raise InputError("num_steps is 1; the sampler res_2mid needs 2 or more")
    if request.reinsertion == "march_2025" and sampler != "edm_euler":
        raise InputError(
            f"reinsertion march_2025 is a fault of the sampler edm_euler; {sampler} never had it"
        )
    given = embeddings_of(opened, request)
    if request.prompt is None and given.prompt is None and not rewrites(opened, request):
        raise InputError("there is no prompt; give prompt or prompt_embeddings")
    if needed := prompts_to_encode(request, given):
        opened.require("text", " and ".join(needed))
    precision = request.rotary_precision or "bfloat16"
    return request.model_copy(update={"sampler": sampler, "rotary_precision": precision})


def unused(opened: Opened, request: DiffusionRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    found = request.unused()
    if request.prompt_embeddings is not None and not prompts_to_encode(
        request, embeddings_of(opened, request)
    ):
        found |= opened.encoder_unused
    if not request.num_input_frames:
        found |= dict.fromkeys(("reinsertion", "augment_sigma"), "there is no input")
    return found


def notes(opened: Opened, request: DiffusionRequest) -> list[str]:
    """What a request has that the released models were not trained on."""
    least, most = TRAINED_FPS
    if opened.place.bundled or least <= request.fps <= most:
        return []
    return [f"fps is {request.fps:g}; the models were trained on {least} to {most}"]


def report_entries(parts: Parts, request: DiffusionRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    return {"generation": generation_of(parts.opened), **attention_entries(parts, request.video)}


def stages(opened: Opened, request: DiffusionRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights; `benchmarks/diffusion_end_to_end.py` compares it."""
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20)
    yield from denoising_stages(
        opened["transformer"].config,
        opened["tokenizer"].config,
        request.video,
        compute,
        opened.text_length,
    )


def denoising_stages(
    config: DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    video: VideoShape,
    compute: Compute,
    context_length: int,
    *,
    batch: int = 1,
) -> Iterator[Stage]:
    """Stages encode, denoise and decode of a video.

    Args:
        config: of the transformer.
        tokenizer: of the continuous tokenizer.
        video: size of the video.
        compute: device and precision.
        context_length: rows of a text embedding.
        batch: guidance branches computed at once.
    """
    size = compute.dtype.itemsize
    grid = video.latent(tokenizer.temporal, tokenizer.spatial)

    def coding(frames: int) -> int:
        cells = -(-frames // tokenizer.patch)
        cells *= (video.height // tokenizer.patch) * (video.width // tokenizer.patch)
        widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)
        return 2 * coding_bytes(cells, widest, size)

    yield Stage("encode", "tokenizer", coding(min(video.frames, 9)))
    denoising = denoise_bytes(
        config, grid, compute.dtype, context_length, fused=compute.fused, batch=batch
    )
    yield Stage("denoise", "transformer", denoising)
    past = (
        2 * grid.tokens * tokenizer.level_channels[-1] * size
    )  # keys and values of earlier pieces
    pieces = min(video.frames, CosmosTokenizer.chunk * tokenizer.temporal)
    yield Stage("decode", "tokenizer", coding(pieces) + past)


def open_transformer(opened: Opened) -> Network[DiTConfig]:
    """The transformer in either layout."""
    if is_decoder(opened.source.tensors):
        raise CheckpointError(
            f"{opened.folder} is the diffusion decoder of the autoregressive models; worldline "
            "autoregressive runs it with them"
        )
    if not isinstance(opened.settings.get("text2world", True), bool):
        value, path = opened.settings["text2world"], opened.folder / "config.json"
        raise CheckpointError(f"{path}: text2world is {value!r}; give true or false")
    return open_network(opened.source, opened.settings or None)


def generation_of(opened: Opened) -> Generation:
    """Generation of a model: as chosen, else by the name of its folder."""
    return opened.options.generation or generation_by_name(opened.folder)


def open_tokenizer(opened: Opened) -> CosmosNetwork:
    """The continuous tokenizer: as chosen, beside the transformer, or of its generation."""
    place, own = opened.place, opened.folder / "vae"
    names = TOKENIZERS[generation_of(opened)]
    if opened.options.tokenizer_dir is not None:
        path = place.chosen(opened.options.tokenizer_dir, "tokenizer_dir")
    elif holds_diffusers(opened.source.path) and any(own.glob("diffusion_pytorch_model.*")):
        path = own
    elif (found := place.below(names)) is not None:
        path = found
    elif own.is_dir():
        path = own
    else:
        raise CheckpointError(
            f"no continuous tokenizer: neither {names[0]} nor {names[1]} is in {place.searched}; "
            "--tokenizer_dir names another"
        )
    return open_latent_tokenizer(path)


def open_latent_tokenizer(path: Path) -> CosmosNetwork:
    """A continuous tokenizer and the statistics of its latents.

    Raises:
        CheckpointError: it is discrete, or its statistics are absent.
    """
    opened = open_cosmos(path)
    if opened.config.levels is not None:
        raise CheckpointError(
            f"{path} is a discrete tokenizer; give a continuous one, such as "
            f"{TOKENIZERS['Predict1'][0]}"
        )
    if opened.statistics is None:
        raise CheckpointError(
            f"{opened.path} has no mean_std.pt, the statistics of its latents"
            f"{unfinished(opened.path) or '; download it, too'}"
        )
    return opened


def open_encoder(opened: Opened) -> T5Files:
    """The text encoder T5."""
    return T5Files.find(opened, opened["transformer"].config.context_width)


def upsampler(opened: Opened) -> tuple[bool, tuple[str, ...]]:
    """Whether the released upsampler describes a picture, and the names of its folder."""
    from worldline.text.upsampler import DESCRIBING, LENGTHENING

    if opened["transformer"].config.condition_mask:
        return True, DESCRIBING
    return False, LENGTHENING[::-1] if generation_of(opened) == "1.0" else LENGTHENING


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    return {
        "transformer": Network(DiT, PRESETS[entry.preset]),
        "tokenizer": CosmosNetwork(CosmosTokenizer, TOKENIZER_PRESETS["CV8x8x8"]),
        "text": TextPart(NUM_PARAMETERS),
    }


FAMILY = Family(
    name="diffusion",
    request=DiffusionRequest,
    options=DiffusionOptions,
    parts=(
        Part(
            "text",
            "offload_text_encoder_model",
            open_encoder,
            option="text_encoder_dir",
            optional=True,
        ),
        Part("tokenizer", "offload_tokenizer", open_tokenizer, option="tokenizer_dir"),
        Part("transformer", "offload_diffusion_transformer", open_transformer),
    ),
    agree=(("tokenizer", "latent_channels", "transformer", "latent_channels"),),
    check=check,
    stages=stages,
    generate=generate,
    presets=presets,
    guardrails=generation_of,
    unused=unused,
    report=report_entries,
    notes=notes,
    upsampler=upsampler,
    read_settings=read_settings,
)
