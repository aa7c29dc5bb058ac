"""Names of the flow transformer's tensors in released files, and the architecture they imply.

Two layouts hold the same weights: NVIDIA's flat dict, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/networks/
minimal_v4_dit.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldline.families.predict2_5.model import (
    RELEASED_RATIO,
    TIMESTEP_SCALE,
    Exponents,
    FlowDiT,
    FlowDiTConfig,
    released_exponents,
)
from worldline.families.predict2_5.request import SIGNATURE, Schedule
from worldline.weights import dit
from worldline.weights.checkpoint import Checkpoint, take_network
from worldline.weights.keymap import KeyMap, LoRARecipe
from worldline.weights.networks import Network, Number, open_weights

_EXPONENTS = ("pos_embedder.dim_temporal_range", "pos_embedder.dim_spatial_range")
_PROJECTION = {"crossattn_proj.0.{weight,bias}": "project.{weight,bias}"}

KEYS = KeyMap(
    prefixes=("net.", ""),
    rename=dit.expand(
        {
            **_PROJECTION,
            "x_embedder.proj.1.weight": "embed.weight",
            "t_embedder.1.linear_{1,2}.weight": "noise.{first,second}.weight",
            "t_embedding_norm.weight": "noise.norm",
            "final_layer.linear.weight": "head.linear.weight",
            "final_layer.adaln_modulation.{1,2}.weight": "head.modulation.{first,second}.weight",
            "blocks.{i}.adaln_modulation_{self_attn,cross_attn,mlp}.{1,2}.weight": "blocks.{i}."
            "{attention,cross_attention,feed_forward}.modulation.{first,second}.weight",
            "blocks.{i}.{self_attn,cross_attn}.{q,k,v,output}_proj.weight": "blocks.{i}."
            "{attention,cross_attention}.body.{q,k,v,out}.weight",
            "blocks.{i}.{self_attn,cross_attn}.{q,k}_norm.weight": "blocks.{i}."
            "{attention,cross_attention}.body.{q,k}_norm",
            "blocks.{i}.mlp.layer{1,2}.weight": "blocks.{i}.feed_forward.body.{up,down}.weight",
        }
    ),
    drop={
        **dit.BOOKKEEPING,
        "pos_embedder.*": "positions, computed here; `read_config` looks at their exponents",
        "accum_*": "counters of training",
    },
)
DIFFUSERS_KEYS = KeyMap(dit.DIFFUSERS | dit.expand(_PROJECTION))
LAYOUTS = (KEYS, DIFFUSERS_KEYS)
LORA = LoRARecipe(
    targets=("blocks.*attention.body.*.weight", "blocks.*.feed_forward.body.*.weight"), rank=32
)


class Settings(dit.DiTSettings):
    """Scale of timesteps, where a model is not as the released ones, and how it is sampled."""

    timestep_scale: Number = TIMESTEP_SCALE
    schedule: Schedule | None = None


def open_network(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> Network[FlowDiTConfig]:
    """Open a flow transformer of either layout; headers only.

    Args:
        path: as for `open_weights`.
        settings: content of `config.json`; None reads the one beside the file.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor does not fit.
    """
    source = take_network(open_weights(path, SIGNATURE), SIGNATURE, KEYS.prefixes)
    theirs = dit.is_diffusers(source)
    keys = DIFFUSERS_KEYS if theirs else KEYS
    config = read_config(source, keys, None if theirs else settings)
    beside = (source.path.parent / "config.json",)
    return Network(FlowDiT, config, source, keys, beside, layouts=LAYOUTS).check()


def read_config(
    source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any] | None
) -> FlowDiTConfig:
    """Architecture of a checkpoint; see `open_network`."""
    stated = Settings.read(source, settings)
    shapes, sizes = dit.read_sizes(source, keys)
    return FlowDiTConfig(
        **sizes,
        feature_width=shapes.size("project.weight", 1),
        rope_ratio=stated.rope_ratio or RELEASED_RATIO,
        timestep_scale=stated.timestep_scale,
        exponents=_read_exponents(source, sizes["head_size"]),
    )


def _read_exponents(source: Checkpoint, head_size: int) -> Exponents | None:
    """Rotary exponents in a file; None where it has none, or the released ones."""
    names = [name for end in _EXPONENTS for name in source.tensors if name.endswith(end)]
    if len(names) < len(_EXPONENTS):
        return None
    # whatever dtype the file is in, the released pipeline rounds them with all else
    time, space = (tuple(source.read(name).bfloat16().flatten().tolist()) for name in names)
    return None if (time, space) == released_exponents(head_size) else (time, space)


def layout(network: Network[FlowDiTConfig], diffusers: bool) -> tuple[KeyMap, dict[str, Any]]:
    """Names of tensors, and files beside them, in NVIDIA's or diffusers' layout, if it has any."""
    config = network.config
    if not diffusers:
        return KEYS, {"config.json": settings_of(config)}
    network.require(timestep_scale=TIMESTEP_SCALE, exponents=None)
    return DIFFUSERS_KEYS, {"config.json": diffusers_settings(config)}


def settings_of(config: FlowDiTConfig) -> dict[str, Any]:
    """Content of our config.json: what the tensors leave open."""
    return {"rope_ratio": [*config.rope_ratio], "timestep_scale": config.timestep_scale}


def diffusers_settings(config: FlowDiTConfig) -> dict[str, Any]:
    """Content of diffusers' config.json."""
    return dit.diffusers_settings(
        config,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=config.feature_width,
        encoder_hidden_states_channels=config.context_width,
    )
