"""The files, the parts and the memory of a diffusion world."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldline.choices import GENERATIONS, NEGATIVE_PROMPT, ROTARY_PRECISIONS, Generation
from worldline.errors import CheckpointError, InputError
from worldline.files import holds_diffusers, unfinished
from worldline.loading.folders import (
    is_diffusion,
    open_transformer,
    read_settings,
    refuse_decoder,
    stamps,
    typed_settings,
)
from worldline.loading.memory import (
    DiffusionPlan,
    coding_bytes,
    count_parameters,
    denoise_bytes,
    residents,
)
from worldline.loading.parts import DenoisingParts, EncoderKind, find_text
from worldline.loading.predict2_5 import refuse_flow
from worldline.locate import Place
from worldline.models.predict1_dit.model import DiT, DiTConfig
from worldline.models.predict1_dit.weights import open_dit
from worldline.shapes import LatentShape, VideoShape
from worldline.text.t5 import RELEASED, T5Files, find_t5, t5_folders
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import (
    LatentStatistics,
    holds_vae_weights,
    read_statistics,
)
from worldline.tokenizers.cosmos.stream import CHUNK
from worldline.tokenizers.cosmos.weights import key_map
from worldline.weights.dit import DiTFiles, Layout, find_dit
from worldline.weights.keymap import match
from worldline.weights.read import Checkpoint

logger = logging.getLogger(__name__)

RELEASED_CONTEXT = 512  # rows of a text embedding
T5 = EncoderKind("T5", RELEASED, t5_folders, find_t5)

CONTINUOUS_TOKENIZERS = {
    "Predict1": ("Cosmos-Tokenize1-CV8x8x8-720p", "Cosmos-1.0-Tokenizer-CV8x8x8"),
    "1.0": ("Cosmos-1.0-Tokenizer-CV8x8x8", "Cosmos-Tokenize1-CV8x8x8-720p"),
}
# a config.json with one of these was written by worldline
_OWN_SETTINGS = ("rope_ratio", "base_fps", "text2world")
_MOST_GIVEN = 9  # frames that are continued
STATISTICS = (
    "mean_std.pt",
    "image_mean_std.pt",
    "mean_std.safetensors",
    "config.json",
    "vae/config.json",
)


@dataclass(frozen=True, kw_only=True)
class WorldDefaults:
    """What a request asks for where it does not say, and what the weights were trained to do.

    Attributes:
        num_video_frames: of a video.
        height: of a video.
        width: of a video.
        fps: of a video.
        guidance: strength of the prompt.
        num_steps: of the sampler.
        text2world: makes videos from a prompt alone.
        negative_prompt: what a video should not be; empty for none.
        rotary_precision: of the angles of position.
    """

    text2world: bool
    num_video_frames: int = 121
    height: int = 704
    width: int = 1280
    fps: float = 24.0
    guidance: float = 7.0
    num_steps: int = 35
    negative_prompt: str = NEGATIVE_PROMPT
    rotary_precision: str = ROTARY_PRECISIONS[0]

    @property
    def video(self) -> VideoShape:
        return VideoShape(self.num_video_frames, self.height, self.width)


@dataclass(frozen=True)
class DiffusionFiles:
    """A diffusion world on disk, checked but not read.

    Attributes:
        folder: of the transformer.
        bundled: whether it ships with the package.
        dit: the transformer.
        tokenizer: the tensors of the continuous tokenizer.
        tokenizer_config: what they imply.
        statistics: of the tokenizer's latents.
        text: the text encoder; None where there is none.
        why_no_text: why not.
        defaults: of requests.
        generation: whose sampler is the default.
    """

    folder: Path
    bundled: bool
    dit: DiTFiles[DiTConfig]
    tokenizer: Checkpoint
    tokenizer_config: CosmosTokenizerConfig
    statistics: LatentStatistics
    text: T5Files | None
    why_no_text: str
    defaults: WorldDefaults
    generation: Generation

    @property
    def config(self) -> DiTConfig:
        return self.dit.config

    @property
    def context_length(self) -> int:
        """Rows of a text embedding."""
        return self.text.max_length if self.text else RELEASED_CONTEXT

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what this world makes.

        Raises:
            CheckpointError: a file has vanished.
        """
        source = self.dit.source
        settings = dict.fromkeys(path.parent / "config.json" for path in source.files)
        folder = self.tokenizer.path if self.tokenizer.path.is_dir() else self.tokenizer.path.parent
        scales = [folder / name for name in STATISTICS]
        found = stamps(
            {
                "transformer": [*source.files, *filter(Path.exists, settings)],
                "tokenizer": [*self.tokenizer.files, *filter(Path.exists, scales)],
            }
        )
        if self.text is not None:
            found["text_encoder"] = self.text.identity()
        return found


class DiffusionParts(DenoisingParts[DiT, CosmosTokenizer, DiffusionFiles]):
    """The networks of such a world."""

    @property
    def config(self) -> DiTConfig:
        return self.transformer.module.config


def open_diffusion(
    place: Place,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    generation: str | None = None,
) -> DiffusionFiles:
    """Check the files of a diffusion world.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
        InputError: there is no such generation.
    """
    folder = place.folder
    if generation not in (None, *GENERATIONS):
        raise InputError(f"generation is {generation!r}; it must be {' or '.join(GENERATIONS)}")
    named = place.named
    refuse_flow(named)
    if not holds_diffusers(named) and not is_diffusion(source := open_transformer(named)):
        raise CheckpointError(
            f"{source.path} is no diffusion transformer (tensors such as "
            f"{', '.join(sorted(source.tensors)[:2])})"
        )
    try:
        file, layout = find_dit(named)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(folder)}") from error
    if layout == "diffusers" and folder.name == "transformer":
        folder = folder.parent
    dit, settings = _open_dit(file, layout, folder)
    refuse_decoder(folder, dit.source)
    defaults = _read_defaults(settings, dit.config, folder)
    chosen = generation_of(folder, generation)

    tokenizer_folder = _tokenizer_folder(place, folder, layout, tokenizer_dir, chosen)
    try:
        tokenizer, tokenizer_config = open_tokenizer(tokenizer_folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(tokenizer_folder)}") from error
    check_continuous(tokenizer, tokenizer_config, dit)
    scales = tokenizer_folder if tokenizer_folder.is_dir() else tokenizer_folder.parent
    statistics = read_statistics(scales, tokenizer_config.latent_channels)
    if statistics is None:
        raise CheckpointError(
            f"{scales} holds no mean_std.pt, the statistics of the tokenizer's latents, without "
            f"which a diffusion world cannot use it{unfinished(scales)}"
        )
    text, why_no_text = find_text(
        T5, place, folder, layout, text_encoder_dir, dit.config.context_width
    )
    return DiffusionFiles(
        folder,
        place.bundled,
        dit,
        tokenizer,
        tokenizer_config,
        statistics,
        text,
        why_no_text,
        defaults,
        chosen,
    )


def generation_of(folder: Path, asked: str | None) -> Generation:
    """Return the generation as asked, else by the name of the model's own folder."""
    folder = folder.absolute()
    name = folder.name
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        name = repository  # a hub cache names a snapshot by its hash
    found = re.search(r"Cosmos-(1\.0|Predict1)-", name)
    by_name = found[1] if found else None
    if asked is not None and by_name not in (None, asked):
        logger.info("generation %s as asked, though %s is named as one of %s", asked, name, by_name)
    return "1.0" if (asked or by_name) == "1.0" else "Predict1"


def _open_dit(
    file: Path, layout: Layout, folder: Path
) -> tuple[DiTFiles[DiTConfig], dict[str, Any]]:
    """Open the transformer; return it with what our config.json beside it says.

    The released pipelines read no config.json, and what lies there may be anything. It matters only
    if it is ours, or if the transformer cannot do without it.
    """
    if layout == "diffusers":
        return open_dit(file), {}
    try:
        settings = read_settings(folder)
    except CheckpointError as unreadable:
        try:
            dit = open_dit(file)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {unreadable}") from unreadable
        logger.info("%s; a released model does without", unreadable)
        return dit, {}
    if settings and not any(name in settings for name in _OWN_SETTINGS):
        logger.info("%s has no effect: it is not of worldline", folder / "config.json")
        settings = {}
    fps = settings.get("base_fps", 24.0)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise CheckpointError(f"{folder / 'config.json'}: base_fps is {fps!r}")
    return open_dit(file, settings), settings


def _read_defaults(settings: Mapping[str, Any], config: DiTConfig, folder: Path) -> WorldDefaults:
    """Return what config.json says of requests; the released files say nothing."""
    given: dict[str, Any] = {"text2world": not config.condition_mask}
    kinds: dict[str, tuple[type, ...]] = {
        "text2world": (bool,),
        "num_video_frames": (int,),
        "height": (int,),
        "width": (int,),
        "fps": (int, float),
        "guidance": (int, float),
        "num_steps": (int,),
        "negative_prompt": (str,),
        "rotary_precision": (str,),
    }
    given |= typed_settings(settings, kinds, folder)
    defaults = WorldDefaults(**given)
    if defaults.rotary_precision not in ROTARY_PRECISIONS:
        raise CheckpointError(
            f"{folder / 'config.json'}: rotary_precision is {defaults.rotary_precision!r}"
        )
    return defaults


def _tokenizer_folder(
    place: Place,
    folder: Path,
    layout: Layout,
    asked: str | Path | None,
    generation: Generation,
) -> Path:
    if asked is not None:
        return place.chosen(asked, "tokenizer_dir")
    own = folder / "vae"
    if layout == "diffusers" and holds_vae_weights(own):
        return own
    names = CONTINUOUS_TOKENIZERS[generation]
    found = place.below(names)
    if found is None and own.is_dir():
        return own
    if found is None:
        raise CheckpointError(
            f"no continuous tokenizer: neither {names[0]} nor {names[1]} is in {place.searched} "
            "(--tokenizer_dir names another)"
        )
    return found


def check_continuous(
    source: Checkpoint, config: CosmosTokenizerConfig, dit: DiTFiles[DiTConfig]
) -> None:
    """Refuse a tokenizer that does not make the latents of a transformer.

    Raises:
        CheckpointError: it is discrete, a tensor does not fit, or it has other channels.
    """
    if config.levels is not None:
        raise CheckpointError(
            f"{source.path} is a discrete tokenizer; a diffusion world needs a continuous one, "
            f"such as {CONTINUOUS_TOKENIZERS['Predict1'][0]}"
        )
    with torch.device("meta"):
        network = CosmosTokenizer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    match(source.tensors, shapes, key_map(config), str(source.path))
    if config.latent_channels != dit.config.latent_channels:
        raise CheckpointError(
            f"{source.path} gives latents of {config.latent_channels} channels, but "
            f"{dit.source.path} was trained on {dit.config.latent_channels}: "
            "they do not belong together"
        )


def plan_diffusion(
    config: DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    *,
    video: VideoShape,
    dtype: torch.dtype,
    text_bytes: int = 0,
    context_length: int = RELEASED_CONTEXT,
    fused: bool = True,
    batch: int = 1,
    offload_diffusion_transformer: bool = False,
    offload_tokenizer: bool = False,
    offload_text_encoder_model: bool = False,
    visitor_bytes: int = 0,
) -> DiffusionPlan:
    """Estimate the memory of one clip; `benchmarks/diffusion_end_to_end.py` compares.

    Args:
        config: of the transformer.
        tokenizer: its configuration.
        video: size of the clip.
        dtype: of transformer and tokenizer.
        text_bytes: of the text encoder's weights; 0 where there is none.
        context_length: rows of a text embedding.
        fused: kernels do the work between the layers, see `worldline.nn.modulation`.
        batch: branches of the guidance that the transformer computes at once.
        offload_diffusion_transformer: it waits in host memory.
        offload_tokenizer: likewise.
        offload_text_encoder_model: likewise.
        visitor_bytes: of the largest network that comes to the device beside the world while it is
            used, such as an offloaded guard; 0 for none.
    """
    size = dtype.itemsize
    weights = {
        "transformer": count_parameters(DiT, config) * size,
        "tokenizer": count_parameters(CosmosTokenizer, tokenizer) * size,
        "text": text_bytes,
    }
    offloaded = {
        "transformer": offload_diffusion_transformer,
        "tokenizer": offload_tokenizer,
        "text": offload_text_encoder_model,
    }
    resident = residents(weights, offloaded, dtype)
    grid = latent_grid(tokenizer, video)
    denoising = denoise_bytes(config, grid, dtype, context_length, fused=fused, batch=batch)
    coding = resident("tokenizer")

    def pixels(frames: int) -> int:
        """Bytes of the tokenizer's activations for frames that are computed at once."""
        cells = -(-frames // tokenizer.patch)
        cells *= (video.height // tokenizer.patch) * (video.width // tokenizer.patch)
        widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)
        return 2 * coding_bytes(cells, widest, size)

    at_once = min(video.frames, CHUNK * tokenizer.temporal)
    seen = 2 * grid.tokens * tokenizer.level_channels[-1] * size  # keys and values of what was
    return DiffusionPlan(
        text=resident("text") + text_bytes // 20,
        encode=coding + pixels(min(video.frames, _MOST_GIVEN)),
        denoise=resident("transformer") + denoising,
        decode=coding + pixels(at_once) + seen,
        visit=resident("") + visitor_bytes if visitor_bytes else 0,
    )


def latent_grid(tokenizer: CosmosTokenizerConfig, video: VideoShape) -> LatentShape:
    """Return the grid of latents of a video.

    Raises:
        ValueError: the tokenizer cannot take this size.
    """
    return video.latent(tokenizer.temporal, tokenizer.spatial)
