"""How the released files name their tensors, and the architecture that they imply.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/model.py` (load_ar_model),
`autoregressive/utils/checkpoint.py`, `autoregressive/configs/inference/inference_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldline.errors import CheckpointError
from worldline.models.predict1_ar.model import RELEASED_GRID, ARTransformerConfig
from worldline.nn.rope import Yarn
from worldline.shapes import LatentShape
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint

_ATTENTION = {
    "wq.weight": "q.weight",
    "wk.weight": "k.weight",
    "wv.weight": "v.weight",
    "wo.weight": "out.weight",
    "q_norm.weight": "q_norm.weight",
    "k_norm.weight": "k_norm.weight",
}

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
            f"layers.{{i}}.{block}.{theirs}": f"layers.{{i}}.{block}.{ours}"
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

# released name pattern -> axis that tensor-parallel shards are joined on; None is replicated
SHARDS: Mapping[str, int | None] = {
    "*tok_embeddings.weight": 0,
    "*output.weight": 0,
    "*attention.w[qkv].weight": 0,
    "*attention.wo.weight": 1,
    "*feed_forward.w[13].weight": 0,
    "*feed_forward.w2.weight": 1,
    "*norm.weight": None,
}

_DEEP_AND_WIDE = (40, 5120)  # the 12B and 13B models, which stretch their frequencies


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> ARTransformerConfig:
    """Return the architecture of a checkpoint.

    `settings` (the file config.json beside it, which may lack any field or be empty) is believed
    where it speaks, so that a file that contradicts it fails by the tensor's name when it is
    matched; the shapes of the tensors, then the released table, fill the gaps.

    Raises:
        CheckpointError: the tensors are not those of an autoregressive Cosmos model, or a setting
            makes no sense.
    """
    shapes = {}
    for name, info in source.tensors.items():
        shapes[name.removeprefix("model.")] = info.shape
    for needed in (
        "tok_embeddings.weight",
        "output.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.q_norm.weight",
        "layers.0.feed_forward.w1.weight",
    ):
        if needed not in shapes:
            raise CheckpointError(
                f"{source.path}: not an autoregressive Cosmos model (no tensor {needed})"
            )

    def pick(name: str, found: Any) -> Any:
        value = settings.get(name)
        return found if value is None else value

    try:
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
        width = int(pick("dim", shapes["tok_embeddings.weight"][1]))
        depth = int(pick("n_layers", depth))
        head_size = shapes["layers.0.attention.q_norm.weight"][0]
        num_heads = int(pick("n_heads", shapes["layers.0.attention.wq.weight"][0] // head_size))
        num_kv_heads = int(
            pick("n_kv_heads", shapes["layers.0.attention.wk.weight"][0] // head_size)
        )
        context = shapes.get("layers.0.cross_attention.wk.weight")
        has_context = bool(pick("insert_cross_attn", context is not None))
        context_width = int(pick("context_dim", context[1] if context else 1024))
        grid = pick("video_latent_shape", None)
        rope_theta = float(pick("rope_theta", 500_000.0))
        return ARTransformerConfig(
            depth=depth,
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=int(pick("head_dim", head_size)),
            hidden=int(pick("ffn_hidden_size", shapes["layers.0.feed_forward.w1.weight"][0])),
            vocabulary=shapes["output.weight"][0],
            embedding_rows=shapes["tok_embeddings.weight"][0],
            grid=LatentShape(*(int(side) for side in grid)) if grid else RELEASED_GRID,
            rope_theta=rope_theta,
            norm_eps=float(pick("norm_eps", 1e-5)),
            yarn=_yarn(settings, depth, width),
            context_width=context_width if has_context else None,
            context_every=int(pick("insert_cross_attn_every_k_layers", 1)),
            absolute_positions=bool(pick("apply_abs_pos_emb", has_context)),
            leading_tokens=1 if has_context else 0,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path.parent / 'config.json'}: {error}") from error


def _yarn(settings: Mapping[str, Any], depth: int, width: int) -> Yarn | None:
    applied = settings.get("apply_yarn")
    if applied is None:
        applied = (depth, width) == _DEEP_AND_WIDE
    if not applied:
        return None
    default = Yarn()
    original = settings.get("original_latent_shape")
    return Yarn(
        original=(int(original[0]), int(original[1])) if original else default.original,
        scale=float(settings.get("yarn_scale") or default.scale),
        beta_fast=float(settings.get("yarn_beta_fast") or default.beta_fast),
        beta_slow=float(settings.get("yarn_beta_slow") or default.beta_slow),
    )


def write_settings(config: ARTransformerConfig) -> dict[str, Any]:
    """Return what config.json says of `config`; `read_config` gives it back."""
    grid = config.grid
    settings: dict[str, Any] = {
        "dim": config.width,
        "n_layers": config.depth,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "ffn_hidden_size": config.hidden,
        "vocab_size": config.vocabulary,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "apply_yarn": config.yarn is not None,
        "apply_abs_pos_emb": config.absolute_positions,
        "insert_cross_attn": config.context_width is not None,
        "insert_cross_attn_every_k_layers": config.context_every,
        "video_latent_shape": [grid.frames, grid.height, grid.width],
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
