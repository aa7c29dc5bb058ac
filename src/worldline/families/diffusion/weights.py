"""Names of the diffusion transformer's tensors in released files, and the architecture they imply.

Two layouts hold the same weights: NVIDIA's `model.pt`, and the folder of diffusers'
`CosmosTransformer3DModel`. Source: nvidia-cosmos/cosmos-predict1 `diffusion/inference/
inference_utils.py`; huggingface/diffusers `scripts/convert_cosmos_to_diffusers.py`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError
from worldline.families.diffusion.model import DECODER_RATIO, RELEASED_RATIOS, DiT, DiTConfig
from worldline.families.diffusion.request import SIGNATURE
from worldline.nn.dit import LARGEST_GRID, PATCH_CELLS
from worldline.shapes import LatentShape
from worldline.weights import dit, networks
from worldline.weights.checkpoint import Checkpoint, take_network
from worldline.weights.keymap import KeyMap, LoRARecipe
from worldline.weights.networks import Flag, Network, Number, open_weights

logger = logging.getLogger(__name__)

_OUR_SETTINGS = ("rope_ratio", "base_fps", "text2world")  # one of them stands in our config.json
CONTEXTS = ("aux_vars.pt", "aux_vars.safetensors")  # beside a decoder; one has the general prompt
KEYS = KeyMap(
    prefixes=("net.", ""),
    rename=dit.expand(
        {
            "x_embedder.proj.1.weight": "embed.weight",
            "token_embedder.weight": "ids.weight",
            "extra_pos_embedder.pos_emb_{t,h,w}": "positions.{time,rows,columns}",
            "t_embedder.1.linear_{1,2}.weight": "noise.{first,second}.weight",
            "affline_norm.weight": "noise.norm",
            "final_layer.linear.weight": "head.linear.weight",
            "final_layer.adaLN_modulation.{1,2}.weight": "head.modulation.{first,second}.weight",
            "blocks.block{i}.blocks.{0,1,2}.adaLN_modulation.{1,2}.weight": "blocks.{i}."
            "{attention,cross_attention,feed_forward}.modulation.{first,second}.weight",
            "blocks.block{i}.blocks.{0,1}.block.attn.to_{q,k,v,out}.0.weight": "blocks.{i}."
            "{attention,cross_attention}.body.{q,k,v,out}.weight",
            "blocks.block{i}.blocks.{0,1}.block.attn.to_{q,k}.1.weight": "blocks.{i}."
            "{attention,cross_attention}.body.{q,k}_norm",
            "blocks.block{i}.blocks.2.block.layer{1,2}.weight": "blocks.{i}."
            "feed_forward.body.{up,down}.weight",
        }
    ),
    drop={
        **dit.BOOKKEEPING,
        "pos_embedder.seq": "positions, computed here",
        "logvar.*": "the uncertainty head of training",
    },
)
DIFFUSERS_KEYS = KeyMap(
    dit.DIFFUSERS
    | dit.expand({"learnable_pos_embed.pos_emb_{t,h,w}": "positions.{time,rows,columns}"})
)
LAYOUTS = (KEYS, DIFFUSERS_KEYS)
LORA = LoRARecipe(
    targets=("blocks.*attention.body.[qv].weight",),
    rank=8,
    start="normal",
    ends=("_lora.net.0.weight", "_lora.net.1.weight"),
)


class Settings(dit.DiTSettings):
    """What no tensor holds: the frame rate of position 1, and whether a prompt alone is enough."""

    base_fps: Number = 24.0
    text2world: Flag | None = None


def open_network(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> Network[DiTConfig]:
    """Open a diffusion transformer of either layout; headers only.

    Args:
        path: as for `open_weights`.
        settings: content of `config.json`; None reads the one beside the file.

    Raises:
        CheckpointError: there is none, it is damaged, a tensor does not fit, or the rotary
            stretching is unknown.
    """
    source = take_network(open_weights(path, SIGNATURE), SIGNATURE, KEYS.prefixes)
    theirs = dit.is_diffusers(source)
    if settings is None and not theirs:
        settings = read_settings(source.path.parent)
    keys = DIFFUSERS_KEYS if theirs else KEYS
    config = read_config(source, keys, settings)
    names = ("config.json", *(CONTEXTS if config.vocabulary else ()))
    beside = tuple(source.path.parent / name for name in names)
    return Network(DiT, config, source, keys, beside, layouts=LAYOUTS).check()


def read_settings(folder: Path) -> dict[str, Any]:
    """Content of our `config.json`; {} for another's, which the released pipelines do not read."""
    try:
        settings = networks.read_settings(folder)
    except CheckpointError as error:
        logger.info("%s; released models need none", error)
        return {}
    if not settings or any(name in settings for name in _OUR_SETTINGS):
        return settings
    logger.info("%s has no effect: it is not of worldline", folder / "config.json")
    return {}


def read_config(source: Checkpoint, keys: KeyMap, settings: Mapping[str, Any] | None) -> DiTConfig:
    """Architecture of a checkpoint; see `open_network`."""
    stated = Settings.read(source, settings)
    shapes, sizes = dit.read_sizes(source, keys)
    # of the decoder of autoregressive worlds, of which there is one alone
    vocabulary, id_width = shapes.shapes.get("ids.weight", (0, 0))
    masked = (sizes["latent_channels"] + 2) * PATCH_CELLS  # inputs a token, of Video2World
    released = DECODER_RATIO if vocabulary else RELEASED_RATIOS.get(sizes["width"])
    ratio = stated.rope_ratio or released
    if ratio is None:
        raise CheckpointError(
            f"{source.path}: a model of width {sizes['width']} needs its rotary stretching in "
            'config.json beside it: "rope_ratio": [time, rows, columns]'
        )
    positions = [f"positions.{axis}" for axis in ("time", "rows", "columns")]
    return DiTConfig(
        **sizes,
        condition_mask=not vocabulary and shapes.size("embed.weight", 1) == masked,
        max_grid=LARGEST_GRID if vocabulary else LatentShape(*map(shapes.size, positions)),
        rope_ratio=ratio,
        base_fps=stated.base_fps,
        learned_positions=not vocabulary,
        vocabulary=vocabulary,
        id_width=id_width,
    )


def layout(network: Network[DiTConfig], diffusers: bool) -> tuple[KeyMap, dict[str, Any]]:
    """Names of tensors, and files beside them, in NVIDIA's or diffusers' layout, if it has any."""
    config = network.config
    if not diffusers:
        return KEYS, {"config.json": settings_of(config)}
    network.require(base_fps=24.0, vocabulary=0)
    return DIFFUSERS_KEYS, {"config.json": diffusers_settings(config)}


def settings_of(config: DiTConfig) -> dict[str, Any]:
    """Content of our config.json: what the tensors leave open."""
    return {"rope_ratio": [*config.rope_ratio], "base_fps": config.base_fps}


def diffusers_settings(config: DiTConfig) -> dict[str, Any]:
    """Content of diffusers' config.json."""
    return dit.diffusers_settings(config, extra_pos_embed_type="learnable")
