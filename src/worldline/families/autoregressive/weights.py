"""Folders and files of released models, names of their tensors, the architecture that they imply.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/model.py` (load_ar_model),
`autoregressive/utils/checkpoint.py`, `autoregressive/configs/inference/inference_config.py`.
"""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from worldline.errors import CheckpointError
from worldline.families.autoregressive.model import (
    RELEASED_GRID,
    ARTransformer,
    ARTransformerConfig,
)
from worldline.families.autoregressive.request import SIGNATURE
from worldline.nn.rope import Yarn
from worldline.shapes import LatentShape
from worldline.weights import networks
from worldline.weights.checkpoint import Checkpoint, take_network
from worldline.weights.keymap import KeyMap, LoRARecipe
from worldline.weights.networks import Count, Flag, Network, Number, open_weights

_ATTENTION = {"wq": "q", "wk": "k", "wv": "v", "wo": "out", "q_norm": "q_norm", "k_norm": "k_norm"}

KEYS = KeyMap(
    prefixes=("model.", ""),
    rename={
        "tok_embeddings.weight": "embedding.weight",
        "layers.{i}.attention_norm.weight": "layers.{i}.attention_norm.weight",
        "layers.{i}.cross_attention_norm.weight": "layers.{i}.cross_attention_norm.weight",
        "layers.{i}.ffn_norm.weight": "layers.{i}.feed_forward_norm.weight",
        "layers.{i}.feed_forward.w1.weight": "layers.{i}.feed_forward.gate.weight",
        "layers.{i}.feed_forward.w3.weight": "layers.{i}.feed_forward.up.weight",
        "layers.{i}.feed_forward.w2.weight": "layers.{i}.feed_forward.down.weight",
        "norm.weight": "norm.weight",
        "output.weight": "head.weight",
        **{
            f"layers.{{i}}.{block}.{theirs}.weight": f"layers.{{i}}.{block}.{ours}.weight"
            for block in ("attention", "cross_attention")
            for theirs, ours in _ATTENTION.items()
        },
    },
    drop={
        "*_extra_state": "FP8 bookkeeping of Transformer Engine",
        "*rope.cos_cached": "rotary table, computed here",
        "*rope.sin_cached": "rotary table, computed here",
        "*pos_emb.pos_emb_?": "position table, computed here",
    },
)
LAYOUTS = (KEYS,)
# no reference trains one: every matrix of the layers, as usual for language models
LORA = LoRARecipe(targets=("layers.*attention.*.weight", "layers.*.feed_forward.*.weight"), rank=32)

_DEEP_AND_WIDE = (40, 5120)  # the 12B and 13B models, which stretch their frequencies


class Settings(networks.Settings):
    """The released config.json; tensors imply what is None."""

    n_layers: Count | None = None
    dim: Count | None = None
    n_heads: Count | None = None
    n_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_hidden_size: Count | None = None
    vocab_size: Count | None = None
    context_dim: Count | None = None
    insert_cross_attn: Flag | None = None
    insert_cross_attn_every_k_layers: Count = 1
    apply_abs_pos_emb: Flag | None = None
    norm_eps: Number = 1e-5
    rope_theta: Number = 500_000.0
    apply_yarn: Flag | None = None
    yarn_scale: Number = Yarn.scale
    yarn_beta_fast: Number = Yarn.beta_fast
    yarn_beta_slow: Number = Yarn.beta_slow
    original_latent_shape: tuple[Count, Count, Count] = (*Yarn.original, Yarn.original[1])
    # the first of 2 frames or more is an input
    video_latent_shape: tuple[Annotated[Count, Field(ge=2)], Count, Count] = astuple(RELEASED_GRID)


def open_network(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> Network[ARTransformerConfig]:
    """Open an autoregressive transformer by its headers, and config.json beside it unless given.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor does not fit.
    """
    source = take_network(open_weights(path, SIGNATURE), SIGNATURE, KEYS.prefixes)
    beside = source.path.parent / "config.json"
    config = read_config(
        source, networks.read_settings(beside.parent) if settings is None else settings
    )
    network = Network(ARTransformer, config, source, KEYS, (beside,), layouts=LAYOUTS)
    return network.check()


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> ARTransformerConfig:
    """Architecture of a checkpoint.

    Settings win over the shapes of tensors, so that a file that contradicts them fails by the
    tensor's name when it is matched, as one that lacks its last shards or layers does.
    """
    shapes = networks.Shapes(source, KEYS, "an autoregressive Cosmos model")
    stated = Settings.parse(settings, source.path.parent / "config.json")
    context, attention = "layers.0.cross_attention.k.weight", "layers.0.attention"
    has_context = stated.insert_cross_attn
    if has_context is None:
        has_context = context in shapes.shapes
    depth = stated.n_layers or shapes.count("layers")
    width = stated.dim or shapes.size("embedding.weight", 1)
    head_size = stated.head_dim or shapes.size(f"{attention}.q_norm.weight")
    stretched, absolute = stated.apply_yarn, stated.apply_abs_pos_emb
    if stretched is None:
        stretched = (depth, width) == _DEEP_AND_WIDE
    rows = shapes.size("embedding.weight")
    vocabulary = stated.vocab_size or shapes.size("head.weight")
    if rows < (ids := vocabulary + has_context):  # the begin token is the next id
        raise CheckpointError(f"{source.path}: embedding_rows is {rows}; {ids} ids are read")
    return ARTransformerConfig(
        depth=depth,
        width=width,
        num_heads=stated.n_heads or shapes.size(f"{attention}.q.weight") // head_size,
        num_kv_heads=stated.n_kv_heads or shapes.size(f"{attention}.k.weight") // head_size,
        head_size=head_size,
        hidden=stated.ffn_hidden_size or shapes.size("layers.0.feed_forward.gate.weight"),
        vocabulary=vocabulary,
        embedding_rows=rows,
        grid=LatentShape(*stated.video_latent_shape),
        rope_theta=stated.rope_theta,
        norm_eps=stated.norm_eps,
        yarn=Yarn(
            stated.original_latent_shape[:2],
            stated.yarn_scale,
            stated.yarn_beta_fast,
            stated.yarn_beta_slow,
        )
        if stretched
        else None,
        context_width=(stated.context_dim or shapes.size(context, 1)) if has_context else None,
        context_every=stated.insert_cross_attn_every_k_layers,
        absolute_positions=has_context if absolute is None else absolute,
    )


def layout(network: Network[ARTransformerConfig], diffusers: bool) -> tuple[KeyMap, dict[str, Any]]:
    """Names of tensors in NVIDIA's layout; diffusers has none (CheckpointError)."""
    if diffusers:
        raise CheckpointError(f"{network.path}: diffusers has no autoregressive transformer")
    return KEYS, {}


def settings_of(config: ARTransformerConfig) -> dict[str, Any]:
    """Content of config.json."""
    settings: dict[str, Any] = {
        "n_layers": config.depth,
        "dim": config.width,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "ffn_hidden_size": config.hidden,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "apply_abs_pos_emb": config.absolute_positions,
        "insert_cross_attn_every_k_layers": config.context_every,
        "vocab_size": config.vocabulary,
        "apply_yarn": config.yarn is not None,
        "insert_cross_attn": config.context_width is not None,
        "video_latent_shape": [*astuple(config.grid)],
    }
    if config.context_width is not None:
        settings["context_dim"] = config.context_width
    if config.yarn is not None:
        settings |= {
            "original_latent_shape": [*config.yarn.original, config.yarn.original[1]],
            "yarn_scale": config.yarn.scale,
            "yarn_beta_fast": config.yarn.beta_fast,
            "yarn_beta_slow": config.yarn.beta_slow,
        }
    return settings
