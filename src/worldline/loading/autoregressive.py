"""The files, the parts and the memory of an autoregressive world."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS, CARRIED, INPUT_FRAMES
from worldline.errors import CheckpointError
from worldline.files import holds_diffusers, unfinished
from worldline.loading.decoder import (
    DecoderFiles,
    DecoderNeed,
    DecoderParts,
    open_decoder,
)
from worldline.loading.diffusion import RELEASED_CONTEXT, T5
from worldline.loading.folders import (
    is_diffusion,
    open_transformer,
    read_settings,
    refuse_decoder,
    refuse_options,
    stamps,
)
from worldline.loading.memory import coding_bytes, count_parameters, workspace
from worldline.loading.parts import TextPart, find_text
from worldline.loading.predict2_5 import refuse_flow
from worldline.locate import Place
from worldline.models.predict1_ar.model import (
    FEED_FORWARD_ROWS,
    RELEASED_GRID,
    ARTransformer,
    ARTransformerConfig,
)
from worldline.models.predict1_ar.weights import KEYS, read_config
from worldline.parallel.offload import Part
from worldline.sampling.decode import CHUNK
from worldline.shapes import VideoShape, latent_frames_of
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map
from worldline.weights.keymap import match
from worldline.weights.read import Checkpoint

logger = logging.getLogger(__name__)

# of both generations; the one that belongs to the transformer's own generation is tried first
_TOKENIZERS = ("Cosmos-Tokenize1-DV8x16x16-720p", "Cosmos-1.0-Tokenizer-DV8x16x16")


@dataclass(frozen=True)
class AutoregressiveFiles:
    """An autoregressive world on disk, checked but not read.

    Attributes:
        folder: of the transformer.
        bundled: whether it ships with the package.
        transformer: its tensors.
        config: what they imply.
        tokenizer: the tensors of the discrete tokenizer.
        tokenizer_config: what they imply.
        text: the text encoder, of a Video2World model; None where there is none.
        why_no_text: why not.
        decoder: the diffusion decoder; None where the tokenizer decodes alone.
    """

    folder: Path
    bundled: bool
    transformer: Checkpoint
    config: ARTransformerConfig
    tokenizer: Checkpoint
    tokenizer_config: CosmosTokenizerConfig
    text: T5Files | None = None
    why_no_text: str = ""
    decoder: DecoderFiles | None = None

    @property
    def context_length(self) -> int:
        """Rows of a text embedding."""
        return self.text.max_length if self.text else RELEASED_CONTEXT

    @property
    def offload_flags(self) -> tuple[str, ...]:
        """Names of the flags that keep a part in host memory, cheapest first."""
        return offload_flags(text=self.text is not None, decoder=self.decoder is not None)

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what this world makes.

        Raises:
            CheckpointError: a file has vanished.
        """
        settings = self.folder / "config.json"
        found = stamps(
            {
                "transformer": [
                    *self.transformer.files,
                    *([settings] if settings.exists() else []),
                ],
                "tokenizer": self.tokenizer.files,
            }
        )
        if self.decoder is not None:
            found |= self.decoder.identity()
        if self.text is not None:
            found["text_encoder"] = self.text.identity()
        return found


def offload_flags(*, text: bool, decoder: bool) -> tuple[str, ...]:
    """Return the flags of a world with or without text encoder and diffusion decoder."""
    there = {"offload_text_encoder_model": text, "offload_diffusion_decoder": decoder}
    return tuple(flag for flag in AUTOREGRESSIVE_OFFLOAD_FLAGS if there.get(flag, True))


@dataclass(frozen=True)
class AutoregressiveParts:
    """A world's networks, each on its device or waiting in host memory.

    Attributes:
        transformer: draws tokens.
        tokenizer: pixels to tokens and back.
        files: that they were read from.
        text: prompts to embeddings; None where there is none.
        decoder: tokens to pixels by diffusion; None where the tokenizer decodes.
    """

    transformer: Part[ARTransformer]
    tokenizer: Part[CosmosTokenizer]
    files: AutoregressiveFiles
    text: TextPart[T5Files] | None = None
    decoder: DecoderParts | None = None

    @property
    def config(self) -> ARTransformerConfig:
        return self.transformer.module.config

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def video(self) -> VideoShape:
        """Size of what this world makes."""
        return video_shape(self.config, self.tokenizer.module.config)


def video_shape(config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig) -> VideoShape:
    """Return the size of the clips that a transformer and a tokenizer make together."""
    return config.grid.video(tokenizer.temporal, tokenizer.spatial)


def most_given(config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig) -> int:
    """Return how many tokens a window begins with at most: of an input, or of the one before."""
    latents = max(latent_frames_of(max(INPUT_FRAMES), tokenizer.temporal), CARRIED)
    # at least one latent frame is left to draw
    latents = min(latents, config.grid.frames - 1)
    return config.leading_tokens + latents * config.grid.tokens_per_frame


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a request will hold on its device, stage by stage.

    Attributes:
        encode: while the input is turned into tokens.
        tokens: while tokens are read and drawn.
        decode: while tokens are turned into pixels.
        text: while a prompt is encoded.
        denoise: while the diffusion decoder samples.
        visit: while a network that is none of the world's, such as an offloaded guard, is used.
    """

    encode: int
    tokens: int
    decode: int
    text: int = 0
    denoise: int = 0
    visit: int = 0

    @property
    def peak(self) -> int:
        used = (self.encode, self.tokens, self.decode, self.text, self.denoise, self.visit)
        return max(used)


def open_autoregressive(
    place: Place,
    *,
    text_encoder_dir: str | Path | None = None,
    diffusion_decoder: bool = False,
) -> AutoregressiveFiles:
    """Check the files of an autoregressive world.

    Args:
        place: where it lies.
        text_encoder_dir: another text encoder for a Video2World model; see `Place.chosen`.
        diffusion_decoder: whether tokens will be decoded by diffusion.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model. That there is no
            text encoder is no error here: embeddings may be given.
        InputError: a base model is given a text encoder.
    """
    named, folder = place.named, place.folder
    refuse_flow(named)
    source = None if holds_diffusers(named) else open_transformer(named)
    if source is None or is_diffusion(source):
        if source is not None:
            refuse_decoder(folder, source)
        raise CheckpointError(
            f"{folder} is a diffusion world, not an autoregressive one: "
            "use worldline diffusion, or worldline.load in Python"
        )
    try:
        config = _check_transformer(source, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_doubt(source)}") from error
    if config.context_width is None:
        refuse_options(folder, "an autoregressive base", {"text_encoder_dir": text_encoder_dir})
    tokenizer_folder = _tokenizer_folder(place)
    try:
        tokenizer, tokenizer_config = open_tokenizer(tokenizer_folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(tokenizer_folder)}") from error
    with torch.device("meta"):
        network = CosmosTokenizer(tokenizer_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    match(tokenizer.tensors, shapes, key_map(tokenizer_config), str(tokenizer.path))
    if tokenizer_config.vocabulary != config.vocabulary:
        raise CheckpointError(
            f"{tokenizer_folder} has {tokenizer_config.vocabulary} token ids, but {folder} "
            f"was trained on {config.vocabulary}: they do not belong together{_doubt(source)}"
        )
    text, why_no_text = None, "a base model takes no prompt"
    if config.context_width is not None:
        text, why_no_text = find_text(
            T5, place, folder, "nvidia", text_encoder_dir, config.context_width
        )
    decoder = open_decoder(place, config, tokenizer_config) if diffusion_decoder else None
    return AutoregressiveFiles(
        folder,
        place.bundled,
        source,
        config,
        tokenizer,
        tokenizer_config,
        text,
        why_no_text,
        decoder,
    )


def _check_transformer(source: Checkpoint, folder: Path) -> ARTransformerConfig:
    """Return the architecture of a transformer, checked against every tensor."""
    settings = read_settings(folder)
    if not (folder / "config.json").exists():
        sides = " x ".join(map(str, astuple(RELEASED_GRID)))
        logger.info("no config.json in %s: released grid %s assumed", folder, sides)
    config = read_config(source, settings)
    expected = _shapes(config)
    try:
        match(source.tensors, expected, KEYS, str(source.path))
    except CheckpointError as error:
        if settings and expected != _shapes(read_config(source, {})):
            raise CheckpointError(f"{error} (expected by config.json)") from error
        raise
    return config


def _shapes(config: ARTransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = ARTransformer(config)
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


def _doubt(source: Checkpoint) -> str:
    """The end of a message about sizes: a set that lacks its last ranks looks like a whole one."""
    return " (is a shard missing?)" if source.kind == "tensor-parallel shards" else ""


def _tokenizer_folder(place: Place) -> Path:
    names = _TOKENIZERS[::-1] if "1.0" in place.folder.name else _TOKENIZERS
    found = place.below(names)
    if found is None:
        raise CheckpointError(
            f"no discrete tokenizer: neither {names[0]} nor {names[1]} is in {place.searched}"
        )
    return found


def plan_autoregressive(
    config: ARTransformerConfig,
    tokenizer: CosmosTokenizerConfig,
    *,
    dtype: torch.dtype,
    text_bytes: int = 0,
    context_length: int = RELEASED_CONTEXT,
    decoder: DecoderNeed | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    offload_diffusion_decoder: bool = False,
    offload_text_encoder_model: bool = False,
    batch: int = 1,
    num_video_frames: int | None = None,
    visitor_bytes: int = 0,
) -> MemoryPlan:
    """Estimate the memory of one clip; `benchmarks/ar_end_to_end.py` compares it with the truth.

    Args:
        config: of the transformer.
        tokenizer: the discrete one.
        dtype: of the weights.
        text_bytes: of the text encoder's weights; 0 where there is none.
        context_length: rows of a text embedding.
        decoder: what the diffusion decoder needs; None where there is none.
        offload_ar_model: the transformer waits in host memory.
        offload_tokenizer: likewise.
        offload_diffusion_decoder: both networks of the decoder likewise; the blocks of its
            transformer come one after another.
        offload_text_encoder_model: likewise.
        batch: clips whose tokens are drawn in step.
        num_video_frames: of a clip; None is the model's own.
        visitor_bytes: of the largest network that comes to the device beside the world while it is
            used, such as an offloaded guard; 0 for none.
    """
    size = dtype.itemsize
    transformer_bytes = count_parameters(ARTransformer, config) * size
    tokenizer_bytes = count_parameters(CosmosTokenizer, tokenizer) * size
    shape = video_shape(config, tokenizer)
    cells = (
        (1 + (shape.frames - 1) // tokenizer.patch)
        * (shape.height // tokenizer.patch)
        * (shape.width // tokenizer.patch)
    )
    widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)
    # of a window; of a longer clip the keys and values of what was decoded stay besides
    latents = latent_frames_of(num_video_frames or shape.frames, tokenizer.temporal)
    beyond = max(0, latents - config.grid.frames) * config.grid.tokens_per_frame
    seen = 2 * beyond * tokenizer.level_channels[-1] * size
    activations = coding_bytes(cells, widest, size) + seen
    heads = config.num_kv_heads * config.head_size
    cache = 2 * config.depth * config.length * heads * size
    # the longest prompt: gate, up and product of a part of it; and queries, keys, values
    prompt = most_given(config, tokenizer)
    hidden = 3 * config.hidden * min(prompt, FEED_FORWARD_ROWS)
    prefill = (hidden + 5 * config.width * prompt) * size
    if config.context_width is not None:
        cache += 2 * (config.depth // config.context_every) * context_length * heads * size
    cache += 2 * CHUNK * config.vocabulary * torch.float32.itemsize  # noise of the draws
    weights = {
        "transformer": transformer_bytes,
        "tokenizer": tokenizer_bytes,
        "denoiser": decoder.transformer if decoder else 0,
        "pixels": decoder.tokenizer if decoder else 0,
        "text": text_bytes,
    }
    offloaded = {
        "transformer": offload_ar_model,
        "tokenizer": offload_tokenizer,
        "denoiser": offload_diffusion_decoder,
        "pixels": offload_diffusion_decoder,
        "text": offload_text_encoder_model,
    }

    def resident(used: str) -> int:
        there = (n for part, n in weights.items() if part == used or not offloaded[part])
        return sum(there) + workspace(dtype)

    if decoder and offload_diffusion_decoder:
        weights["denoiser"] = decoder.streamed
    coding = resident("tokenizer") + activations
    return MemoryPlan(
        encode=coding,
        tokens=resident("transformer") + batch * cache + prefill,
        decode=resident("pixels") + decoder.decode if decoder else coding,
        text=resident("text") + text_bytes // 20 if text_bytes else 0,
        denoise=resident("denoiser") + decoder.denoise if decoder else 0,
        visit=resident("") + visitor_bytes if visitor_bytes else 0,
    )
