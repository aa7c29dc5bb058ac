"""A key map works both ways, and names all that does not fit in one line."""

import pytest
import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.weights.keymap import KeyMap, match

KEYS = KeyMap(
    rename={
        "tok_embeddings.weight": "embed.weight",
        "layers.{i}.attention.wq.weight": "blocks.{i}.attention.q.weight",
        "up.{i}.block.{j}.conv.weight": "up.{i}.{j}.weight",
    },
    drop={"*_extra_state": "left over", "ema.*": "the other set of weights"},
    prefixes=("model.", "network._orig_mod.", ""),
)


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("tok_embeddings.weight", "embed.weight"),
        ("layers.31.attention.wq.weight", "blocks.31.attention.q.weight"),
        ("up.2.block.10.conv.weight", "up.2.10.weight"),
    ],
)
@pytest.mark.parametrize("prefix", KEYS.prefixes)
def test_both_directions(released: str, ours: str, prefix: str) -> None:
    assert KEYS.ours(prefix + released) == ours
    assert KEYS.released(ours) == "model." + released
    assert KEYS.released(ours, prefix) == prefix + released


def test_dots_and_fields_are_taken_literally() -> None:
    for name in ("tok_embeddingsXweight", "layers.x.attention.wq.weight", "layers.1.attention.wq"):
        assert KEYS.ours(name) is None


def test_dropped_with_and_without_prefix() -> None:
    assert KEYS.ours("model.layers.0.attention._extra_state") is None
    assert KEYS.ours("ema.network-layers") is None


def test_unknown_names() -> None:
    assert KEYS.ours("model.layers.0.attention.wk.weight") is None
    assert not KEYS.drops("model.layers.0.attention.wk.weight")
    assert KEYS.drops("ema.tok_embeddings.weight")
    with pytest.raises(ValueError, match=r"no released name for 'blocks\.x'"):
        KEYS.released("blocks.x")


EXPECTED = {"embed.weight": (4, 2), **{f"blocks.{i}.attention.q.weight": (2, 2) for i in range(3)}}


def infos(**changes: tuple[int, ...] | None) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...] | None] = {
        KEYS.released(name, ""): shape for name, shape in EXPECTED.items()
    }
    shapes.update({name.replace("__", "."): shape for name, shape in changes.items()})
    return {n: torch.empty(s, device="meta") for n, s in shapes.items() if s is not None}


def test_match() -> None:
    pairs = match(infos(x_extra_state=(1,)), EXPECTED, KEYS, "model.pt")
    assert pairs == {name: KEYS.released(name, "") for name in EXPECTED}


def test_everything_wrong_in_one_line() -> None:
    found = infos(
        tok_embeddings__weight=(5, 2),
        layers__1__attention__wq__weight=None,
        layers__0__attention__wqq__weight=(2, 2),
        **{"model.layers.0.attention.wq.weight": (2, 2)},
    )
    with pytest.raises(CheckpointError) as caught:
        match(found, EXPECTED, KEYS, "model.pt")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.pt does not fit the model: ")
    assert "tok_embeddings.weight is [5, 2] in the file, expected [4, 2]" in message
    assert "1 missing: model.layers.1.attention.wq.weight" in message
    assert "1 unknown: layers.0.attention.wqq.weight" in message
    assert "1 twice: layers.0.attention.wq.weight and model.layers.0.att" in message


def test_layer_beyond_the_model_is_unknown() -> None:
    with pytest.raises(CheckpointError, match=r"1 unknown: layers\.3\.attention\.wq\.weight"):
        match(infos(layers__3__attention__wq__weight=(2, 2)), EXPECTED, KEYS, "model.pt")


def test_long_lists_are_cut() -> None:
    expected = {f"blocks.{i}.attention.q.weight": (2, 2) for i in range(1000)}
    with pytest.raises(CheckpointError, match="997 missing: ") as caught:
        match(infos(tok_embeddings__weight=None), expected, KEYS, "model.pt")
    assert len(str(caught.value)) < 500


def test_another_model() -> None:
    held = {"conv.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="1 unknown: conv"):
        match(held, EXPECTED, KEYS, "model.pt")


def test_optional() -> None:
    found = infos(layers__1__attention__wq__weight=None)
    pairs = match(found, EXPECTED, KEYS, "model.pt", optional=["blocks.*.q.weight"])
    assert "blocks.1.attention.q.weight" not in pairs
