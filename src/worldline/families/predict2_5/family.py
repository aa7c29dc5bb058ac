"""Cosmos-Predict2.5: prompt, image or clip -> latents -> a flow from noise to data -> video.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py` and
`_src/predict2/models/{text,video}2world_model_rectified_flow.py`.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.catalog import FLOW_MODELS, FLOW_TOKENIZER, Entry
from worldline.documents import read_json
from worldline.errors import CheckpointError, InputError, option
from worldline.families import denoise
from worldline.families.predict2_5.model import PRESETS, FlowDiT, FlowDiTConfig
from worldline.families.predict2_5.request import RELEASED_CHUNK, FlowOptions, FlowRequest
from worldline.families.predict2_5.weights import DIFFUSERS_KEYS, open_network
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.memory import Stage, coding_bytes
from worldline.nn.pieces import ALL_ROWS, Rows, encode_stream
from worldline.report import Recorder
from worldline.repositories import released_folders
from worldline.sampling.cache import StepCache
from worldline.sampling.flow import Conditioning, guided_velocity, make_schedule, unipc
from worldline.sampling.solvers import Steps
from worldline.shapes import LatentShape, VideoShape
from worldline.text.encoder import TextPart
from worldline.text.reason1 import NUM_PARAMETERS, NUM_STREAMED, Reason1Files
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import FILES as TOKENIZER_FILES
from worldline.tokenizers.wan.weights import open_wan
from worldline.video.convert import covering_frames
from worldline.video.read import Clip
from worldline.weights.networks import Network

STEP_CACHE = 0.2  # auto: the bundled world loses under 0.3 dB, see docs/performance.md
TRAINED_FRAMES = 93
TRAINED_FPS = 16
# height x width, of the resolution "720"
TRAINED_SIZES = ((960, 960), (704, 960), (960, 704), (704, 1280), (1280, 704))
KNOWN_TIMESTEPS = {model.schedule: model.known_timestep for model in FLOW_MODELS}


def sample_window(
    parts: Parts,
    window: FlowRequest,
    model: FlowDiT,
    noise: Tensor,
    known: Tensor | None,
    prompts: denoise.Prompts,
    cache: StepCache | None = None,
) -> tuple[int, Steps]:
    """Number of steps, and the steps to the latents of a window; see `denoise.generate`.

    The known frames keep the trace of noise that the sampler leaves in them, as in the reference.
    """
    network = parts.opened["transformer"]
    schedule = make_schedule(network.schedule, window.num_steps)
    positions = model.make_positions(LatentShape(*noise.shape[2:]))
    velocity = guided_velocity(
        denoise.conditioned(parts, model, noise, known, prompts, positions, cache),
        noise,
        schedule,
        guidance=window.guidance,
        conditioning=None if known is None else Conditioning(known, network.known_timestep),
    )
    return len(schedule.timesteps), unipc(velocity, noise, schedule.sigmas)


def encode_frames(parts: Parts, clip: Clip, request: FlowRequest, rows: Rows = ALL_ROWS) -> Tensor:
    """Latents (1, C, t, H, W) of the known frames, float32.

    The tokenizer is causal: frames behind the known ones, with which the reference fills the clip,
    would not change these.
    """
    size = request.height, request.width
    frames = covering_frames(clip, request.num_input_frames, *size, request.fit)
    # in the tokenizer's dtype, as in the reference
    video = frames.to(parts.device, parts.compute.dtype) / 127.5 - 1
    return torch.cat([*encode_stream(parts.tokenizer.module, [video], rows)], dim=2).float()


def cut_windows(opened: Opened, request: FlowRequest) -> list[tuple[FlowRequest, int]]:
    """What is denoised at once, and the number of frames that are made then.

    That is the request, or one for each chunk of a long video, which goes on from the last
    `chunk_overlap` frames of the one before. (The reference takes them for latent frames, and so
    gives more frames than it has made unless there is one.)
    """
    total, size, overlap = request.num_video_frames, request.chunk_size, request.chunk_overlap
    if size is None:
        return [(request, total)]
    frames = window_shape(opened, request).frames
    return [
        (
            request.model_copy(
                update={
                    "num_video_frames": frames,
                    "chunk_size": None,
                    "chunk_overlap": 1,
                    "num_input_frames": overlap if number else request.num_input_frames,
                    "seed": (request.seed + number) % 2**32,
                }
            ),
            min(total, start + size),
        )
        for number, start in enumerate(range(0, max(total - overlap, 1), size - overlap))
    ]


def window_shape(opened: Opened, request: FlowRequest) -> VideoShape:
    """Size of what is denoised at once.

    For a long video that is the model's own length: frames behind a chunk are made and left out, as
    in the reference, for the models know this length alone.
    """
    if request.chunk_size is None:
        return request.video
    return replace(request.video, frames=opened.defaults.get("num_video_frames", TRAINED_FRAMES))


def check(opened: Opened, request: FlowRequest) -> FlowRequest:
    """Refuse what the model cannot do; shorten chunks of the released length to the model's own."""
    window = window_shape(opened, request)
    if request.chunk_size is not None and request.chunk_size > window.frames:
        if request.chunk_size != RELEASED_CHUNK:
            raise InputError(
                f"chunk_size is {request.chunk_size}; the model makes {window.frames} at once"
            )
        request = request.model_copy(update={"chunk_size": window.frames})
    denoise.check_size(opened, window, request.num_input_frames)
    denoise.check_prompts(opened, request)
    rule = denoise.complete_cache(request.step_cache, len(ratios(opened, request)), STEP_CACHE)
    return request.model_copy(update={"step_cache": rule})


def ratios(opened: Opened, request: FlowRequest) -> list[float]:
    """Noise over data in each evaluation of a window's guided network."""
    schedule = make_schedule(opened["transformer"].schedule, request.num_steps)
    return (schedule.sigmas / (1 - schedule.sigmas)).tolist()[:-1]


def notes(opened: Opened, request: FlowRequest) -> list[str]:
    """What a request has that the released models, or this one by its settings, do not know."""
    frames, height, width = astuple(window_shape(opened, request))
    sizes = ", ".join(f"{height} x {width}" for height, width in TRAINED_SIZES)
    own = opened.defaults.get  # of a training of one's own, the size of its clips
    usual = (
        (
            frames in (1, TRAINED_FRAMES, own("num_video_frames")),
            f"{frames} frames at once; the models were trained on {TRAINED_FRAMES}",
        ),
        (
            (height, width) in (*TRAINED_SIZES, (own("height"), own("width"))),
            f"{height} x {width} pixels; the models were trained on {sizes}",
        ),
        (
            request.fps in (TRAINED_FPS, own("fps")),
            f"fps is {request.fps:g}; the models move at {TRAINED_FPS} all the same",
        ),
    )
    return [note for holds, note in usual if not (holds or opened.place.bundled)]


def report_entries(parts: Parts, request: FlowRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    opened, network = parts.opened, parts.opened["transformer"]
    grid = denoise.grid_of(opened, window_shape(opened, request))
    return {
        "schedule": network.schedule,
        "known_timestep": network.known_timestep,
        "evaluations": len(ratios(opened, request)),
        "chunks": len(cut_windows(opened, request)),
        **denoise.attention_entries(parts, parts.config, grid, bool(request.guidance)),
    }


def stages(opened: Opened, request: FlowRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights."""
    tokenizer, config = opened["tokenizer"].config, opened.config
    window, size = window_shape(opened, request), compute.dtype.itemsize
    # of both prompts, before and behind the layer that narrows them
    features = 2 * opened.text_length * (config.feature_width + config.context_width) * size
    frames = min(window.frames, WanTokenizer.chunk * tokenizer.temporal)  # pieces, both ways
    pixels = frames * window.height * window.width
    # what convolutions keep of the piece before, and their workspace: measured on one H200
    coding = 3 * coding_bytes(pixels, max(tokenizer.channels, 3), size)
    return denoise.stages(opened, request, compute, window, (coding, coding), features)


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
    """The transformer in either layout; sampled as chosen, stated, released, or else "shifted"."""
    network, file = open_network(opened.source, opened.settings or None), opened.source.path
    # a released file is known by its name or that of its folder
    names = {file.name, f"{file.parent.name}_ema_bf16.pt"}
    named = (model for model in FLOW_MODELS if Path(model.file).name in names)
    released = opened.place.released or next(named, None)
    schedule = opened.options.schedule or opened.settings.get("schedule")
    if schedule is None and released:
        schedule = released.schedule
    elif schedule is None:
        stated = opened.folder / "scheduler" / "scheduler_config.json"
        # in a folder of diffusers, but for 14B, where it is that of 2B
        holds = network.keys is DIFFUSERS_KEYS and network.config.width != PRESETS["14B"].width
        karras = holds and stated.is_file() and read_json(stated).get("use_karras_sigmas")
        schedule = "karras" if karras else "shifted"
    return FlowNetwork(**vars(network), schedule=schedule, known_timestep=KNOWN_TIMESTEPS[schedule])


def open_tokenizer(opened: Opened) -> Network[WanTokenizerConfig]:
    """The Wan2.1 tokenizer: as chosen, beside the transformer, or that of the 2B repository."""
    place, folder = opened.place, opened.folder
    if opened.options.tokenizer_dir is not None:
        return open_wan(place.chosen(opened.options.tokenizer_dir, "tokenizer_dir"))
    repositories = [
        path for root in place.roots for path in released_folders(root, *FLOW_TOKENIZER)
    ]
    # a repository's folder lies two above that of its transformer
    folders = (folder, *folder.parents[:2], *place.roots, *repositories)
    for path in (path / name for path in folders for name in (*TOKENIZER_FILES, "vae")):
        if path.exists():
            return open_wan(path)
    raise CheckpointError(
        f"{folder}: no tokenizer ({' or '.join(TOKENIZER_FILES)}) is there or in "
        f"{FLOW_TOKENIZER[0]} below {place.searched}; {option('tokenizer_dir')} names another"
    )


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    return {
        "transformer": FlowNetwork(FlowDiT, PRESETS[entry.preset]),
        "tokenizer": Network(WanTokenizer, WanTokenizerConfig()),
        "text": TextPart(NUM_PARAMETERS, NUM_STREAMED),
    }


generate = partial(
    denoise.generate,
    encode_frames=encode_frames,
    sample=sample_window,
    ratios=ratios,
    windows=cut_windows,
)
FAMILY = Family(
    name="predict2.5",
    request=FlowRequest,
    options=FlowOptions,
    parts=(
        Part(
            "text",
            "offload_text_encoder",
            lambda opened: Reason1Files.find(opened, opened.config.feature_width),
            option="text_encoder_dir",
            optional=True,
            split=False,
        ),
        Part("tokenizer", "offload_tokenizer", open_tokenizer, option="tokenizer_dir"),
        Part("transformer", "offload_diffusion_model", open_transformer),
    ),
    agree=(("tokenizer", "latent_channels", "transformer", "latent_channels"),),
    check=check,
    stages=stages,
    generate=generate,
    presets=presets,
    guardrails=lambda opened: "predict2.5",
    unused=denoise.unused,
    report=report_entries,
    notes=notes,
    layout=denoise.layout,
)
