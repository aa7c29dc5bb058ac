"""The files, the parts and the memory of a world of Cosmos-Predict2.5."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from worldline.catalog import FLOW_MODELS, FLOW_TOKENIZER, FlowModel
from worldline.choices import FLOW_OFFLOAD_FLAGS, NEGATIVE_PROMPT, ScheduleName
from worldline.errors import CheckpointError, InputError
from worldline.files import holds_diffusers, read_json, released_folders
from worldline.loading.folders import read_settings, stamps, typed_settings, world_name
from worldline.loading.memory import (
    DiffusionPlan,
    Need,
    check_memory,
    coding_bytes,
    count_parameters,
    denoise_bytes,
    residents,
)
from worldline.loading.parts import (
    DenoisingParts,
    EncoderKind,
    find_text,
    read_part,
    text_bytes,
    text_dtype,
    text_part,
)
from worldline.locate import Place, locate
from worldline.models.predict2_5_dit.model import PRESETS, FlowDiT, FlowDiTConfig
from worldline.models.predict2_5_dit.weights import FILE_NAMES, is_flow_dit, open_flow_dit
from worldline.nn.modulation import fused
from worldline.parallel.offload import Part
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.text.encoder_files import MAX_LENGTH
from worldline.text.reason1 import (
    RELEASED,
    Reason1Files,
    embedding_cache,
    find_reason1,
    load_reason1,
    reason1_folders,
)
from worldline.tokenizers.wan.load import FILES as TOKENIZER_FILES
from worldline.tokenizers.wan.load import WanFiles, load_wan, open_wan
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.stream import CHUNK
from worldline.weights.dit import DiTFiles, Layout, find_dit, open_file

logger = logging.getLogger(__name__)

REASON1 = EncoderKind("Reason1", RELEASED, reason1_folders, find_reason1)

_KNOWN_TIMESTEP = {"karras": 0.1, "shifted": None}
_SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class FlowRules:
    """How a model is sampled, which none of its tensors tells.

    Attributes:
        schedule: of the noise levels.
        known_timestep: what it is told of given frames; None tells it the same of all frames.
    """

    schedule: ScheduleName
    known_timestep: float | None


def rules_of(schedule: ScheduleName) -> FlowRules:
    """Return how the released models of a schedule are sampled."""
    return FlowRules(schedule, _KNOWN_TIMESTEP[schedule])


@dataclass(frozen=True, kw_only=True)
class FlowDefaults:
    """What a request asks for where it does not say.

    Attributes:
        num_video_frames: of a video.
        height: of a video.
        width: of a video.
        fps: of a video.
        guidance: strength of the prompt.
        num_steps: of the sampler.
        negative_prompt: what a video should not be.
    """

    num_video_frames: int = 93
    height: int = 704
    width: int = 1280
    fps: float = 16.0
    guidance: float = 7.0
    num_steps: int = 35
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def video(self) -> VideoShape:
        return VideoShape(self.num_video_frames, self.height, self.width)


_KINDS: dict[str, tuple[type, ...]] = {
    "num_video_frames": (int,),
    "height": (int,),
    "width": (int,),
    "fps": (int, float),
    "guidance": (int, float),
    "num_steps": (int,),
    "negative_prompt": (str,),
}


@dataclass(frozen=True)
class FlowFiles:
    """A world of Predict2.5 on disk, checked but not read.

    Attributes:
        name: as released, else of its folder.
        folder: of the transformer.
        bundled: whether it ships with the package.
        dit: the transformer.
        tokenizer: of Wan2.1.
        text: the text encoder; None where there is none.
        why_no_text: why not.
        defaults: of requests.
        rules: of sampling.
    """

    name: str
    folder: Path
    bundled: bool
    dit: DiTFiles[FlowDiTConfig]
    tokenizer: WanFiles
    text: Reason1Files | None
    why_no_text: str
    defaults: FlowDefaults
    rules: FlowRules

    @property
    def config(self) -> FlowDiTConfig:
        return self.dit.config

    @property
    def tokenizer_config(self) -> WanTokenizerConfig:
        return self.tokenizer.config

    @property
    def context_length(self) -> int:
        """Rows of a text embedding."""
        return self.text.max_length if self.text else MAX_LENGTH

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what this world makes.

        Raises:
            CheckpointError: a file has vanished.
        """
        parts = {"transformer": self.dit.source, "tokenizer": self.tokenizer.source}
        found: dict[str, Any] = {}
        for part, source in parts.items():
            settings = dict.fromkeys(path.parent / "config.json" for path in source.files)
            found |= stamps({part: [*source.files, *filter(Path.exists, settings)]})
        if self.text is not None:
            found["text_encoder"] = self.text.identity()
        return found


class FlowParts(DenoisingParts[FlowDiT, WanTokenizer, FlowFiles]):
    """The networks of such a world."""

    @property
    def config(self) -> FlowDiTConfig:
        return self.transformer.module.config


def find_predict2_5(
    model: str | Path,
    checkpoint_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    schedule: ScheduleName | None = None,
) -> FlowFiles:
    """Find and check the files of a world of Predict2.5.

    Args:
        model: a released name such as "2B/post-trained"; "tiny-…" for a bundled one; a folder's
            name below `checkpoint_dir`; or a path, of a file too. A folder of a whole repository
            gives its post-trained model where it holds several.
        checkpoint_dir: holds the folders, those of tokenizer and text encoder too.
        tokenizer_dir: another tokenizer, by a name below `checkpoint_dir` or a path.
        text_encoder_dir: another text encoder, likewise.
        schedule: how the model is sampled; by default as the released model of this file name, as
            config.json beside it says, or (diffusers) as its scheduler does. A file of which
            nothing is known is taken for one that was trained from `2B/pre-trained`: "shifted".

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model. That there is no
            text encoder is no error here: embeddings may be given.
        InputError: there is no such schedule.
    """
    return open_predict2_5(
        locate(model, checkpoint_dir),
        tokenizer_dir=tokenizer_dir,
        text_encoder_dir=text_encoder_dir,
        schedule=schedule,
    )


def open_predict2_5(
    place: Place,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    schedule: ScheduleName | None = None,
) -> FlowFiles:
    """Check the files of a world of Predict2.5; see `find_predict2_5`.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
        InputError: there is no such schedule.
    """
    if schedule not in (None, *get_args(ScheduleName)):
        known = " or ".join(get_args(ScheduleName))
        raise InputError(f"schedule is {schedule!r}; it must be {known}")
    named = _find_transformer(place.named)
    file, layout = find_dit(named, FILE_NAMES)
    folder = named if named.is_dir() else named.parent
    if layout == "diffusers" and folder.name == "transformer":
        folder = folder.parent
    settings = read_settings(folder) if layout == "nvidia" else {}
    try:
        dit = open_flow_dit(file, settings)
    except CheckpointError as error:
        if is_flow_dit(open_file(file)):  # of a damaged file nothing but that is said
            raise
        raise CheckpointError(
            f"{place.named} is no world of Predict2.5; worldline diffusion or worldline "
            f"autoregressive may run it ({error})"
        ) from error
    tokenizer = open_wan(_tokenizer_path(place, folder, layout, tokenizer_dir))
    _check_tokenizer(tokenizer, dit)
    text, why_no_text = find_text(
        REASON1, place, folder, layout, text_encoder_dir, dit.config.feature_width
    )
    released = place.released or (None if place.bundled else _released_as(file))
    return FlowFiles(
        released.name if released else place.folder.name,
        folder,
        place.bundled,
        dit,
        tokenizer,
        text,
        why_no_text,
        FlowDefaults(**typed_settings(settings, _KINDS, folder)),
        _rules(schedule, released, settings, folder, dit),
    )


def holds_flow(named: Path) -> bool:
    """Tell whether a folder, or a file, holds a transformer of Predict2.5, by names alone."""
    try:
        file, _ = find_dit(_find_transformer(named), FILE_NAMES)
        return is_flow_dit(open_file(file))
    except CheckpointError:
        return False


def refuse_flow(named: Path) -> None:
    """Refuse a world of Predict2.5 where one of another family is wanted.

    Raises:
        CheckpointError: it is one.
    """
    if holds_flow(named):
        raise CheckpointError(
            f"{named} is a world of Predict2.5: use worldline predict2.5, or worldline.load in "
            "Python"
        )


def _find_transformer(named: Path) -> Path:
    """Return the folder of the transformer in that of a whole repository; else `named` itself."""
    if named.is_file() or holds_diffusers(named):
        return named
    inside = [named / "base" / kind for kind in ("post-trained", "pre-trained")]
    held = [path for path in inside if path.is_dir()]
    if len(held) > 1:
        logger.info("%s holds several models: %s is taken", named, held[0].name)
    return held[0] if held else named


def _released_as(file: Path) -> FlowModel | None:
    """Return the released model that a file is, by its name or that of its folder."""
    for model in FLOW_MODELS:
        own = Path(model.file)
        identifier = own.name.partition("_")[0]
        if file.name == own.name or file.parent.name == identifier:
            return model
    return None


def _rules(
    asked: ScheduleName | None,
    released: FlowModel | None,
    settings: Mapping[str, Any],
    folder: Path,
    dit: DiTFiles[FlowDiTConfig],
) -> FlowRules:
    if asked is not None:
        return rules_of(asked)
    stated = settings.get("schedule")
    if stated is not None:
        if stated not in get_args(ScheduleName):
            raise CheckpointError(f"{folder / 'config.json'}: schedule is {stated!r}")
        return rules_of(stated)
    if released is not None:
        return FlowRules(released.schedule, released.known_timestep)
    # the scheduler of diffusers' 14B says the same as that of 2B, which it was not made for
    large = dit.config.width == PRESETS["14B"].width
    if dit.layout == "diffusers" and not large and (folder / _SCHEDULER).is_file():
        karras = read_json(folder / _SCHEDULER).get("use_karras_sigmas")
        return rules_of("karras" if karras else "shifted")
    return rules_of("shifted")


def _tokenizer_path(place: Place, folder: Path, layout: Layout, asked: str | Path | None) -> Path:
    if asked is not None:
        return place.chosen(asked, "tokenizer_dir")
    if layout == "diffusers" and (folder / "vae").is_dir():
        return folder / "vae"
    repositories = [
        path for root in place.roots for path in released_folders(root, *FLOW_TOKENIZER)
    ]
    # a repository's folder lies two above that of its transformer
    around = [folder, *list(folder.parents)[:2], *place.roots, *repositories]
    for path in around:
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                return path / name
    for path in (folder, *repositories):
        if (path / "vae").is_dir():
            return path / "vae"
    raise CheckpointError(
        f"no tokenizer: neither {' nor '.join(TOKENIZER_FILES)} is in {folder} or in "
        f"{FLOW_TOKENIZER[0]} below {place.searched} (--tokenizer_dir names another)"
    )


def _check_tokenizer(tokenizer: WanFiles, dit: DiTFiles[FlowDiTConfig]) -> None:
    given, wanted = tokenizer.config.latent_channels, dit.config.latent_channels
    if given != wanted:
        raise CheckpointError(
            f"{tokenizer.source.path} gives latents of {given} channels, but {dit.source.path} was "
            f"trained on {wanted}: they do not belong together"
        )


def load_predict2_5(
    files: FlowFiles,
    device: torch.device,
    dtype: torch.dtype,
    recorder: Recorder,
    *,
    offload_diffusion_model: bool = False,
    offload_tokenizer: bool = False,
    offload_text_encoder: bool = False,
    video: VideoShape | None = None,
    text: bool = True,
    visitor_bytes: int = 0,
) -> FlowParts:
    """Read the weights of a world; those of the text encoder wait for a prompt that needs them.

    Args:
        files: found and checked.
        device: where it runs.
        dtype: of transformer and tokenizer; the reference's is bfloat16.
        recorder: is told seconds and memory.
        offload_diffusion_model: keep it in host memory while it is not used.
        offload_tokenizer: likewise.
        offload_text_encoder: likewise.
        video: the largest that will be made; by default of the world's own size.
        text: whether prompts will be encoded, which takes memory; False where embeddings are given.
        visitor_bytes: of `plan_predict2_5`.

    Raises:
        InsufficientMemoryError: the device is too small for such a video.
    """
    chosen = {
        "offload_diffusion_model": offload_diffusion_model,
        "offload_tokenizer": offload_tokenizer,
        "offload_text_encoder": offload_text_encoder,
    }

    given = [flag for flag, wanted in chosen.items() if wanted]
    need = need_predict2_5(
        files, device, dtype, video=video, text=text, visitor_bytes=visitor_bytes
    )
    name = world_name(files.name, bundled=files.bundled)
    check_memory(name, need, FLOW_OFFLOAD_FLAGS, device, given)
    logger.info("reading %s", files.folder)
    with recorder.stage("load"):
        transformer: Part[FlowDiT] = read_part(
            FlowDiT,
            files.config,
            files.dit.source,
            files.dit.keys,
            device,
            dtype,
            offload_diffusion_model,
        )
        home = torch.device("cpu") if offload_tokenizer else device
        tokenizer = Part(load_wan(files.tokenizer, home, dtype), device, offload=offload_tokenizer)
    encoder = text_part(
        files.text,
        load_reason1,
        device,
        text_dtype(dtype),
        offload=offload_text_encoder,
        cache=embedding_cache(),
    )
    return FlowParts(transformer, tokenizer, encoder, files)


def need_predict2_5(
    files: FlowFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    video: VideoShape | None = None,
    text: bool = True,
    visitor_bytes: int = 0,
) -> Need:
    """Return what a world needs by its flags; the arguments are those of `load_predict2_5`."""
    return lambda flags: (
        plan_predict2_5(
            files.config,
            files.tokenizer_config,
            video=video or files.defaults.video,
            dtype=dtype,
            text_bytes=text_bytes(files.text if text else None, text_dtype(dtype)),
            context_length=files.context_length,
            fused=fused(device),
            visitor_bytes=visitor_bytes,
            **dict.fromkeys(flags, True),
        ).peak
    )


def plan_predict2_5(
    config: FlowDiTConfig,
    tokenizer: WanTokenizerConfig,
    *,
    video: VideoShape,
    dtype: torch.dtype,
    text_bytes: int = 0,
    context_length: int = MAX_LENGTH,
    fused: bool = True,
    offload_diffusion_model: bool = False,
    offload_tokenizer: bool = False,
    offload_text_encoder: bool = False,
    visitor_bytes: int = 0,
) -> DiffusionPlan:
    """Estimate the memory of one clip.

    Args:
        config: of the transformer.
        tokenizer: its configuration.
        video: size of the clip.
        dtype: of transformer and tokenizer.
        text_bytes: of the text encoder's weights; 0 where there is none.
        context_length: rows of a text embedding.
        fused: kernels do the work between the layers, see `worldline.nn.modulation`.
        offload_diffusion_model: it waits in host memory.
        offload_tokenizer: likewise.
        offload_text_encoder: likewise.
        visitor_bytes: of the largest network that comes to the device beside the world while it is
            used, such as an offloaded guard; 0 for none.
    """
    size = dtype.itemsize
    weights = {
        "transformer": count_parameters(FlowDiT, config) * size,
        "tokenizer": count_parameters(WanTokenizer, tokenizer) * size,
        "text": text_bytes,
    }
    offloaded = {
        "transformer": offload_diffusion_model,
        "tokenizer": offload_tokenizer,
        "text": offload_text_encoder,
    }
    resident = residents(weights, offloaded, dtype)
    grid = video.latent(tokenizer.temporal, tokenizer.spatial)
    # both ways go in pieces, whatever the length of the clip
    frames = min(video.frames, CHUNK * tokenizer.temporal)
    pixels = frames * video.height * video.width
    # what convolutions keep of the piece before, and their workspace: measured on one H200
    coding = 3 * coding_bytes(pixels, max(tokenizer.channels, 3), size)
    # the prompt's features, of which two are made, before and behind the layer that narrows them
    features = 2 * context_length * (config.feature_width + config.context_width) * size
    return DiffusionPlan(
        text=resident("text") + text_bytes // 20 + features,
        encode=resident("tokenizer") + coding,
        denoise=resident("transformer")
        + features
        + denoise_bytes(config, grid, dtype, context_length, fused=fused),
        decode=resident("tokenizer") + coding,
        visit=resident("") + visitor_bytes if visitor_bytes else 0,
    )
