"""How the released files name their tensors, and the architecture that they imply.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/model.py` (load_ar_model),
`autoregressive/utils/checkpoint.py`, `autoregressive/configs/inference/inference_config.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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

# tensors that tell the architecture -> number of axes
_TELLING = {
    "tok_embeddings.weight": 2,
    "output.weight": 2,
    "layers.0.attention.wq.weight": 2,
    "layers.0.attention.wk.weight": 2,
    "layers.0.attention.q_norm.weight": 1,
    "layers.0.feed_forward.w1.weight": 2,
}
_LAYER = re.compile(r"layers\.(\d+)\.")
_LARGEST = 1 << 20  # of any size in config.json; beyond it lies a slip of the pen

_DEEP_AND_WIDE = (40, 5120)  # the 12B and 13B models, which stretch their frequencies


@dataclass(frozen=True)
class _Settings:
    """The fields of config.json; one that is absent or null takes the value found otherwise."""

    values: Mapping[str, Any]
    path: Path

    def has(self, field: str) -> bool:
        return self.values.get(field) is not None

    def refusal(self, field: str, expected: str) -> CheckpointError:
        value = json.dumps(self.values.get(field))
        return CheckpointError(f"{self.path}: {field} is {value}; it must be {expected}")

    def whole(self, field: str, found: int) -> int:
        if not self.has(field):
            return found
        value = self.values[field]
        if not _is_whole(value):
            raise self.refusal(field, "a whole number of at least 1")
        return int(value)

    def number(self, field: str, found: float) -> float:
        if not self.has(field):
            return found
        value = self.values[field]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise self.refusal(field, "a number above 0")
        return float(value)

    def flag(self, field: str, found: bool) -> bool:
        if not self.has(field):
            return found
        value = self.values[field]
        if not isinstance(value, bool):
            raise self.refusal(field, "true or false")
        return value

    def latent_shape(self, field: str) -> LatentShape | None:
        if not self.has(field):
            return None
        value = self.values[field]
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_whole, value)):
            raise self.refusal(field, "[frames, rows, columns], whole numbers of at least 1")
        return LatentShape(*value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


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
    for needed, axes in _TELLING.items():
        if len(shapes.get(needed, ())) != axes or 0 in shapes[needed]:
            state = f"is {list(shapes[needed])}" if needed in shapes else "is absent"
            raise CheckpointError(
                f"{source.path}: not an autoregressive Cosmos model (tensor {needed} {state})"
            )
    given = _Settings(settings, source.path.parent / "config.json")
    numbers = (_LAYER.match(name) for name in shapes)
    rows = shapes["output.weight"][0]
    if given.whole("vocab_size", rows) != rows:
        raise given.refusal("vocab_size", f"{rows}, the rows of output.weight")
    depth = given.whole("n_layers", 1 + max(int(found[1]) for found in numbers if found))
    width = given.whole("dim", shapes["tok_embeddings.weight"][1])
    [found_size] = shapes["layers.0.attention.q_norm.weight"]
    head_size = given.whole("head_dim", found_size)
    if given.has("head_dim") and head_size % 2:
        raise given.refusal("head_dim", "even: rotary channels come in pairs")
    num_heads = given.whole("n_heads", shapes["layers.0.attention.wq.weight"][0] // found_size)
    num_kv_heads = given.whole(
        "n_kv_heads", shapes["layers.0.attention.wk.weight"][0] // found_size
    )
    if given.has("n_kv_heads") and num_heads % num_kv_heads:
        raise given.refusal("n_kv_heads", f"a divisor of the number of heads, {num_heads}")
    grid = given.latent_shape("video_latent_shape") or RELEASED_GRID
    if grid.frames < 2:
        raise given.refusal(
            "video_latent_shape", "of 2 frames or more: the first is given, the others are made"
        )
    context = shapes.get("layers.0.cross_attention.wk.weight")
    has_context = given.flag("insert_cross_attn", context is not None)
    context_width = given.whole("context_dim", context[1] if context else 1024)
    try:
        return ARTransformerConfig(
            depth=depth,
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            hidden=given.whole("ffn_hidden_size", shapes["layers.0.feed_forward.w1.weight"][0]),
            vocabulary=rows,
            embedding_rows=shapes["tok_embeddings.weight"][0],
            grid=grid,
            rope_theta=given.number("rope_theta", 500_000.0),
            norm_eps=given.number("norm_eps", 1e-5),
            yarn=_yarn(given, depth, width),
            context_width=context_width if has_context else None,
            context_every=given.whole("insert_cross_attn_every_k_layers", 1),
            absolute_positions=given.flag("apply_abs_pos_emb", has_context),
            leading_tokens=1 if has_context else 0,
        )
    except ValueError as error:  # what is left comes from the shapes
        raise CheckpointError(f"{source.path}: {error}") from error


def _yarn(given: _Settings, depth: int, width: int) -> Yarn | None:
    if not given.flag("apply_yarn", (depth, width) == _DEEP_AND_WIDE):
        return None
    default = Yarn()
    original = given.latent_shape("original_latent_shape")
    yarn = Yarn(
        original=(original.frames, original.height) if original else default.original,
        scale=given.number("yarn_scale", default.scale),
        beta_fast=given.number("yarn_beta_fast", default.beta_fast),
        beta_slow=given.number("yarn_beta_slow", default.beta_slow),
    )
    if yarn.beta_fast <= yarn.beta_slow:
        field = "yarn_beta_fast" if given.has("yarn_beta_fast") else "yarn_beta_slow"
        raise given.refusal(field, "such that yarn_beta_fast is above yarn_beta_slow")
    return yarn


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
