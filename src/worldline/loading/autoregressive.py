"""The files, the parts and the memory of an autoregressive world."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.files import unfinished
from worldline.loading.folders import (
    holds_diffusers,
    is_diffusion,
    open_transformer,
    read_settings,
    stamps,
)
from worldline.loading.memory import coding_bytes, count_parameters, workspace
from worldline.models.predict1_ar.model import RELEASED_GRID, ARTransformer, ARTransformerConfig
from worldline.models.predict1_ar.weights import KEYS, read_config
from worldline.parallel.offload import Part
from worldline.places import Place
from worldline.shapes import VideoShape
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
    """

    folder: Path
    bundled: bool
    transformer: Checkpoint
    config: ARTransformerConfig
    tokenizer: Checkpoint
    tokenizer_config: CosmosTokenizerConfig

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what this world makes.

        Raises:
            CheckpointError: a file has vanished.
        """
        settings = self.folder / "config.json"
        return stamps(
            {
                "transformer": [
                    *self.transformer.files,
                    *([settings] if settings.exists() else []),
                ],
                "tokenizer": self.tokenizer.files,
            }
        )


@dataclass(frozen=True)
class AutoregressiveParts:
    """A world's networks, each on its device or waiting in host memory."""

    transformer: Part[ARTransformer]
    tokenizer: Part[CosmosTokenizer]

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


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a request will hold on its device, stage by stage.

    Attributes:
        encode: while the input is turned into tokens.
        tokens: while tokens are read and drawn.
        decode: while tokens are turned into pixels.
    """

    encode: int
    tokens: int
    decode: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.tokens, self.decode)


def open_autoregressive(place: Place) -> AutoregressiveFiles:
    """Check the files of an autoregressive world.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
    """
    named, folder = place.named, place.folder
    source = None if holds_diffusers(named) else open_transformer(named)
    if source is None or is_diffusion(source):
        raise CheckpointError(
            f"{folder} is a diffusion world, not an autoregressive one: "
            "use worldline diffusion, or worldline.load in Python"
        )
    try:
        config = _check_transformer(source, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_doubt(source)}") from error
    if config.context_width is not None:
        raise CheckpointError(
            f"{folder} is a Video2World model, which continues a clip by a prompt; "
            "this version runs base models (4B, 12B)"
        )

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
    return AutoregressiveFiles(folder, place.bundled, source, config, tokenizer, tokenizer_config)


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
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
) -> MemoryPlan:
    """Estimate the memory of one clip; `benchmarks/ar_end_to_end.py` compares it with the truth."""
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
    activations = coding_bytes(cells, widest, size)
    heads = config.num_kv_heads * config.head_size
    cache = 2 * config.depth * config.length * heads * size
    # feed-forward of the longest prompt: gate, up, product; and queries, keys, values
    prefill = config.length // 2 * (3 * config.hidden + 4 * config.width) * size
    context = workspace(dtype)
    resident = (0 if offload_ar_model else transformer_bytes) + (
        0 if offload_tokenizer else tokenizer_bytes
    )
    waiting_tokenizer = tokenizer_bytes if offload_tokenizer else 0
    waiting_transformer = transformer_bytes if offload_ar_model else 0
    coding = resident + waiting_tokenizer + activations + context
    return MemoryPlan(
        encode=coding,
        tokens=resident + waiting_transformer + cache + prefill + context,
        decode=coding,
    )
