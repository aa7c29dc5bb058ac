"""The files, the parts and the memory of a diffusion world."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.choices import GENERATIONS, NEGATIVE_PROMPT, ROTARY_PRECISIONS, Generation
from worldline.errors import CheckpointError, InputError
from worldline.files import unfinished
from worldline.loading.folders import (
    holds_diffusers,
    is_diffusion,
    open_transformer,
    read_settings,
    refuse_decoder,
    stamps,
)
from worldline.loading.memory import coding_bytes, count_parameters, workspace
from worldline.models.predict1_dit.model import HIDDEN_BYTES, DiT, DiTConfig
from worldline.models.predict1_dit.weights import DiTFiles, Layout, find_dit, open_dit
from worldline.parallel.offload import Part
from worldline.places import Place
from worldline.shapes import LatentShape, VideoShape
from worldline.text.cache import EmbeddingCache
from worldline.text.t5 import (
    RELEASED,
    T5Encoder,
    T5Files,
    find_t5,
    load_t5,
    t5_folders,
    tell_if_cut,
)
from worldline.tokenizers.cosmos.colours import fit_colours
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import (
    LatentStatistics,
    holds_vae_weights,
    read_statistics,
)
from worldline.tokenizers.cosmos.stream import CHUNK
from worldline.tokenizers.cosmos.weights import key_map
from worldline.weights.keymap import match
from worldline.weights.read import Checkpoint

logger = logging.getLogger(__name__)

RELEASED_CONTEXT = 512  # rows of a text embedding

CONTINUOUS_TOKENIZERS = {
    "Predict1": ("Cosmos-Tokenize1-CV8x8x8-720p", "Cosmos-1.0-Tokenizer-CV8x8x8"),
    "1.0": ("Cosmos-1.0-Tokenizer-CV8x8x8", "Cosmos-Tokenize1-CV8x8x8-720p"),
}
_STREAMS = 7  # activations of every token that a block holds at once (measured)
_PLAIN_STREAMS = 9  # likewise without kernels, which change nothing in place
_PLAIN_HEADS = 4  # and while heads are normed and turned, in float32 or wider
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
    dit: DiTFiles
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


class TextPart:
    """The text encoder behind its cache: weights are read when a prompt is not in it.

    Attributes:
        files: of the encoder.
        device: where it runs.
        dtype: of its weights.
        offload: whether its home is the host.
    """

    def __init__(
        self,
        files: T5Files,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool,
        cache: EmbeddingCache,
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.offload = offload and device.type != "cpu"
        self._cache = cache
        self._part: Part[T5Encoder] | None = None
        self._key = json.dumps([files.identity(), str(dtype), files.max_length], sort_keys=True)

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embedding (1, S, E) of each prompt, on the CPU.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        found: dict[str, Tensor] = {}
        for prompt in prompts:
            cached = self._cache.get(self._key, prompt)
            if cached is not None:
                tell_if_cut(self.files, prompt)  # what the encoder would say
                found[prompt] = cached.view(1, *cached.shape[-2:])
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if not missing:
            return found
        with torch.inference_mode(), self._read().on_device() as encoder:
            for prompt in missing:
                found[prompt] = encoder.encode([prompt], self.files.max_length).cpu()
        for prompt in missing:
            self._cache.put(self._key, prompt, found[prompt])
        return found

    def _read(self) -> Part[T5Encoder]:
        if self._part is None:
            logger.info("reading %s", self.files.folder)
            home = torch.device("cpu") if self.offload else self.device
            encoder = load_t5(self.files, home, self.dtype)
            self._part = Part(encoder, self.device, offload=self.offload)
        return self._part


@dataclass(frozen=True)
class DiffusionParts:
    """A world's networks, each on its device or waiting in host memory.

    Attributes:
        transformer: the denoiser.
        tokenizer: pixels to latents and back.
        text: prompts to embeddings; None where there is none.
        files: that they were read from.
    """

    transformer: Part[DiT]
    tokenizer: Part[CosmosTokenizer]
    text: TextPart | None
    files: DiffusionFiles

    @property
    def config(self) -> DiTConfig:
        return self.transformer.module.config

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @cached_property
    def colours(self) -> Tensor:
        """What the latents look like, for previews: of `fit_colours`, once for all requests.

        First to be read while the tokenizer is on its device.
        """
        return fit_colours(self.tokenizer.module)

    @property
    def video(self) -> VideoShape:
        """Size of what this world makes unless asked for another."""
        defaults = self.files.defaults
        return VideoShape(defaults.num_video_frames, defaults.height, defaults.width)


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
    text, why_no_text = find_text(place, folder, layout, text_encoder_dir)
    if text is not None and text.width != dit.config.context_width:
        why_no_text = (
            f"{text.folder} gives embeddings of width {text.width}, "
            f"but {folder} was trained on {dit.config.context_width}"
        )
        if text_encoder_dir is not None:
            raise CheckpointError(f"{why_no_text}: they do not belong together")
        text = None
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


def _open_dit(file: Path, layout: Layout, folder: Path) -> tuple[DiTFiles, dict[str, Any]]:
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
    for name, expected in kinds.items():
        value = settings.get(name)
        if value is None:
            continue
        of_kind = isinstance(value, expected) and isinstance(value, bool) == (bool in expected)
        if not of_kind or (not isinstance(value, str) and not 0 <= value < math.inf):
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value!r}")
        given[name] = value
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


def check_continuous(source: Checkpoint, config: CosmosTokenizerConfig, dit: DiTFiles) -> None:
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


def find_text(
    place: Place, folder: Path, layout: Layout, asked: str | Path | None
) -> tuple[T5Files | None, str]:
    """Return the text encoder, or why there is none.

    Raises:
        CheckpointError: the one that is asked for is absent or damaged.
    """
    if asked is not None:
        return find_t5(place.chosen(asked, "text_encoder_dir")), ""
    present = [path for root in place.roots for path in t5_folders(root)]
    if (folder / "text_encoder").is_dir():
        present.insert(0 if layout == "diffusers" else len(present), folder / "text_encoder")
    if not present:
        return None, f"there is no text encoder: no folder {RELEASED} in {place.searched}"
    reasons = []
    for path in present:
        try:
            return find_t5(path), ""
        except CheckpointError as error:
            reasons.append(f"the text encoder is not whole: {error}")
    return None, reasons[0]


@dataclass(frozen=True)
class DiffusionPlan:
    """Bytes that a request will hold on its device, stage by stage.

    Attributes:
        text: while prompts are encoded.
        encode: while given frames become latents.
        denoise: while the sampler runs.
        decode: while latents become pixels.
    """

    text: int
    encode: int
    denoise: int
    decode: int

    @property
    def peak(self) -> int:
        return max(self.text, self.encode, self.denoise, self.decode)


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

    def resident(used: str) -> int:
        there = (n for part, n in weights.items() if part == used or not offloaded[part])
        return sum(there) + workspace(dtype)

    grid = latent_grid(tokenizer, video)
    _, rows, columns = config.patch
    tokens = grid.tokens // (rows * columns)
    stream = batch * tokens * config.width * size
    # the stream, positions, the norm's output, q, k, v before and after their norms, and the result
    hidden = min(batch * tokens * config.hidden * size, HIDDEN_BYTES)
    inner = config.num_heads * config.head_size
    activations = _STREAMS * stream + hidden
    if not fused:
        heads = _PLAIN_HEADS * batch * tokens * inner * max(size, torch.float32.itemsize)
        activations = _PLAIN_STREAMS * stream + max(2 * hidden, heads)
    contexts = 2 * 2 * config.depth * context_length * inner * size
    latents = 12 * config.latent_channels * grid.tokens * 8  # states of the sampler, up to float64
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
        denoise=resident("transformer") + activations + contexts + latents,
        decode=coding + pixels(at_once) + seen,
    )


def latent_grid(tokenizer: CosmosTokenizerConfig, video: VideoShape) -> LatentShape:
    """Return the grid of latents of a video.

    Raises:
        ValueError: the tokenizer cannot take this size.
    """
    return video.latent(tokenizer.temporal, tokenizer.spatial)


def text_bytes(files: T5Files | None, dtype: torch.dtype) -> int:
    """Return the bytes of the text encoder's weights."""
    return 0 if files is None else files.num_parameters * dtype.itemsize


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the text encoder in a world of this one; T5 overflows in float16."""
    return dtype if dtype == torch.float32 else torch.bfloat16
