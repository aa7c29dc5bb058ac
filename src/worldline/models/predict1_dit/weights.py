"""How the released files name the diffusion transformer's tensors, and what their shapes tell.

Two layouts hold the same weights: NVIDIA's `model.pt`, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/
inference_utils.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.models.predict1_dit.model import (
    DECODER_RATIO,
    LARGEST_GRID,
    RELEASED_RATIOS,
    DiT,
    DiTConfig,
)
from worldline.shapes import LatentShape
from worldline.weights.dit import (
    BOOKKEEPING,
    PATCH,
    SUB_BLOCKS,
    DiTFiles,
    Ratio,
    check,
    diffusers_names,
    diffusers_settings,
    find_dit,
    open_file,
    read_ratio,
    read_shapes,
    read_sizes,
    released_names,
)
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint

logger = logging.getLogger(__name__)

_DROP = {
    **BOOKKEEPING,
    "pos_embedder.seq": "positions, computed here",
    "logvar.*": "the uncertainty head of training",
}
# our axes of the learned positions, and the released ones
_AXES = {"time": "t", "rows": "h", "columns": "w"}


def _nvidia() -> dict[str, str]:
    layout = {
        "embed.weight": "x_embedder.proj.1.weight",
        "ids.weight": "token_embedder.weight",
        **{
            f"positions.{ours}": f"extra_pos_embedder.pos_emb_{axis}"
            for ours, axis in _AXES.items()
        },
        "noise.first.weight": "t_embedder.1.linear_1.weight",
        "noise.second.weight": "t_embedder.1.linear_2.weight",
        "noise.norm": "affline_norm.weight",
        "head.linear.weight": "final_layer.linear.weight",
        "head.modulation.first.weight": "final_layer.adaLN_modulation.1.weight",
        "head.modulation.second.weight": "final_layer.adaLN_modulation.2.weight",
    }
    for number, ours in enumerate(SUB_BLOCKS):
        stem = f"blocks.{{i}}.{ours}"
        theirs = f"blocks.{number}.block"
        for step, place in (("1", "first"), ("2", "second")):
            layout[f"{stem}.modulation.{place}.weight"] = (
                f"blocks.{number}.adaLN_modulation.{step}.weight"
            )
        if ours == "feed_forward":
            layout[f"{stem}.body.up.weight"] = f"{theirs}.layer1.weight"
            layout[f"{stem}.body.down.weight"] = f"{theirs}.layer2.weight"
            continue
        for leaf in ("q", "k", "v", "out"):
            layout[f"{stem}.body.{leaf}.weight"] = f"{theirs}.attn.to_{leaf}.0.weight"
        for leaf in ("q", "k"):
            layout[f"{stem}.body.{leaf}_norm"] = f"{theirs}.attn.to_{leaf}.1.weight"
    return released_names(layout, "blocks.block{i}.")


KEYS = KeyMap(prefixes=("net.", ""), rename=_nvidia(), drop=_DROP)
DIFFUSERS_KEYS = KeyMap(
    rename=diffusers_names(
        {f"positions.{ours}": f"learnable_pos_embed.pos_emb_{axis}" for ours, axis in _AXES.items()}
    )
)

_POSITIONS = tuple(f"positions.{axis}" for axis in _AXES)


def open_dit(path: Path, settings: Mapping[str, Any] | None = None) -> DiTFiles[DiTConfig]:
    """Open a diffusion transformer of either layout; headers only.

    Args:
        path: a released folder, a diffusers folder (the `transformer` folder or the one around it),
            or the file of weights itself.
        settings: of `config.json` beside NVIDIA's file: "rope_ratio" (three numbers: time, rows,
            columns) and "base_fps". Needed where the width is none of the released ones, since no
            tensor holds them.

    Raises:
        CheckpointError: there is none, it is damaged, a tensor does not fit, or the rotary
            stretching is unknown.
    """
    file, layout = find_dit(path)
    source = open_file(file)
    keys = KEYS if layout == "nvidia" else DIFFUSERS_KEYS
    if layout == "diffusers":
        settings = diffusers_settings(file.parent, positions="learnable")
    try:
        config = read_config(source, keys, settings or {})
    except ValueError as error:  # CheckpointError is one: it says which file itself
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source.path}: {error}") from error
    if "ema" in source.beside:
        logger.info("%s: the averaged weights beside its own are left aside", source.path)
    with torch.device("meta"):
        check(source, DiT(config), keys)
    return DiTFiles(source, keys, config, layout)


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any]) -> DiTConfig:
    """Return the architecture of a checkpoint; see `open_dit` for `settings`.

    Raises:
        CheckpointError: the tensors are of another model, or the rotary stretching is unknown.
    """
    shapes = read_shapes(source, keys)
    decodes = len(shapes.get("ids.weight", ())) == 2
    sizes = read_sizes(source, keys, shapes, {} if decodes else dict.fromkeys(_POSITIONS, 2))
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
        base_fps=float(settings.get("base_fps") or 24.0),
        patch=PATCH,
        learned_positions=not decodes,
        vocabulary=vocabulary,
        id_width=id_width,
    )


def _ratio(source: Checkpoint, width: int, settings: Mapping[str, Any], *, decodes: bool) -> Ratio:
    # there is one diffusion decoder alone, whatever its width
    released = DECODER_RATIO if decodes else RELEASED_RATIOS.get(width)
    given = settings.get("rope_ratio", released)
    if given is None:
        known = " or ".join(map(str, RELEASED_RATIOS))
        raise CheckpointError(
            f"{source.path}: a model of width {width} (released ones have {known}) needs its "
            'rotary stretching in config.json beside it: "rope_ratio": [time, rows, columns]'
        )
    return read_ratio(source, given)


def write_settings(config: DiTConfig) -> dict[str, Any]:
    """Return what config.json must say of `config` for `open_dit` to give it back."""
    return {"rope_ratio": list(config.rope_ratio), "base_fps": config.base_fps}


def released_tensors(model: DiT) -> dict[str, Tensor]:
    """Return the parameters by the names of NVIDIA's `model.pt`."""
    return {KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()}


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json of the same model as diffusers' `CosmosTransformer3DModel`."""
    grid, (_, rows, columns) = config.max_grid, config.patch
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + config.condition_mask,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "num_layers": config.depth,
        "mlp_ratio": config.hidden / config.width,
        "text_embed_dim": config.context_width,
        "adaln_lora_dim": config.lora_rank,
        "max_size": [grid.frames, grid.height * rows, grid.width * columns],
        "patch_size": list(config.patch),
        "rope_scale": list(config.rope_ratio),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
    }


def diffusers_tensors(model: DiT) -> dict[str, Tensor]:
    """Return the parameters by the names of diffusers' `CosmosTransformer3DModel`."""
    return {
        DIFFUSERS_KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()
    }
