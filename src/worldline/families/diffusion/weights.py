"""Names of the diffusion transformer's tensors in released files, and the architecture they imply.

Two layouts hold the same weights: NVIDIA's `model.pt`, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/
inference_utils.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from worldline.errors import CheckpointError
from worldline.families.diffusion.model import (
    DECODER_RATIO,
    LARGEST_GRID,
    PRESETS,
    RELEASED_RATIOS,
    DiT,
    DiTConfig,
)
from worldline.shapes import LatentShape
from worldline.weights import dit, networks
from worldline.weights.dit import ATTENTIONS, BOOKKEEPING, MODULATION, PATCH, SUB_BLOCKS, Ratio
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import (
    Layout,
    NetworkFiles,
    open_transformer,
    released_size,
    require_number,
)
from worldline.weights.source import Checkpoint

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


def open_dit(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> NetworkFiles[DiTConfig]:
    """Open a diffusion transformer of either layout; headers only.

    Args:
        path: as for `open_transformer`.
        settings: content of NVIDIA's `config.json`; None reads the one beside the file.
            "rope_ratio" (three numbers: time, rows, columns), which is needed where the width is
            none of the released ones, since no tensor holds it, and "base_fps" count.

    Raises:
        CheckpointError: there is none, it is damaged, a tensor does not fit, or the rotary
            stretching is unknown.
    """
    source = open_transformer(path)
    if settings is None and dit.layout_of(source.tensors) == "nvidia":
        settings = read_settings(source.path.parent)
    if "ema" in source.beside:
        logger.info("%s: the averaged weights beside its own are not used", source.path)
    layouts: dict[Layout, KeyMap] = {"nvidia": KEYS, "diffusers": DIFFUSERS_KEYS}
    return dit.check_dit(source, settings, layouts, DiT, read_config, positions="learnable")


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


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any]) -> DiTConfig:
    """Architecture of a checkpoint; see `open_dit` for `settings`.

    Raises:
        CheckpointError: the tensors are of another model, or the rotary stretching is unknown.
    """
    decodes = is_decoder(source.tensors)
    decisive = {"ids.weight": 2} if decodes else dict.fromkeys(_POSITIONS, 2)
    shapes, sizes = dit.read_sizes(source, keys, decisive)
    features, cells = shapes["embed.weight"][1], math.prod(PATCH)
    channels = shapes["head.linear.weight"][0] // cells
    vocabulary, id_width = shapes["ids.weight"] if decodes else (0, 0)
    masks = features / cells - channels - id_width
    if masks not in (1, 2) or (decodes and masks == 2):
        kinds = {"Text2World": channels + 1, "Video2World": channels + 2}
        if decodes:
            kinds = {"a diffusion decoder with these ids": channels + id_width + 1}
        known = ", ".join(f"{name} reads {count * cells}" for name, count in kinds.items())
        raise CheckpointError(
            f"{source.path}: {keys.released('embed.weight')} reads {features} numbers a token; "
            f"{known}"
        )
    return DiTConfig(
        **sizes,
        condition_mask=masks == 2,
        max_grid=LARGEST_GRID if decodes else LatentShape(*(shapes[n][0] for n in _POSITIONS)),
        rope_ratio=_ratio(source, sizes["width"], settings, decodes=decodes),
        latent_channels=channels,
        out_channels=channels,
        base_fps=require_number(settings.get("base_fps", 24.0), f"{source.path}: base_fps"),
        patch=PATCH,
        learned_positions=not decodes,
        vocabulary=vocabulary,
        id_width=id_width,
    )


def _ratio(source: Checkpoint, width: int, settings: Mapping[str, Any], *, decodes: bool) -> Ratio:
    # there is one diffusion decoder alone, whatever its width
    released = DECODER_RATIO if decodes else RELEASED_RATIOS.get(width)
    ratio = settings.get("rope_ratio", released)
    if ratio is None:
        known = " or ".join(map(str, RELEASED_RATIOS))
        raise CheckpointError(
            f"{source.path}: a model of width {width} (released ones have {known}) needs its "
            'rotary stretching in config.json beside it: "rope_ratio": [time, rows, columns]'
        )
    return dit.read_ratio(source, ratio)


def write_settings(config: DiTConfig) -> dict[str, Any]:
    """Content of the config.json from which `open_dit` reads `config`."""
    return {"rope_ratio": list(config.rope_ratio), "base_fps": config.base_fps}


def describe(config: DiTConfig) -> str:
    """Kind and size in words."""
    kind = "Video2World model" if config.condition_mask else "Text2World model"
    if config.vocabulary:
        kind = f"decoder of the autoregressive models, vocabulary {config.vocabulary:,}"
    size = released_size(PRESETS, config, "depth", "width", "condition_mask", "vocabulary")
    return (
        f"Cosmos diffusion {kind}, {size}: {config.depth} layers, width {config.width}, "
        f"{config.num_heads} heads"
    )


def released_tensors(model: DiT) -> dict[str, Tensor]:
    """Parameters by the names of NVIDIA's `model.pt`."""
    return dit.renamed_tensors(model, KEYS)
