"""Prompt, image or clip -> latents -> denoised latents -> video.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/world_generation_pipeline.py`,
`diffusion/model/model_{t2w,v2w}.py`; NVIDIA/Cosmos, the same below `cosmos1/models/diffusion/`.
Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, E its width.

Rounding: networks compute in the dtype of their weights; pixels until the tokenizer, latents
between the networks, the sampler's state and colours are float32 or wider. As in the released
pipelines, statistics of latents are rounded to the tokenizer's dtype, the network's time is rounded
to the transformer's, and rotary angles are bf16 unless asked otherwise.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.catalog import Entry, Generation, generation_by_name
from worldline.errors import CheckpointError, InputError, option
from worldline.families import denoise
from worldline.families.diffusion.model import PRESETS, DiT, DiTConfig
from worldline.families.diffusion.request import DiffusionOptions, DiffusionRequest
from worldline.families.diffusion.weights import open_network, read_settings
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.memory import Stage, coding_bytes
from worldline.nn.pieces import ALL_ROWS, CausalCache, Rows
from worldline.report import Recorder
from worldline.repositories import holds_diffusers, unfinished
from worldline.sampling.cache import StepCache
from worldline.sampling.edm import (
    SAMPLER_OF,
    SIGMA_DATA,
    Conditioning,
    make_sigmas,
    noise_ratios,
    sample,
)
from worldline.sampling.solvers import Steps
from worldline.shapes import LatentShape, VideoShape
from worldline.text.encoder import TextPart
from worldline.text.t5 import NUM_PARAMETERS, NUM_STREAMED, T5Files
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.tokenizers.cosmos.weights import open_tokenizer as open_cosmos
from worldline.video.convert import stretched_frames
from worldline.video.read import Clip
from worldline.weights.networks import Network, weights_in

logger = logging.getLogger(__name__)

STEP_CACHE = 0.2  # auto: the bundled world loses under 0.3 dB, see docs/performance.md
TOKENIZERS = {
    "Predict1": ("Cosmos-Tokenize1-CV8x8x8-720p", "Cosmos-1.0-Tokenizer-CV8x8x8"),
    "1.0": ("Cosmos-1.0-Tokenizer-CV8x8x8", "Cosmos-Tokenize1-CV8x8x8-720p"),
}


def sample_video(
    parts: Parts,
    request: DiffusionRequest,
    model: DiT,
    noise: Tensor,
    known: Tensor | None,
    prompts: denoise.Prompts,
    cache: StepCache | None = None,
) -> tuple[int, Steps]:
    """Number of steps, and the steps to normalised latents; see `denoise.generate`."""
    (prompt, negative), guidance = prompts, request.guidance
    if guidance and negative is None:
        if starts_from_text(parts.opened):
            negative = torch.zeros_like(prompt)
        else:
            guidance = 0
            logger.warning(
                "without a negative prompt, guidance does nothing: as in the released code, a "
                "continued clip is then led away from its own prompt"
            )
    conditioning = None
    if known is not None:
        # the same noise as the state's, as Cosmos 1.0 has it
        same = noise[:, :, : known.shape[2]]
        conditioning = Conditioning(known, same, request.augment_sigma)
    rotary = getattr(torch, str(request.rotary_precision))
    positions = model.make_positions(
        LatentShape(*noise.shape[2:]), request.fps, rotary_dtype=rotary
    )
    sampler = str(request.sampler)
    return len(make_sigmas(sampler, request.num_steps)) - 1, sample(
        denoise.conditioned(parts, model, noise, known, (prompt, negative), positions, cache),
        noise,
        sampler=sampler,
        num_steps=request.num_steps,
        guidance=guidance,
        conditioning=conditioning,
        reinsertion=request.reinsertion,
    )


def encode_frames(
    parts: Parts, clip: Clip, request: DiffusionRequest, rows: Rows = ALL_ROWS
) -> Tensor:
    """Normalised latents (1, C, t, H, W) of the known frames, float32."""
    # the tokenizer is causal: frames behind the known ones would not change their latents
    size = request.height, request.width
    frames = stretched_frames(clip, request.num_input_frames, *size, request.fit)
    video = frames.to(parts.device, parts.compute.dtype)
    latents = parts.tokenizer.module.encode(video, CausalCache(rows, keep=False))
    statistics = parts.opened["tokenizer"].statistics.rounded(parts.compute.dtype)
    # those of a clip's first frame, not those of an image
    return SIGMA_DATA * statistics.normalise(latents.float(), image=False)


def restore(parts: Parts, latents: Tensor) -> Tensor:
    """Latents as the tokenizer gives them, from the network's."""
    statistics = parts.opened["tokenizer"].statistics.rounded(parts.compute.dtype)
    return statistics.denormalise(latents / SIGMA_DATA)


def starts_from_text(opened: Opened) -> bool:
    """Whether a model makes videos of a prompt alone."""
    return bool(opened.settings.get("text2world", not opened.config.condition_mask))


def check(opened: Opened, request: DiffusionRequest) -> DiffusionRequest:
    """Refuse what the model cannot do; see `complete`."""
    config, statistics = opened.config, opened["tokenizer"].statistics
    if request.num_input_frames and not config.condition_mask:
        raise InputError(
            f"{opened.name} is a Text2World model without inputs; use a Video2World model"
        )
    if not request.num_input_frames and not starts_from_text(opened):
        raise InputError(
            f"{opened.name} is a Video2World model; give an image or a video to continue"
        )
    longest = min(statistics.frames, config.max_grid.frames)
    denoise.check_size(opened, request.video, request.num_input_frames, longest)
    request = complete(opened, request)
    sampler = request.sampler
    if sampler == "res_2mid" and request.num_steps < 2:
        raise InputError("num_steps is 1; the sampler res_2mid needs 2 or more")
    if request.reinsertion == "march_2025" and sampler != "edm_euler":
        raise InputError(
            f"reinsertion march_2025 is a fault of the sampler edm_euler; {sampler} never had it"
        )
    denoise.check_prompts(opened, request)
    rule = denoise.complete_cache(request.step_cache, len(ratios(opened, request)), STEP_CACHE)
    return request.model_copy(update={"step_cache": rule})


def ratios(opened: Opened, request: DiffusionRequest) -> list[float]:
    """Noise over data in each evaluation of the guided network."""
    return noise_ratios(str(request.sampler), request.num_steps)


def complete(opened: Opened, request: DiffusionRequest) -> DiffusionRequest:
    """A request with the sampler and the precision that it leaves to the model."""
    sampler = request.sampler or SAMPLER_OF[generation_of(opened)]
    precision = request.rotary_precision or "bfloat16"
    return request.model_copy(update={"sampler": sampler, "rotary_precision": precision})


def notes(opened: Opened, request: DiffusionRequest) -> list[str]:
    """What a request has that the released models were not trained on."""
    if opened.place.bundled or 12 <= request.fps <= 40:
        return []
    return [f"fps is {request.fps:g}; the models were trained on 12 to 40"]


def report_entries(parts: Parts, request: DiffusionRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    led = recorder.facts.get("negative_prompt") or starts_from_text(parts.opened)
    guided, grid = bool(request.guidance and led), denoise.grid_of(parts.opened, request.video)
    return {
        "generation": generation_of(parts.opened),
        **denoise.attention_entries(parts, parts.config, grid, guided),
    }


def stages(opened: Opened, request: DiffusionRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights; `benchmarks/diffusion_end_to_end.py` compares it."""
    coding = encode_and_decode_bytes(opened["tokenizer"].config, request.video, compute)
    return denoise.stages(opened, request, compute, request.video, coding)


def encode_and_decode_bytes(
    tokenizer: CosmosTokenizerConfig, video: VideoShape, compute: Compute
) -> tuple[int, int]:
    """Bytes that a continuous tokenizer needs for the known frames, and for a whole video."""
    size, patch = compute.dtype.itemsize, tokenizer.patch
    widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)

    def coding(frames: int) -> int:
        cells = -(-frames // patch) * (video.height // patch) * (video.width // patch)
        return 2 * coding_bytes(cells, widest, size)

    # keys and values of earlier pieces
    cells = video.latent(tokenizer.temporal, tokenizer.spatial).tokens
    past = 2 * cells * tokenizer.level_channels[-1] * size
    pieces = min(video.frames, CosmosTokenizer.chunk * tokenizer.temporal)
    return coding(min(video.frames, 9)), coding(pieces) + past


def open_transformer(opened: Opened) -> Network[DiTConfig]:
    """The transformer in either layout."""
    network = open_network(opened.source, opened.settings or None)
    if network.config.vocabulary:
        raise CheckpointError(
            f"{opened.folder} is the diffusion decoder of the autoregressive models; worldline "
            "autoregressive runs it with them"
        )
    return network


def generation_of(opened: Opened) -> Generation:
    """Generation of a model: as chosen, else by the name of its folder."""
    return opened.options.generation or generation_by_name(opened.folder)


def open_tokenizer(opened: Opened) -> CosmosNetwork:
    """The continuous tokenizer: as chosen, beside the transformer, or of its generation."""
    place, beside = opened.place, opened.folder / "vae"
    if opened.options.tokenizer_dir is not None:
        return open_latent_tokenizer(place.chosen(opened.options.tokenizer_dir, "tokenizer_dir"))
    names = TOKENIZERS[generation_of(opened)]
    folder = place.below(names)
    complete = holds_diffusers(opened.source.path) and weights_in(beside)
    if complete or (folder is None and beside.is_dir()):
        folder = beside
    if folder is None:
        raise CheckpointError(
            f"no continuous tokenizer: neither {' nor '.join(names)} is in {place.searched}; "
            f"{option('tokenizer_dir')} names another"
        )
    return open_latent_tokenizer(folder)


def open_latent_tokenizer(path: Path) -> CosmosNetwork:
    """A continuous tokenizer and the statistics of its latents."""
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


def upsampler(opened: Opened) -> tuple[bool, tuple[str, ...]]:
    """Whether the released upsampler describes a picture, and the names of its folder."""
    from worldline.text.upsampler import DESCRIBING, LENGTHENING

    if opened.config.condition_mask:
        return True, DESCRIBING
    return False, LENGTHENING[::-1] if generation_of(opened) == "1.0" else LENGTHENING


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    return {
        "transformer": Network(DiT, PRESETS[entry.preset]),
        "tokenizer": CosmosNetwork(CosmosTokenizer, TOKENIZER_PRESETS["CV8x8x8"]),
        "text": TextPart(NUM_PARAMETERS, NUM_STREAMED),
    }


generate = partial(
    denoise.generate,
    encode_frames=encode_frames,
    sample=sample_video,
    ratios=ratios,
    restore=restore,
)
FAMILY = Family(
    name="diffusion",
    request=DiffusionRequest,
    options=DiffusionOptions,
    parts=(
        Part(
            "text",
            "offload_text_encoder_model",
            lambda opened: T5Files.find(opened, opened.config.context_width),
            option="text_encoder_dir",
            optional=True,
            split=False,
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
    unused=denoise.unused,
    report=report_entries,
    notes=notes,
    layout=denoise.layout,
    upsampler=upsampler,
    read_settings=read_settings,
)
