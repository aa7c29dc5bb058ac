"""Every tensor of the released Predict2.5 transformers, at full size, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worldline.errors import CheckpointError
from worldline.families.predict2_5 import weights
from worldline.families.predict2_5.model import PRESETS, FlowDiT, released_exponents
from worldline.families.predict2_5.request import SIGNATURE
from worldline.opening import find_family
from worldline.weights.checkpoint import Checkpoint, take_network
from worldline.weights.keymap import KeyMap

from .diffusers_layout import diffusers_config
from .test_key_manifests import fake, fits, manifest

SIZES = ("2B", "14B")
POSITIONS = ("net.pos_embedder.dim_temporal_range", "net.pos_embedder.dim_spatial_range")


def keys_of(layout: str) -> KeyMap:
    return weights.DIFFUSERS_KEYS if layout else weights.KEYS


def checkpoint_of(tensors: dict[str, Any], head_size: int = 128) -> Checkpoint:
    """One whose exponents, which are looked at, are there; all else is on the meta device."""
    values = {}
    for name, exponents in zip(POSITIONS, released_exponents(head_size), strict=True):
        for held in {name, name.removeprefix("net.")} & tensors.keys():
            values[held.replace(".", "_")] = torch.tensor(exponents).bfloat16()
    return fake(tensors, "model.pt", **values)


def model_of(checkpoint: Checkpoint, keys: KeyMap, stated: dict[str, Any]) -> FlowDiT:
    with torch.device("meta"):
        return FlowDiT(weights.read_config(checkpoint, keys, stated.get("config", {})))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["", ".diffusers"])
@pytest.mark.parametrize("bare", [False, True])
def test_files_fit_both_ways(size: str, layout: str, bare: bool) -> None:
    stated, keys = manifest(f"Cosmos-Predict2.5-{size}{layout}"), keys_of(layout)
    tensors = stated["tensors"]
    if bare:  # without the prefix, and what is optional
        tensors = {
            name.removeprefix(stated["prefix"]): info
            for name, info in tensors.items()
            if name not in stated["optional"]
        }
    checkpoint = checkpoint_of(tensors)
    model = model_of(checkpoint, keys, stated)
    assert model.config == PRESETS[size]
    pairs = fits(model, checkpoint, keys)
    assert set(tensors) - set(pairs.values()) <= set(stated["optional"])
    assert sum(parameter.numel() for parameter in model.parameters()) == stated["parameters"]
    for ours, theirs in pairs.items():
        assert keys.released(ours, "" if bare else None) == theirs
    assert find_family(checkpoint.tensors) == "predict2.5"


@pytest.mark.parametrize("size", SIZES)
def test_both_layouts_end_at_the_same_tensor(size: str) -> None:
    for theirs, nvidia in manifest(f"Cosmos-Predict2.5-{size}.diffusers")["key_map"].items():
        assert weights.DIFFUSERS_KEYS.ours(theirs) == weights.KEYS.ours(nvidia)


@pytest.mark.parametrize("size", SIZES)
def test_a_diffusers_config_equals_the_released_one(size: str) -> None:
    stated = manifest(f"Cosmos-Predict2.5-{size}.diffusers")["config"]
    for key, value in diffusers_config(PRESETS[size]).items():
        if not key.startswith("_"):
            assert stated[key] == value, key


@pytest.mark.parametrize("size", SIZES)
def test_averages_of_training_fit_too(size: str) -> None:
    """They lie beside the weights of the last step, which then are not what is meant."""
    tensors = manifest(f"Cosmos-Predict2.5-{size}")["tensors"]
    averaged = {name.replace("net.", "net_ema."): info for name, info in tensors.items()}
    values = {
        f"{prefix}_pos_embedder_dim_{kind}_range": torch.tensor(exponents)
        for prefix in ("net", "net_ema")
        for kind, exponents in zip(("temporal", "spatial"), released_exponents(128), strict=True)
    }
    file = fake(tensors | averaged, "model.pt", **values)
    checkpoint = take_network(file, SIGNATURE, weights.KEYS.prefixes)
    pairs = fits(model_of(checkpoint, weights.KEYS, {}), checkpoint, weights.KEYS)
    for name in pairs.values():
        assert checkpoint.entries[name] is file.entries[f"net_ema.{name}"]
    assert "net_ema." in checkpoint.notes[0]


@pytest.mark.parametrize("layout", ["", ".diffusers"])
def test_files_that_do_not_fit(layout: str) -> None:
    stated, keys = manifest(f"Cosmos-Predict2.5-2B{layout}"), keys_of(layout)
    tensors = stated["tensors"]
    for stray in ("net.blocks.0.self_attn.q_norm", "net.blocks.3.cross_attn.attn_op"):
        checkpoint = checkpoint_of(tensors)
        for pattern in stated["ignored"]:
            name = f"{stray}.{pattern.removeprefix('*')}"
            checkpoint = checkpoint_of(tensors | {name: ["uint8", [5]]})
        fits(model_of(checkpoint, keys, stated), checkpoint, keys)
    for name, change in {
        keys.released("blocks.3.feed_forward.body.up.weight"): None,
        keys.released("project.bias"): None,
        keys.released("blocks.2.attention.body.v.weight"): [2048, 2047],
        "net.blocks.28.self_attn.q_proj.bias": [2048],
    }.items():
        changed = {n: info for n, info in tensors.items() if n != name}
        if change is not None:
            changed[name] = ["bfloat16", change]
        checkpoint = checkpoint_of(changed)
        with pytest.raises(CheckpointError) as raised:
            fits(model_of(checkpoint, keys, stated), checkpoint, keys)
        assert name in str(raised.value)


def test_a_transformer_of_predict1_is_none() -> None:
    checkpoint = fake(manifest("Cosmos-Predict1-7B-Video2World")["tensors"], "model.pt")
    assert find_family(checkpoint.tensors) == "diffusion"
    with pytest.raises(CheckpointError, match="diffusion transformer of this kind"):
        model_of(checkpoint, weights.KEYS, {})
