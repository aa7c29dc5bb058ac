"""How the released files name the flow transformer's tensors, and what their shapes tell.

Two layouts hold the same weights: NVIDIA's flat dict, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/networks/
minimal_v4_dit.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
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
from worldline.models.predict2_5_dit.model import (
    RELEASED_RATIO,
    TIMESTEP_SCALE,
    Exponents,
    FlowDiT,
    FlowDiTConfig,
    released_exponents,
)
from worldline.weights.dit import (
    BOOKKEEPING,
    PATCH,
    SUB_BLOCKS,
    DiTFiles,
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
from worldline.weights.views import renamed

logger = logging.getLogger(__name__)

# of the released files, whose names start with a hash, and of what training writes
FILE_NAMES = "*_ema_bf16.pt"
_AVERAGED = "net_ema."
_CHECKPOINTING = "._checkpoint_wrapped_module"
_EXPONENTS = ("pos_embedder.dim_temporal_range", "pos_embedder.dim_spatial_range")
_DROP = {
    **BOOKKEEPING,
    "pos_embedder.*": "positions, computed here; `read_config` looks at their exponents",
    "accum_*": "counters of training",
}
_PROJECTION = {f"project.{leaf}": f"crossattn_proj.0.{leaf}" for leaf in ("weight", "bias")}


def _nvidia() -> dict[str, str]:
    layout = {
        "embed.weight": "x_embedder.proj.1.weight",
        **_PROJECTION,
        "noise.first.weight": "t_embedder.1.linear_1.weight",
        "noise.second.weight": "t_embedder.1.linear_2.weight",
        "noise.norm": "t_embedding_norm.weight",
        "head.linear.weight": "final_layer.linear.weight",
        "head.modulation.first.weight": "final_layer.adaln_modulation.1.weight",
        "head.modulation.second.weight": "final_layer.adaln_modulation.2.weight",
    }
    for ours, theirs in zip(SUB_BLOCKS, ("self_attn", "cross_attn", "mlp"), strict=True):
        stem = f"blocks.{{i}}.{ours}"
        for step, place in (("1", "first"), ("2", "second")):
            layout[f"{stem}.modulation.{place}.weight"] = f"adaln_modulation_{theirs}.{step}.weight"
        if theirs == "mlp":
            layout[f"{stem}.body.up.weight"] = "mlp.layer1.weight"
            layout[f"{stem}.body.down.weight"] = "mlp.layer2.weight"
            continue
        for leaf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "output")):
            layout[f"{stem}.body.{leaf}.weight"] = f"{theirs}.{name}_proj.weight"
        for leaf in ("q", "k"):
            layout[f"{stem}.body.{leaf}_norm"] = f"{theirs}.{leaf}_norm.weight"
    return released_names(layout, "blocks.{i}.")


KEYS = KeyMap(prefixes=("net.", _AVERAGED, ""), rename=_nvidia(), drop=_DROP)
DIFFUSERS_KEYS = KeyMap(rename=diffusers_names(_PROJECTION))


def open_flow_dit(path: Path, settings: Mapping[str, Any] | None = None) -> DiTFiles[FlowDiTConfig]:
    """Open a flow transformer of either layout; headers only.

    Of a file that training wrote, the averaged weights are taken where it has both.

    Args:
        path: a released folder (with one `*_ema_bf16.pt`, or `model.pt`), a diffusers folder (the
            `transformer` folder or the one around it), or the file of weights itself.
        settings: of `config.json` beside NVIDIA's file, where a model is not as the released ones:
            "rope_ratio" (three numbers: time, rows, columns) and "timestep_scale".

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor does not fit.
    """
    file, layout = find_dit(path, FILE_NAMES)
    source = network_view(open_file(file))
    keys = KEYS if layout == "nvidia" else DIFFUSERS_KEYS
    if layout == "diffusers":
        settings = diffusers_settings(file.parent, positions=None)
    try:
        config = read_config(source, keys, settings or {})
    except ValueError as error:  # CheckpointError is one: it says which file itself
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source.path}: {error}") from error
    with torch.device("meta"):
        check(source, FlowDiT(config), keys)
    return DiTFiles(source, keys, config, layout)


def is_flow_dit(source: Checkpoint) -> bool:
    """Tell a transformer of Predict2.5 from those of Predict1, in either layout, by names alone."""
    return any(name.endswith("crossattn_proj.0.weight") for name in source.tensors)


def network_view(source: Checkpoint) -> Checkpoint:
    """Return what a file holds of the network; of a file with averaged weights, those."""
    averaged = any(name.startswith(_AVERAGED) for name in source.tensors)
    if averaged:
        logger.info("%s: the averaged weights are taken, not those beside them", source.path)

    def plain(name: str) -> str | None:
        if averaged and not name.startswith(_AVERAGED):
            return None
        return name.replace(_CHECKPOINTING, "")

    return renamed(source, plain)


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any]) -> FlowDiTConfig:
    """Return the architecture of a checkpoint; see `open_flow_dit` for `settings`.

    Raises:
        CheckpointError: the tensors are of another model.
        ValueError: the sizes they imply are of none.
    """
    shapes = read_shapes(source, keys)
    sizes = read_sizes(source, keys, shapes, {"project.weight": 2})
    cells = math.prod(PATCH)
    channels = shapes["head.linear.weight"][0] // cells
    features = shapes["embed.weight"][1]
    if features != (channels + 2) * cells:
        raise CheckpointError(
            f"{source.path}: {keys.released('embed.weight')} reads {features} numbers a token; a "
            f"model of {channels} channels reads {(channels + 2) * cells}: latents and two masks"
        )
    scale = settings.get("timestep_scale", TIMESTEP_SCALE)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(
            f"{source.path}: timestep_scale is {scale!r}; it must be a number above 0"
        )
    return FlowDiTConfig(
        **sizes,
        feature_width=shapes["project.weight"][1],
        rope_ratio=read_ratio(source, settings.get("rope_ratio", RELEASED_RATIO)),
        timestep_scale=float(scale),
        exponents=_read_exponents(source, sizes["head_size"]),
        latent_channels=channels,
        out_channels=channels,
        patch=PATCH,
    )


def _read_exponents(source: Checkpoint, head_size: int) -> Exponents | None:
    """Return the rotary exponents in a file, where they are not what is computed without it."""
    held = {
        ending: name for name in source.tensors for ending in _EXPONENTS if name.endswith(ending)
    }
    if len(held) < len(_EXPONENTS):
        return None
    # whatever the file is in, the released pipeline rounds them with all else
    time, space = (source.read(held[ending]).bfloat16().flatten().tolist() for ending in _EXPONENTS)
    found = tuple(time), tuple(space)
    return None if found == released_exponents(head_size) else found


def write_settings(config: FlowDiTConfig) -> dict[str, Any]:
    """Return what config.json must say of `config` for `open_flow_dit` to give it back."""
    return {"rope_ratio": list(config.rope_ratio), "timestep_scale": config.timestep_scale}


def released_tensors(model: FlowDiT) -> dict[str, Tensor]:
    """Return the tensors of NVIDIA's file: the parameters, and what it holds of positions."""
    config = model.config
    exponents = config.exponents or released_exponents(config.head_size)
    positions = dict(zip(_EXPONENTS, map(torch.tensor, exponents), strict=True))
    return {KEYS.prefixes[0] + name: tensor.bfloat16() for name, tensor in positions.items()} | {
        KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()
    }


def diffusers_config(config: FlowDiTConfig) -> dict[str, Any]:
    """Return the config.json of the same model as diffusers' `CosmosTransformer3DModel`.

    Its class computes with unrounded rotary exponents (`FlowDiT.make_positions`), norms heads with
    1e-5 below the root in place of 1e-6, and takes timesteps that are scaled already.
    """
    grid, (_, rows, columns) = config.max_grid, config.patch
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + 1,
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
        "extra_pos_embed_type": None,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": config.feature_width,
        "encoder_hidden_states_channels": config.context_width,
    }


def diffusers_tensors(model: FlowDiT) -> dict[str, Tensor]:
    """Return the parameters by the names of diffusers' `CosmosTransformer3DModel`."""
    return {
        DIFFUSERS_KEYS.released(name): tensor.detach() for name, tensor in model.named_parameters()
    }
