"""Names of the diffusion transformer's tensors in released files, and the architecture they imply.

Two layouts hold the same weights: NVIDIA's `model.pt`, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/
inference_utils.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError
from worldline.families.diffusion.model import (
    DECODER_RATIO,
    LARGEST_GRID,
    PRESETS,
    RELEASED_RATIOS,
    DiT,
    DiTConfig,
)
from worldline.nn.dit import PATCH_CELLS
from worldline.shapes import LatentShape
from worldline.weights import dit, networks
from worldline.weights.checkpoint import Checkpoint
from worldline.weights.dit import ATTENTIONS, BOOKKEEPING, MODULATION, SUB_BLOCKS
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Network, Number, open_transformer

__all__ = ["PRESETS", "open_network"]

logger = logging.getLogger(__name__)

_OUR_SETTINGS = ("rope_ratio", "base_fps", "text2world")  # one of them stands in our config.json
_BLOCK = "blocks.block{i}.blocks"
# our axes of the learned positions, and the released ones
_AXES = {"time": "t", "rows": "h", "columns": "w"}
_POSITIONS = tuple(f"positions.{axis}" for axis in _AXES)

KEYS = KeyMap(
    prefixes=("net.", ""),
    rename={
        "x_embedder.proj.1.weight": "embed.weight",
        "token_embedder.weight": "ids.weight",
        "t_embedder.1.linear_1.weight": "noise.first.weight",
        "t_embedder.1.linear_2.weight": "noise.second.weight",
        "affline_norm.weight": "noise.norm",
        "final_layer.linear.weight": "head.linear.weight",
        "final_layer.adaLN_modulation.1.weight": "head.modulation.first.weight",
        "final_layer.adaLN_modulation.2.weight": "head.modulation.second.weight",
        f"{_BLOCK}.2.block.layer1.weight": "blocks.{i}.feed_forward.body.up.weight",
        f"{_BLOCK}.2.block.layer2.weight": "blocks.{i}.feed_forward.body.down.weight",
        **{f"extra_pos_embedder.pos_emb_{axis}": f"positions.{n}" for n, axis in _AXES.items()},
        **{
            f"{_BLOCK}.{n}.adaLN_modulation.{step}.weight": (
                f"blocks.{{i}}.{ours}.modulation.{layer}"
            )
            for n, ours in enumerate(SUB_BLOCKS)
            for step, layer in MODULATION
        },
        **{
            f"{_BLOCK}.{n}.block.attn.to_{leaf}.0.weight": f"blocks.{{i}}.{ours}.body.{leaf}.weight"
            for n, ours in enumerate(ATTENTIONS)
            for leaf in ("q", "k", "v", "out")
        },
        **{
            f"{_BLOCK}.{n}.block.attn.to_{leaf}.1.weight": f"blocks.{{i}}.{ours}.body.{leaf}_norm"
            for n, ours in enumerate(ATTENTIONS)
            for leaf in ("q", "k")
        },
    },
    drop={
        **BOOKKEEPING,
        "pos_embedder.seq": "positions, computed here",
        "logvar.*": "the uncertainty head of training",
    },
)
DIFFUSERS_KEYS = dit.diffusers_keys(
    {f"learnable_pos_embed.pos_emb_{axis}": f"positions.{name}" for name, axis in _AXES.items()}
)


class Settings(dit.DiTSettings):
    """Rotary stretching and frame rate of position 1, which no tensor holds."""

    base_fps: Number = 24.0


def open_network(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> Network[DiTConfig]:
    """Open a diffusion transformer of either layout; headers only.

    Args:
        path: as for `open_transformer`.
        settings: content of `config.json`, see `Settings`; None reads the one beside the file.

    Raises:
        CheckpointError: there is none, it is damaged, a tensor does not fit, or the rotary
            stretching is unknown.
    """
    source = open_transformer(path)
    theirs = dit.is_diffusers(source)
    if settings is None and not theirs:
        settings = read_settings(source.path.parent)
    if "ema" in source.beside:
        logger.info("%s: the averaged weights beside its own are not used", source.path)
    keys = DIFFUSERS_KEYS if theirs else KEYS
    config = read_config(source, keys, settings)
    return Network(DiT, config, source, keys, (source.path.parent / "config.json",)).check()


def is_decoder(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of the decoder of autoregressive worlds."""
    return any(name.endswith("token_embedder.weight") for name in names)


def read_settings(folder: Path) -> dict[str, Any]:
    """Content of our `config.json`; {} for another's, which the released pipelines do not read."""
    try:
        settings = networks.read_settings(folder)
    except CheckpointError as error:
        logger.info("%s; released models need none", error)
        return {}
    if settings and not any(name in settings for name in _OUR_SETTINGS):
        logger.info("%s has no effect: it is not of worldline", folder / "config.json")
        return {}
    return settings


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any] | None) -> DiTConfig:
    """Architecture of a checkpoint; see `open_network`.

    Raises:
        CheckpointError: the tensors are of another model, or the rotary stretching is unknown.
    """
    stated = dit.parse_settings(Settings, source, settings)
    decodes = is_decoder(source.tensors)
    shapes, sizes = dit.read_sizes(source, keys)
    features, channels = shapes.size("embed.weight", 1), sizes["latent_channels"]
    vocabulary, id_width = (
        (shapes.size("ids.weight"), shapes.size("ids.weight", 1)) if decodes else (0, 0)
    )
    masks = features / PATCH_CELLS - channels - id_width
    if masks not in ((1,) if decodes else (1, 2)):
        raise CheckpointError(
            f"{source.path}: {keys.released('embed.weight')} reads {features} numbers a token, "
            f"{channels} channels and {id_width} of ids with a mask are "
            f"{(channels + id_width + 1) * PATCH_CELLS}"
        )
    # there is one diffusion decoder alone, whatever its width
    released = DECODER_RATIO if decodes else RELEASED_RATIOS.get(sizes["width"])
    ratio = stated.rope_ratio or released
    if ratio is None:
        raise CheckpointError(
            f"{source.path}: a model of width {sizes['width']} needs its rotary stretching in "
            'config.json beside it: "rope_ratio": [time, rows, columns]'
        )
    return DiTConfig(
        **sizes,
        condition_mask=masks == 2,
        max_grid=LARGEST_GRID if decodes else LatentShape(*map(shapes.size, _POSITIONS)),
        rope_ratio=ratio,
        base_fps=stated.base_fps,
        learned_positions=not decodes,
        vocabulary=vocabulary,
        id_width=id_width,
    )
