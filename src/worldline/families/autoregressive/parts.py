"""Parts of an autoregressive model on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from torch import Tensor

from worldline.catalog import DECODERS
from worldline.errors import CheckpointError, InputError
from worldline.families.autoregressive.model import (
    RELEASED_GRID,
    ARTransformerConfig,
)
from worldline.families.autoregressive.weights import open_network
from worldline.families.diffusion.family import (
    TOKENIZERS as CONTINUOUS_TOKENIZERS,
)
from worldline.families.diffusion.family import (
    generation_by_name,
    open_latent_tokenizer,
)
from worldline.families.diffusion.model import BLOCKS, DECODER_WINDOW, DiTConfig
from worldline.families.diffusion.request import Generation, Precision
from worldline.families.diffusion.weights import open_network as open_dit
from worldline.family import Opened
from worldline.opening import TextPart, open_text
from worldline.shapes import LatentShape
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.tokenizers.cosmos.weights import open_tokenizer as open_cosmos
from worldline.weights.networks import Network, read_settings
from worldline.weights.read import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

# of both generations; that of the transformer's own generation is tried first
TOKENIZERS = ("Cosmos-Tokenize1-DV8x16x16-720p", "Cosmos-1.0-Tokenizer-DV8x16x16")


def open_transformer(opened: Opened) -> Network[ARTransformerConfig]:
    """The transformer, whole or in tensor-parallel shards; config.json wins over shapes."""
    if not opened.settings:
        sides = " x ".join(map(str, astuple(RELEASED_GRID)))
        logger.info("no config.json in %s: released grid %s assumed", opened.folder, sides)
    try:
        return open_network(opened.source, opened.settings)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_shard_hint(opened)}") from error


def _shard_hint(opened: Opened) -> str:
    """End of a message about sizes: a set that lacks its last ranks looks like a whole one."""
    return " (is a shard missing?)" if opened.source.kind == "tensor-parallel shards" else ""


def open_tokenizer(opened: Opened) -> CosmosNetwork:
    """The discrete tokenizer of the model's generation, which the decoder must fit, too."""
    place = opened.place
    assert place is not None
    names = TOKENIZERS[::-1] if "1.0" in opened.folder.name else TOKENIZERS
    folder = place.below(names)
    if folder is None:
        raise CheckpointError(
            f"no discrete tokenizer: neither {names[0]} nor {names[1]} is in {place.searched}"
        )
    cosmos = open_cosmos(folder)
    config = cosmos.config
    rows = opened["transformer"].config.vocabulary
    if config.vocabulary != rows:
        raise CheckpointError(
            f"{folder} has {config.vocabulary} token ids, {opened.folder} expects {rows}: they do "
            f"not belong together{_shard_hint(opened)}"
        )
    if "decoder" in opened.parts:
        refuse_grids(opened, config)
    return cosmos


def decodes(opened: Opened) -> bool:
    """Whether the diffusion decoder runs: of released models unless disabled, if one is bundled."""
    disabled = opened.options.disable_diffusion_decoder
    if disabled is None and opened.bundled:
        assert opened.place is not None
        return opened.place.below(DECODERS.values()) is not None
    return not disabled


@dataclass(frozen=True)
class DecoderNetwork(Network[DiTConfig]):
    """The transformer of the diffusion decoder.

    Attributes:
        aux: holds the embedding of a general prompt; None where every request brings its own.
        generation: whose sampler it is run with.
        rotary_precision: of the rotary angles; None is that of the weights, as released.
    """

    aux: Checkpoint | None = None
    generation: Generation = "Predict1"
    rotary_precision: str | None = None

    @property
    def files(self) -> list[Path]:
        return [*super().files, *(self.aux.files if self.aux else ())]

    @cached_property
    def context(self) -> Tensor | None:
        """Embedding of the general prompt, float32 (1, S, E); None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.aux is None:
            return None
        context = self.aux.read("context").float().clone()
        if not context.isfinite().all():
            raise CheckpointError(f"{self.aux.path}: context is not finite; download it again")
        return context


def open_decoder(opened: Opened) -> DecoderNetwork | None:
    """The diffusion decoder; that of the model's own generation is preferred."""
    if not decodes(opened):
        return None
    place, config = opened.place, opened["transformer"].config
    assert place is not None
    own = generation_by_name(opened.folder)
    order = sorted(DECODERS, key=lambda generation: generation != own)
    with without_decoder():
        folder = place.below(DECODERS[generation] for generation in order)
        if folder is None:
            names = " nor ".join(DECODERS[generation] for generation in order)
            raise CheckpointError(f"no diffusion decoder: neither {names} is in {place.searched}")
        settings = read_settings(folder)
        precision = settings.get("rotary_precision")
        if precision not in (None, *get_args(Precision)):
            raise CheckpointError(f"{folder / 'config.json'}: rotary_precision is {precision!r}")
        network = open_dit(folder, settings)
        if not network.config.vocabulary:
            raise CheckpointError(f"{folder} is a diffusion model, which reads no token ids")
        if network.config.vocabulary != config.vocabulary:
            raise CheckpointError(
                f"{folder} reads {network.config.vocabulary} token ids, {opened.folder} draws "
                f"{config.vocabulary}: they do not belong together"
            )
        aux = None
        if config.context_width is None:
            aux = open_aux(folder, network.config.context_width)
        elif config.context_width != network.config.context_width:
            raise CheckpointError(
                f"{folder} reads text of width {network.config.context_width}, {opened.folder} of "
                f"{config.context_width}: they do not belong together"
            )
    return DecoderNetwork(
        **{**vars(network), "blocks": BLOCKS},
        aux=aux,
        generation=generation_by_name(folder),
        rotary_precision=precision,
    )


@contextmanager
def without_decoder() -> Iterator[None]:
    """Add to an error which flag runs without the decoder."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --disable_diffusion_decoder runs without") from error


def open_aux(folder: Path, width: int) -> Checkpoint:
    """The file of the general prompt; its mask is never used, whatever it holds.

    Raises:
        CheckpointError: it is absent, damaged, or of another width.
    """
    paths = [folder / name for name in ("aux_vars.pt", "aux_vars.safetensors")]
    aux = open_checkpoint(next(filter(Path.exists, paths), paths[0]))
    info = aux.tensors.get("context")
    known = aux.tensors.keys() <= {"context", "context_mask"}
    if info is None or not known or not info.dtype.is_floating_point:
        raise CheckpointError(f"{aux.path} has {', '.join(sorted(aux.tensors)[:4])}; give context")
    if len(info.shape) != 3 or info.shape[0] != 1 or not info.shape[1] or info.shape[2] != width:
        raise CheckpointError(
            f"{aux.path}: context is {list(info.shape)}, [1, rows, {width}] is expected"
        )
    return aux


def open_decoder_tokenizer(opened: Opened) -> CosmosNetwork | None:
    """The continuous tokenizer that the diffusion decoder's latents are of."""
    if "decoder" not in opened.parts:
        return None
    assert opened.place is not None
    names = CONTINUOUS_TOKENIZERS[opened["decoder"].generation]
    with without_decoder():
        found = opened.place.below(names)
        if found is None:
            raise CheckpointError(
                f"no continuous tokenizer for the diffusion decoder: neither {names[0]} nor "
                f"{names[1]} is in {opened.place.searched}"
            )
        return open_latent_tokenizer(found)


def refuse_grids(opened: Opened, discrete: CosmosTokenizerConfig) -> None:
    """Raise `CheckpointError` unless the cells of both tokenizers and the decoder fit."""
    tokenizer = opened["decoder_tokenizer"]
    continuous = tokenizer.config
    with without_decoder():
        if continuous.temporal != discrete.temporal or discrete.spatial % continuous.spatial:
            raise CheckpointError(
                f"{tokenizer.path} compresses {continuous.temporal} x {continuous.spatial}, the "
                f"discrete tokenizer {discrete.temporal} x {discrete.spatial}: they do not belong "
                "together"
            )
        if tokenizer.statistics.frames < DECODER_WINDOW:
            raise CheckpointError(
                f"{tokenizer.path}: its statistics are of {tokenizer.statistics.frames} latent "
                f"frames, the diffusion decoder needs {DECODER_WINDOW}"
            )
        try:
            opened["decoder"].config.tokens(decoder_grid(opened, discrete))
        except ValueError as error:
            raise CheckpointError(f"{opened['decoder'].path}: {error}") from error


def decoder_grid(opened: Opened, discrete: CosmosTokenizerConfig) -> LatentShape:
    """Grid of the latents that the diffusion decoder denoises at once."""
    finer = discrete.spatial // opened["decoder_tokenizer"].config.spatial
    grid = opened["transformer"].config.grid
    return LatentShape(DECODER_WINDOW, grid.height * finer, grid.width * finer)


def open_encoder(opened: Opened) -> TextPart | None:
    """The text encoder T5; None of a base model, which takes no prompt."""
    width = opened["transformer"].config.context_width
    if width is None:
        if opened.options.text_encoder_dir is not None:
            raise InputError(f"text_encoder_dir: {opened.name} is a base model without prompts")
        return None
    return open_text(opened, T5Files, width)
