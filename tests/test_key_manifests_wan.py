"""The released files of the Wan2.1 tokenizer, at full size, against our network without weights."""

from __future__ import annotations

import pytest
import torch

from tiny.export import stored_tensors
from worldline.errors import CheckpointError
from worldline.tokenizers.layouts import wan_settings
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import (
    is_diffusers,
    is_wan,
    key_map,
    read_config,
)

from .test_key_manifests import fake, fits, manifest

FILES = {False: "Wan2.1_VAE", True: "Wan2.1_VAE.diffusers"}  # by whether diffusers wrote it
CONFIG = WanTokenizerConfig()


def model() -> WanTokenizer:
    with torch.device("meta"):
        return WanTokenizer(CONFIG)


@pytest.mark.parametrize("theirs", FILES)
def test_files_fit_both_ways(theirs: bool) -> None:
    stated = manifest(FILES[theirs])
    checkpoint = fake(stated["tensors"], "x")
    assert is_diffusers(checkpoint) == theirs
    assert is_wan(checkpoint)
    assert read_config(checkpoint, {}) == CONFIG
    keys = key_map(CONFIG, theirs)
    pairs = fits(model(), checkpoint, keys)
    assert sorted(pairs.values()) == sorted(stated["tensors"])
    for ours, theirs in pairs.items():
        assert keys.released(ours) == theirs
    assert sum(p.numel() for p in model().parameters()) == stated["parameters"]


def test_both_layouts_end_at_the_same_tensor() -> None:
    keys = {theirs: key_map(CONFIG, theirs) for theirs in FILES}
    for theirs, released in manifest(FILES[True])["key_map"].items():
        assert keys[True].ours(theirs) == keys[False].ours(released)


@pytest.mark.parametrize("theirs", FILES)
def test_what_is_written_has_the_released_names_and_shapes(theirs: bool) -> None:
    ours = stored_tensors(model(), key_map(CONFIG, theirs))
    shapes = {name: list(tensor.shape) for name, tensor in ours.items()}
    stated = manifest(FILES[theirs])["tensors"]
    assert shapes == {name: shape for name, (_, shape) in stated.items()}


def test_the_config_of_diffusers() -> None:
    stated, ours = manifest(FILES[True])["config"], wan_settings(CONFIG)
    assert {name: ours[name] for name in stated} == stated
    source = fake(manifest(FILES[True])["tensors"], "x")
    assert read_config(source, stated) == CONFIG


@pytest.mark.parametrize("theirs", FILES)
def test_files_that_do_not_fit(theirs: bool) -> None:
    keys, tensors = key_map(CONFIG, theirs), manifest(FILES[theirs])["tensors"]
    for name, change in {
        keys.released("decoder.layers.3.time.weight"): None,
        keys.released("encoder.layers.4.conv2.gamma"): [191, 1, 1, 1],
        "decoder.conv9.weight": [8, 8],
    }.items():
        changed = {n: info for n, info in tensors.items() if n != name}
        if change is not None:
            changed[name] = ["float32", change]
        with pytest.raises(CheckpointError) as raised:
            fits(model(), fake(changed, "x"), keys)
        assert name in str(raised.value)
