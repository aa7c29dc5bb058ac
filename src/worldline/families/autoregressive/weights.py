"""Names of the tensors in released files, and the architecture that they imply.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/model.py` (load_ar_model),
`autoregressive/utils/checkpoint.py`, `autoregressive/configs/inference/inference_config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError
from worldline.families.autoregressive.model import (
    PRESETS,
    RELEASED_GRID,
    ARTransformer,
    ARTransformerConfig,
)
from worldline.nn.rope import Yarn
from worldline.shapes import LatentShape
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import (
    NetworkFiles,
    check_network,
    count_blocks,
    open_transformer,
    read_settings,
    read_shapes,
    released_size,
)
from worldline.weights.source import Checkpoint

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

# tensors that fix the architecture -> number of axes; our names
_DECISIVE = {
    "embedding.weight": 2,
    "head.weight": 2,
    "layers.0.attention.q.weight": 2,
    "layers.0.attention.k.weight": 2,
    "layers.0.attention.q_norm.weight": 1,
    "layers.0.feed_forward.gate.weight": 2,
}
_LARGEST = 1 << 20  # of any size in config.json; beyond it lies a slip of the pen
_DEEP_AND_WIDE = (40, 5120)  # the 12B and 13B models, which stretch their frequencies


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < 1e12  # type: ignore[operator]


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_size, value))


_SIZE = _is_size, "a whole number of at least 1"
_NUMBER = _is_number, "a number above 0"
_FLAG = lambda value: isinstance(value, bool), "true or false"
_SHAPE = _is_shape, "[frames, rows, columns], whole numbers of at least 1"
# field of config.json -> its check, and what it must be
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("vocab_size", "n_layers", "dim", "head_dim", "n_heads", "n_kv_heads"), _SIZE),
    **dict.fromkeys(("ffn_hidden_size", "context_dim", "insert_cross_attn_every_k_layers"), _SIZE),
    **dict.fromkeys(("rope_theta", "norm_eps"), _NUMBER),
    **dict.fromkeys(("yarn_scale", "yarn_beta_fast", "yarn_beta_slow"), _NUMBER),
    **dict.fromkeys(("insert_cross_attn", "apply_abs_pos_emb", "apply_yarn"), _FLAG),
    **dict.fromkeys(("video_latent_shape", "original_latent_shape"), _SHAPE),
}
# field of config.json -> field of the config, of equal meaning
_EQUAL = {
    "n_layers": "depth",
    "dim": "width",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "head_dim": "head_size",
    "ffn_hidden_size": "hidden",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "apply_abs_pos_emb": "absolute_positions",
    "insert_cross_attn_every_k_layers": "context_every",
}


def is_autoregressive(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of an autoregressive transformer."""
    return any(name.removeprefix("model.") == "tok_embeddings.weight" for name in names)


def open_autoregressive(
    path: Path | Checkpoint, settings: Mapping[str, Any] | None = None
) -> NetworkFiles[ARTransformerConfig]:
    """Open an autoregressive transformer; headers only.

    Args:
        path: as for `open_transformer`.
        settings: content of `config.json`; None reads the one beside the file.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor does not fit.
    """
    source = open_transformer(path)
    if settings is None:
        settings = read_settings(source.path.parent)
    return check_network(source, KEYS, read_config(source, settings), ARTransformer)


def read_config(source: Checkpoint, settings: Mapping[str, Any]) -> ARTransformerConfig:
    """Architecture of a checkpoint.

    `settings` (the file config.json beside it, which may lack any field or be empty) is believed
    where it speaks, so that a file that contradicts it fails by the tensor's name when it is
    matched; the shapes of the tensors, then the released table, fill the gaps.

    Raises:
        CheckpointError: the tensors are not those of an autoregressive Cosmos model, or a setting
            makes no sense.
    """
    shapes = read_shapes(source, KEYS, _DECISIVE, "an autoregressive Cosmos model")
    path = source.path.parent / "config.json"
    stated = {field: settings[field] for field in _FIELDS if settings.get(field) is not None}
    for field, value in stated.items():
        check, expected = _FIELDS[field]
        _require(check(value), path, field, value, expected)
    rows = shapes["head.weight"][0]
    [head_size] = shapes["layers.0.attention.q_norm.weight"]
    context = shapes.get("layers.0.cross_attention.k.weight")
    has_context = stated.get("insert_cross_attn", context is not None)
    fields = {
        "depth": count_blocks(shapes, "layers"),
        "width": shapes["embedding.weight"][1],
        "num_heads": shapes["layers.0.attention.q.weight"][0] // head_size,
        "num_kv_heads": shapes["layers.0.attention.k.weight"][0] // head_size,
        "head_size": head_size,
        "hidden": shapes["layers.0.feed_forward.gate.weight"][0],
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "absolute_positions": has_context,
        "context_every": 1,
        **{ours: stated[field] for field, ours in _EQUAL.items() if field in stated},
    }
    grid = stated.get("video_latent_shape", [*astuple(RELEASED_GRID)])
    for field, good, expected in (
        ("vocab_size", stated.get("vocab_size") == rows, f"{rows}, the rows of output.weight"),
        ("head_dim", fields["head_size"] % 2 == 0, "even: rotary channels come in pairs"),
        (
            "n_kv_heads",
            fields["num_heads"] % stated.get("n_kv_heads", 1) == 0,
            f"a divisor of the number of heads, {fields['num_heads']}",
        ),
        ("video_latent_shape", grid[0] > 1, "of 2 frames or more: the first is an input"),
    ):
        if field in stated:
            _require(good, path, field, stated[field], expected)
    large = (fields["depth"], fields["width"]) == _DEEP_AND_WIDE
    context_width = stated.get("context_dim", context[1] if context else 1024)
    try:
        return ARTransformerConfig(
            **fields,
            vocabulary=rows,
            embedding_rows=shapes["embedding.weight"][0],
            grid=LatentShape(*grid),
            yarn=_read_yarn(stated, path) if stated.get("apply_yarn", large) else None,
            context_width=context_width if has_context else None,
            leading_tokens=1 if has_context else 0,
        )
    except CheckpointError:
        raise
    except ValueError as error:  # of the shapes
        raise CheckpointError(f"{source.path}: {error}") from error


def _read_yarn(stated: Mapping[str, Any], path: Path) -> Yarn:
    default = Yarn()
    frames, side = stated.get("original_latent_shape", default.original)[:2]
    yarn = Yarn(
        original=(frames, side),
        scale=float(stated.get("yarn_scale", default.scale)),
        beta_fast=float(stated.get("yarn_beta_fast", default.beta_fast)),
        beta_slow=float(stated.get("yarn_beta_slow", default.beta_slow)),
    )
    field = "yarn_beta_fast" if "yarn_beta_fast" in stated else "yarn_beta_slow"
    above = "such that yarn_beta_fast is above yarn_beta_slow"
    _require(yarn.beta_fast > yarn.beta_slow, path, field, stated.get(field), above)
    return yarn


def _require(good: bool, path: Path, field: str, value: object, expected: str) -> None:
    if not good:
        raise CheckpointError(f"{path}: {field} is {json.dumps(value)}; it must be {expected}")


def describe(config: ARTransformerConfig) -> str:
    """Kind and size in words."""
    kind = "Video2World" if config.context_width is not None else "base"
    size = released_size(PRESETS, config, "depth", "width", "context_width")
    grid = config.grid
    return (
        f"Cosmos autoregressive {kind} model, {size}: {config.depth} layers, width {config.width}, "
        f"{config.num_heads} heads ({config.num_kv_heads} of keys), vocabulary "
        f"{config.vocabulary:,}, latent {grid.frames} x {grid.height} x {grid.width}"
    )


def write_settings(config: ARTransformerConfig) -> dict[str, Any]:
    """Content of the config.json from which `read_config` reads `config`."""
    settings: dict[str, Any] = {
        **{field: getattr(config, ours) for field, ours in _EQUAL.items()},
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
