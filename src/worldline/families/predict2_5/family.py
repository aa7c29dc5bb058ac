"""Cosmos-Predict2.5: prompt, image or clip -> latents -> a flow from noise to data -> video.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py` and
`_src/predict2/models/{text,video}2world_model_rectified_flow.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldline.catalog import FLOW_MODELS, FLOW_TOKENIZER, Entry, FlowModel
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
from worldline.families.predict2_5.model import PRESETS, FlowDiT, FlowDiTConfig
from worldline.families.predict2_5.request import (
    RELEASED_CHUNK,
    FlowOptions,
    FlowRequest,
)
from worldline.families.predict2_5.weights import DIFFUSERS_KEYS, open_network
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.files import read_json, released_folders
from worldline.memory import Stage, coding_bytes, denoise_bytes
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.report import Recorder
from worldline.sampling.flow import Conditioning, make_schedule, sample
from worldline.sampling.solvers import standard_noise
from worldline.shapes import VideoShape
from worldline.step import Step
from worldline.text.encoder import TextPart
from worldline.text.reason1 import NUM_PARAMETERS, Reason1Files
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import FILES as TOKENIZER_FILES
from worldline.tokenizers.wan.weights import open_wan
from worldline.video.convert import covering_frames
from worldline.video.read import Clip
from worldline.weights.networks import Network

TRAINED_FRAMES = 93
TRAINED_FPS = 16
# height x width, of the resolution "720"
TRAINED_SIZES = ((960, 960), (704, 960), (960, 704), (704, 1280), (1280, 704))
_SCHEDULER = "scheduler/scheduler_config.json"
_KNOWN_TIMESTEP: dict[str, float | None] = {"karras": 0.1, "shifted": None}


@torch.inference_mode()
def generate(
    parts: Parts, clip: Clip | None, request: FlowRequest, recorder: Recorder
) -> Iterator[Step]:
    """Prompt, image or clip -> video; the last step holds all its frames.

    The known frames in the result are the tokenizer's reconstruction of the input, with the trace
    of noise that the sampler leaves in them, as in the reference.

    Args:
        parts: the networks.
        clip: at least `request.num_input_frames` frames; None where these are 0.
        request: a checked one.
        recorder: receives seconds and memory of each stage.

    Raises:
        InputError: the clip is absent or too short.
    """
    opened = parts.opened
    embeddings = read_embeddings(request, parts.config.feature_width)
    windows = cut_windows(opened, request)

    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        context = encode_prompts(
            parts.text, prompts_to_encode(request, embeddings), embeddings, recorder
        )

    count = count_steps(opened, request) * len(windows)
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
    parts: Parts,
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
    opened, request = parts.opened, window.request
    network, tokenizer = opened["transformer"], opened["tokenizer"].config
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
            make_schedule(network.schedule, request.num_steps),
            guidance=request.guidance,
            conditioning=None if known is None else Conditioning(known, network.known_timestep),
        )
        latents = yield from report(
            steps,
            recorder,
            count,
            before=window.number * count_steps(opened, request),
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


def prompts_to_encode(request: FlowRequest, given: Embeddings) -> dict[str, str]:
    """Prompts that must be encoded, by their names: "prompt", "negative_prompt"."""
    prompts: dict[str, str] = {}
    if given.prompt is None and request.prompt is not None:
        prompts["prompt"] = request.prompt
    if request.guidance and given.negative is None:
        # no words are words too: zeros, which no text gives, were never learnt
        prompts["negative_prompt"] = request.negative_prompt or ""
    return prompts


def count_steps(opened: Opened, request: FlowRequest) -> int:
    """Evaluations of the velocity; the schedule "karras" has one more than its steps."""
    return len(make_schedule(opened["transformer"].schedule, request.num_steps).timesteps)


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


def cut_windows(opened: Opened, request: FlowRequest) -> list[Window]:
    """Windows of a request: one, or those of the chunks of a long video.

    A chunk goes on from the last frames of the one before. The reference takes their number for one
    of latent frames, so that it gives more frames than it has made unless the number is 1.
    """
    frames, size = request.num_video_frames, request.chunk_size
    if size is None:
        return [Window(0, request, 0, frames)]
    overlap = request.chunk_overlap
    found = []
    for number in range(1 + max(0, ceil((frames - size) / (size - overlap)))):
        start = number * (size - overlap)
        own = request.model_copy(
            update={
                "num_video_frames": window_of(opened, request).frames,
                "num_input_frames": overlap if number else request.num_input_frames,
                "seed": (request.seed + number) % 2**32,
                "chunk_size": None,
                "chunk_overlap": 1,
            }
        )
        first, last = overlap if number else 0, min(size, frames - start)
        found.append(Window(number, own, first, last))
    return found


def window_of(opened: Opened, request: FlowRequest) -> VideoShape:
    """Size of what is denoised at once.

    For a long video that is the model's own length: frames behind a chunk are made and left out, as
    in the reference, for the models know this length alone.
    """
    if request.chunk_size is None:
        return request.video
    frames = opened.defaults.get("num_video_frames", TRAINED_FRAMES)
    return VideoShape(frames, request.height, request.width)


def refuse(opened: Opened, request: FlowRequest) -> FlowRequest:
    """Raise what the model cannot do; the request, with chunks of the released length or less."""
    tokenizer, config = opened["tokenizer"].config, opened["transformer"].config
    window = window_of(opened, request)
    if request.chunk_size is not None and request.chunk_size > window.frames:
        if request.chunk_size != RELEASED_CHUNK:
            raise InputError(
                f"chunk_size is {request.chunk_size}, the model makes {window.frames} frames at "
                f"once; give at most {window.frames}"
            )
        request = request.model_copy(update={"chunk_size": window.frames})
    refuse_size(
        window,
        request.num_input_frames,
        config,
        config.max_grid.frames,
        tokenizer,
        longer="chunk_size makes longer videos" if request.chunk_size is None else "",
    )
    given = read_embeddings(request, config.feature_width)
    if request.prompt is None and given.prompt is None:
        raise InputError("there is no prompt; give prompt or prompt_embeddings")
    if needed := prompts_to_encode(request, given):
        opened.require("text", " and ".join(needed))
    return request


def unused(opened: Opened, request: FlowRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    found = request.unused()
    if request.prompt_embeddings is not None and not prompts_to_encode(
        request, read_embeddings(request, opened["transformer"].config.feature_width)
    ):
        found |= opened.encoder_unused
    return found


def notes(opened: Opened, request: FlowRequest) -> list[str]:
    """What a request has that the released models were not trained on."""
    if opened.place.bundled:
        return []
    found = []
    frames = window_of(opened, request).frames
    if frames not in (1, TRAINED_FRAMES):
        found.append(f"{frames} frames at once; the models were trained on {TRAINED_FRAMES}")
    if (request.height, request.width) not in TRAINED_SIZES:
        known = ", ".join(f"{height} x {width}" for height, width in TRAINED_SIZES)
        found.append(
            f"{request.height} x {request.width} pixels; the models were trained on {known}"
        )
    if request.fps != TRAINED_FPS:
        found.append(f"fps is {request.fps:g}; the models move at {TRAINED_FPS} all the same")
    return found


def report_entries(parts: Parts, request: FlowRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    network = parts.opened["transformer"]
    return {
        "schedule": network.schedule,
        "known_timestep": network.known_timestep,
        "evaluations": count_steps(parts.opened, request),
        "chunks": len(cut_windows(parts.opened, request)),
        **attention_entries(parts, window_of(parts.opened, request)),
    }


def stages(opened: Opened, request: FlowRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights."""
    tokenizer, config = opened["tokenizer"].config, opened["transformer"].config
    window, size = window_of(opened, request), compute.dtype.itemsize
    length = opened.text_length
    # features of both prompts, before and behind the layer that narrows them
    features = 2 * length * (config.feature_width + config.context_width) * size
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20 + features)
    frames = min(
        window.frames, WanTokenizer.chunk * tokenizer.temporal
    )  # coded in pieces both ways
    pixels = frames * window.height * window.width
    # what convolutions keep of the piece before, and their workspace: measured on one H200
    coding = 3 * coding_bytes(pixels, max(tokenizer.channels, 3), size)
    yield Stage("encode", "tokenizer", coding)
    grid = window.latent(tokenizer.temporal, tokenizer.spatial)
    denoising = denoise_bytes(config, grid, compute.dtype, length, fused=compute.fused)
    yield Stage("denoise", "transformer", features + denoising)
    yield Stage("decode", "tokenizer", coding)


@dataclass(frozen=True)
class FlowNetwork(Network[FlowDiTConfig]):
    """The transformer, and how it is sampled, which no tensor states.

    Attributes:
        schedule: of the noise levels.
        known_timestep: timestep of input frames; None gives them that of all others.
    """

    schedule: str = "shifted"
    known_timestep: float | None = None


def open_transformer(opened: Opened) -> FlowNetwork:
    """The transformer in either layout."""
    network = open_network(opened.source, opened.settings or None)
    schedule, known_timestep = _schedule(opened, network)
    return FlowNetwork(**vars(network), schedule=schedule, known_timestep=known_timestep)


def _schedule(opened: Opened, network: Network[FlowDiTConfig]) -> tuple[str, float | None]:
    """Schedule and timestep of input frames: as chosen, stated, released, or else "shifted"."""
    chosen = opened.options.schedule or opened.settings.get("schedule")
    if chosen not in (None, *_KNOWN_TIMESTEP):
        raise CheckpointError(f"{opened.folder / 'config.json'}: schedule is {chosen!r}")
    if chosen is None and not opened.place.bundled:
        released = opened.place.released or _released_as(opened.source.path)
        if released is not None:
            return released.schedule, released.known_timestep
        # diffusers' 14B states the scheduler of 2B, which it was not made for
        large = network.config.width == PRESETS["14B"].width
        scheduler = opened.folder / _SCHEDULER
        if network.keys is DIFFUSERS_KEYS and not large and scheduler.is_file():
            chosen = "karras" if read_json(scheduler).get("use_karras_sigmas") else None
    chosen = chosen or "shifted"
    return chosen, _KNOWN_TIMESTEP[chosen]


def _released_as(file: Path) -> FlowModel | None:
    """The released model that a file is, by its name or that of its folder."""
    for model in FLOW_MODELS:
        own = Path(model.file)
        if file.name == own.name or file.parent.name == own.name.partition("_")[0]:
            return model
    return None


def open_tokenizer(opened: Opened) -> Network[WanTokenizerConfig]:
    """The Wan2.1 tokenizer: as chosen, beside the transformer, or that of the 2B repository."""
    return open_wan(_tokenizer_path(opened))


def _tokenizer_path(opened: Opened) -> Path:
    place, folder = opened.place, opened.folder
    if opened.options.tokenizer_dir is not None:
        return place.chosen(opened.options.tokenizer_dir, "tokenizer_dir")
    repositories = [
        path for root in place.roots for path in released_folders(root, *FLOW_TOKENIZER)
    ]
    # a repository's folder lies two above that of its transformer
    for path in (folder, *list(folder.parents)[:2], *place.roots, *repositories):
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                return path / name
    for path in (folder, *repositories):
        if (path / "vae").is_dir():
            return path / "vae"
    raise CheckpointError(
        f"{folder}: no tokenizer ({' or '.join(TOKENIZER_FILES)}) is there or in "
        f"{FLOW_TOKENIZER[0]} below {place.searched}; --tokenizer_dir names another"
    )


def open_encoder(opened: Opened) -> Reason1Files:
    """The text encoder Reason1."""
    return Reason1Files.find(opened, opened["transformer"].config.feature_width)


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    return {
        "transformer": FlowNetwork(FlowDiT, PRESETS[entry.preset]),
        "tokenizer": Network(WanTokenizer, WanTokenizerConfig()),
        "text": TextPart(NUM_PARAMETERS),
    }


FAMILY = Family(
    name="predict2.5",
    request=FlowRequest,
    options=FlowOptions,
    parts=(
        Part(
            "text", "offload_text_encoder", open_encoder, option="text_encoder_dir", optional=True
        ),
        Part("tokenizer", "offload_tokenizer", open_tokenizer, option="tokenizer_dir"),
        Part("transformer", "offload_diffusion_model", open_transformer),
    ),
    agree=(("tokenizer", "latent_channels", "transformer", "latent_channels"),),
    check=refuse,
    stages=stages,
    generate=generate,
    presets=presets,
    guardrails=lambda opened: "predict2.5",
    unused=unused,
    report=report_entries,
    notes=notes,
)
