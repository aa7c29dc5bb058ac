"""Names that Transformer Engine gives the tensors of an autoregressive transformer, and PyTorch's.

Its feed-forward layer holds gate and first projection as one tensor, in each tensor-parallel part.
Rows of queries and keys stay in order: no Cosmos model has the first rotary layout, of other rows.
Source: nvidia-cosmos/cosmos-predict1 `autoregressive/utils/checkpoint.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from worldline.weights.keymap import KeyMap
from worldline.weights.names import ENGINE

_NAMES = {
    f"layers.{{i}}.{theirs}": f"layers.{{i}}.{ours}.weight"
    for theirs, ours in {
        f"{ENGINE}layer_norm_weight": "attention_norm",
        f"{ENGINE}query_weight": "attention.wq",
        f"{ENGINE}key_weight": "attention.wk",
        f"{ENGINE}value_weight": "attention.wv",
        "self_attention.proj.weight": "attention.wo",
        "self_attention.q_norm.weight": "attention.q_norm",
        "self_attention.k_norm.weight": "attention.k_norm",
        "layernorm_mlp.layer_norm_weight": "ffn_norm",
        "layernorm_mlp.fc1_weight": "feed_forward.w1",
        "layernorm_mlp.fc2_weight": "feed_forward.w2",
        "inter_attention.layernorm_query.layer_norm_weight": "cross_attention_norm",
        "inter_attention.layernorm_query.query_weight": "cross_attention.wq",
        "inter_attention.key_value.key_weight": "cross_attention.wk",
        "inter_attention.key_value.value_weight": "cross_attention.wv",
        "inter_attention.proj.weight": "cross_attention.wo",
    }.items()
}
_FROM, _TO = KeyMap(_NAMES), KeyMap({ours: theirs for theirs, ours in _NAMES.items()})
_FUSED, _FIRST, _SECOND = "fc1_weight", "feed_forward.w1.weight", "feed_forward.w3.weight"


def _renamed(keys: KeyMap, name: str) -> str:
    front, layers, rest = name.partition("layers.")
    return f"{front}{keys.ours(layers + rest) or layers + rest}"


def from_engine(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by PyTorch's names, without the bookkeeping of Transformer Engine."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        ours = _renamed(_FROM, name)
        if name.endswith(_FUSED):
            half, rows = entry.meta.shape[0] // 2, entry.meta.shape[0]
            found[ours] = entry.cut(0, 0, half)
            found[ours.replace(_FIRST, _SECOND)] = entry.cut(0, half, rows - half)
        elif "_extra_state" not in name:
            found[ours] = entry
    return found


def to_engine(
    entries: Mapping[str, Any], join: Callable[[str, tuple[Any, Any]], Any]
) -> dict[str, Any]:
    """The tensors by Transformer Engine's names; `join` makes one of two, by rows."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if name.endswith(_FIRST):
            pair = entry, entries[name.replace(_FIRST, _SECOND)]
            found[_renamed(_TO, name)] = join(name, pair)
        elif not name.endswith(_SECOND):
            found[_renamed(_TO, name)] = entry
    return found
