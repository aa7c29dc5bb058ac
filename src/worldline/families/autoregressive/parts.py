"""Parts of an autoregressive model on disk."""

from __future__ import annotations

import logging
from dataclasses import astuple
from typing import Any

from worldline.catalog import DECODERS
from worldline.errors import CheckpointError, InputError
from worldline.families.autoregressive.model import (
    RELEASED_GRID,
    ARTransformerConfig,
)
from worldline.families.autoregressive.weights import open_network
from worldline.family import Opened
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.tokenizers.cosmos.weights import open_tokenizer as open_cosmos
from worldline.weights.networks import Network

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
        from worldline.families.autoregressive import decoder

        decoder.refuse_grids(opened, config)
    return cosmos


def decodes(opened: Opened) -> bool:
    """Whether the diffusion decoder runs: of released models unless disabled, if one is bundled."""
    disabled = opened.options.disable_diffusion_decoder
    if disabled is None and opened.place.bundled:
        return opened.place.below(DECODERS.values()) is not None
    return not disabled


def open_decoder(opened: Opened) -> Network[Any] | None:
    """The diffusion decoder; imported only where it runs: its network is of another family."""
    if not decodes(opened):
        return None
    from worldline.families.autoregressive import decoder

    return decoder.open_network(opened)


def open_decoder_tokenizer(opened: Opened) -> CosmosNetwork | None:
    """The continuous tokenizer that the diffusion decoder's latents are of."""
    if "decoder" not in opened.parts:
        return None
    from worldline.families.autoregressive import decoder

    return decoder.open_tokenizer(opened)


def open_encoder(opened: Opened) -> Any | None:
    """The text encoder T5; None of a base model, which takes no prompt."""
    width = opened["transformer"].config.context_width
    if width is None:
        if opened.options.text_encoder_dir is not None:
            raise InputError(f"text_encoder_dir: {opened.name} is a base model without prompts")
        return None
    from worldline.text.t5 import T5Files  # a base model needs none of it

    return T5Files.find(opened, width)
