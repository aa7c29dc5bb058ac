"""Every released file's tensors, at full size, against our networks on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.families.autoregressive.model import PRESETS as AR_PRESETS
from worldline.families.autoregressive.model import ARTransformer
from worldline.families.autoregressive.weights import KEYS, read_config, settings_of
from worldline.families.diffusion import weights as dit_weights
from worldline.families.diffusion.model import PRESETS as DIT_PRESETS
from worldline.families.diffusion.model import DiT
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import key_map, network_view
from worldline.tokenizers.cosmos.weights import read_config as read_tokenizer_config
from worldline.weights.checkpoint import SHARDED_AXES, Checkpoint
from worldline.weights.keymap import KeyMap, match

from .diffusers_layout import diffusers_config
from .weights.memory import MemoryTensor

FOLDER = Path(__file__).parent / "keys"
AR = ["4B", "5B-Video2World", "12B", "13B-Video2World"]
DIFFUSION = [f"{size}-{kind}" for size in ("7B", "14B") for kind in ("Text2World", "Video2World")]
TOKENIZERS = {
    "Cosmos-Tokenize1-DV8x16x16-720p": "DV8x16x16",
    "Cosmos-Tokenize1-DV4x8x8-360p": "DV4x8x8",
    "Cosmos-Tokenize1-CV8x8x8-720p": "CV8x8x8",
    "Cosmos-Tokenize1-CV4x8x8-360p": "CV4x8x8",
}


def manifest(name: str) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return stated


def fake(tensors: dict[str, Any], path: str, **values: Tensor) -> Checkpoint:
    """A checkpoint of meta tensors, or of `values` for those whose content is looked at."""
    entries = {}
    for name, (dtype, shape) in tensors.items():
        tensor = values.get(name.replace(".", "_"))
        if tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        entries[name] = MemoryTensor(tensor)
    return Checkpoint(Path(path), "pt", entries)


def fits(module: nn.Module, checkpoint: Checkpoint, keys: KeyMap) -> dict[str, str]:
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return match(checkpoint.tensors, expected, keys, str(checkpoint.path))


def transformer(checkpoint: Checkpoint) -> ARTransformer:
    with torch.device("meta"):
        return ARTransformer(read_config(checkpoint, {}))


@pytest.mark.parametrize("size", AR)
def test_autoregressive_files_fit_both_ways(size: str) -> None:
    stated = manifest(f"Cosmos-Predict1-{size}")
    for strip in ("", "model."):  # the prefix is certain for some files only
        tensors = {n.removeprefix(strip): info for n, info in stated["tensors"].items()}
        checkpoint = fake(tensors, "model.pt")
        # no config.json: shapes and the released table alone
        assert read_config(checkpoint, {}) == AR_PRESETS[size]
        model = transformer(checkpoint)
        pairs = fits(model, checkpoint, KEYS)
        assert sorted(pairs.values()) == sorted(tensors)
        assert sum(p.numel() for p in model.parameters()) == stated["parameters"]
        for ours, theirs in pairs.items():
            assert KEYS.released(ours).removeprefix("model.") == theirs.removeprefix("model.")


@pytest.mark.parametrize("size", AR)
def test_settings_agree_with_the_shapes(size: str) -> None:
    stated = manifest(f"Cosmos-Predict1-{size}")
    checkpoint = fake(stated["tensors"], "model.pt")
    assert read_config(checkpoint, settings_of(AR_PRESETS[size])) == AR_PRESETS[size]


def test_bookkeeping_is_skipped_and_strangers_are_not() -> None:
    stated = manifest("Cosmos-Predict1-4B")
    for pattern in stated["ignored"]:
        name = "model." + pattern.replace("*", "layers.0.attention.")
        tensors = stated["tensors"] | {name: ["float32", [4]]}
        checkpoint = fake(tensors, "model.pt")
        fits(transformer(checkpoint), checkpoint, KEYS)
    tensors = stated["tensors"] | {"model.layers.0.attention.wz.weight": ["bfloat16", [4, 4]]}
    checkpoint = fake(tensors, "model.pt")
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wz\.weight"):
        fits(transformer(checkpoint), checkpoint, KEYS)


def test_a_missing_tensor_and_a_wrong_shape_are_named() -> None:
    stated = manifest("Cosmos-Predict1-4B")
    name = "model.layers.7.feed_forward.w3.weight"
    less = {n: info for n, info in stated["tensors"].items() if n != name}
    checkpoint = fake(less, "model.pt")
    with pytest.raises(CheckpointError, match=r"layers\.7\.feed_forward"):
        fits(transformer(checkpoint), checkpoint, KEYS)
    checkpoint = fake(stated["tensors"] | {name: ["bfloat16", [14336, 4095]]}, "model.pt")
    with pytest.raises(CheckpointError, match=r"layers\.7\.feed_forward\.w3.*4095"):
        fits(transformer(checkpoint), checkpoint, KEYS)


def test_shards_have_the_stated_cut() -> None:
    whole, shard = manifest("Cosmos-Predict1-4B"), manifest("Cosmos-Predict1-4B.tp4")
    for name, (_, shape) in shard["tensors"].items():
        dim = next(d for pattern, d in SHARDED_AXES.items() if fnmatchcase(name, pattern))
        joined = list(shape)
        if dim is not None:
            joined[dim] *= shard["shards"]
        assert joined == whole["tensors"][name][1], name


def diffusion_keys(layout: str) -> KeyMap:
    return dit_weights.DIFFUSERS_KEYS if layout else dit_weights.KEYS


def dit(checkpoint: Checkpoint, keys: KeyMap, settings: dict[str, Any] | None = None) -> DiT:
    with torch.device("meta"):
        return DiT(dit_weights.read_config(checkpoint, keys, settings or {}))


DECODER = "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"


@pytest.mark.parametrize("bare", [False, True])
def test_diffusion_decoder_fits_both_ways(bare: bool) -> None:
    stated = manifest(DECODER)
    tensors = {n: info for n, info in stated["tensors"].items() if not bare or n[:3] == "net"}
    checkpoint = fake(tensors, "model.pt")
    model = dit(checkpoint, dit_weights.KEYS)
    assert model.config == DIT_PRESETS["7B-Decoder"]
    pairs = fits(model, checkpoint, dit_weights.KEYS)
    assert set(tensors) - set(pairs.values()) <= set(stated["optional"])
    assert sum(p.numel() for p in model.parameters()) == stated["parameters"]
    # with learned positions the picture would be coloured noise: there must be no place for them
    table = {"net.extra_pos_embedder.pos_emb_h": ["bfloat16", [120, 4096]]}
    checkpoint = fake(tensors | table, "model.pt")
    with pytest.raises(CheckpointError, match="extra_pos_embedder"):
        fits(dit(checkpoint, dit_weights.KEYS), checkpoint, dit_weights.KEYS)


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("layout", ["", ".diffusers"])
@pytest.mark.parametrize("bare", [False, True])
def test_diffusion_files_fit_both_ways(name: str, layout: str, bare: bool) -> None:
    stated = manifest(f"Cosmos-Predict1-{name}{layout}")
    keys = diffusion_keys(layout)
    tensors = stated["tensors"]
    if bare:  # community repacks leave the prefix out, and what is optional
        tensors = {
            n.removeprefix(stated["prefix"]): info
            for n, info in tensors.items()
            if n not in stated["optional"]
        }
    checkpoint = fake(tensors, "model.pt")
    model = dit(checkpoint, keys, stated.get("config"))
    assert model.config == DIT_PRESETS[name]
    pairs = fits(model, checkpoint, keys)
    left = set(tensors) - set(pairs.values())
    assert left <= set(stated["optional"])
    assert sum(p.numel() for p in model.parameters()) == stated["parameters"]
    for ours, theirs in pairs.items():
        assert keys.released(ours, "" if bare else None) == theirs


@pytest.mark.parametrize("name", DIFFUSION)
def test_both_diffusion_layouts_end_at_the_same_tensor(name: str) -> None:
    for theirs, nvidia in manifest(f"Cosmos-Predict1-{name}.diffusers")["key_map"].items():
        assert dit_weights.DIFFUSERS_KEYS.ours(theirs) == dit_weights.KEYS.ours(nvidia)


def test_a_diffusers_config_equals_the_released_one() -> None:
    for name in DIFFUSION:
        stated = manifest(f"Cosmos-Predict1-{name}.diffusers")["config"]
        for key, value in diffusers_config(DIT_PRESETS[name]).items():
            if not key.startswith("_"):
                assert stated[key] == value, key


@pytest.mark.parametrize("layout", ["", ".diffusers"])
def test_diffusion_files_that_do_not_fit(layout: str) -> None:
    stated = manifest(f"Cosmos-Predict1-7B-Video2World{layout}")
    keys, tensors = diffusion_keys(layout), stated["tensors"]
    for pattern in stated["ignored"]:
        stray = "net.blocks.block0.blocks.0.block.attn.to_q.0" + pattern.removeprefix("*")
        checkpoint = fake(tensors | {stray: ["float32", [4]]}, "model.pt")
        fits(dit(checkpoint, keys, stated.get("config")), checkpoint, keys)
    for name, change in {
        keys.released("blocks.3.feed_forward.body.up.weight"): None,
        keys.released("blocks.2.attention.body.v.weight"): [4096, 4095],
        "net.lora_A.weight": [8, 8],
    }.items():
        changed = {n: info for n, info in tensors.items() if n != name}
        if change is not None:
            changed[name] = ["bfloat16", change]
        checkpoint = fake(changed, "model.pt")
        with pytest.raises(CheckpointError) as raised:
            fits(dit(checkpoint, keys, stated.get("config")), checkpoint, keys)
        assert name in str(raised.value)


def tokenizer_files(folder: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, json.loads(path.read_text()))
        for path in sorted(FOLDER.glob(f"{folder}.*.json"))
    ]


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_tokenizer_files_fit_both_ways(folder: str) -> None:
    preset = TOKENIZER_PRESETS[TOKENIZERS[folder]]
    with torch.device("meta"):
        model = CosmosTokenizer(preset)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files = tokenizer_files(folder)
    assert files
    for name, stated in files:
        values = {}
        for key in ("quantizer._levels", "inv_quant.quantizer._levels"):
            if key in stated["tensors"]:
                values[key.replace(".", "_")] = torch.tensor(preset.levels, dtype=torch.int32)
        tap = torch.tensor([preset.tap, preset.tap])
        for key in ("encoder.patcher3d.wavelets", "decoder.unpatcher3d.wavelets"):
            values[key.replace(".", "_")] = tap
        checkpoint = network_view(fake(stated["tensors"], f"{folder}/{name}", **values))
        decodes = ".decoder." in name
        config = preset if decodes else read_tokenizer_config(checkpoint, name=folder)
        half = [h for h in ("encoder", "decoder") if f".{h}." in name]
        wanted = {
            ours: shape
            for ours, shape in parameters.items()
            if not half or ours.startswith((f"{half[0]}.", *_convolution_of(half[0])))
        }
        pairs = match(checkpoint.tensors, wanted, key_map(config), name)
        optional = [*stated["optional"], *stated["ignored"]]
        left = set(checkpoint.tensors) - set(pairs.values())
        assert all(any(fnmatchcase(n, p) for p in optional) for n in left), left
        assert sum(torch.Size(shape).numel() for shape in wanted.values()) == stated["parameters"]
        assert replace(config, tap=preset.tap) == preset


def _convolution_of(half: str) -> tuple[str, ...]:
    return ("quant_conv.",) if half == "encoder" else ("post_quant_conv.",)


def test_unused_convolutions_of_old_files_are_skipped() -> None:
    """The 0.1 release holds all three convolutions of every resampler."""
    stated = manifest("Cosmos-Tokenize1-CV8x8x8-720p.autoencoder")
    extra = {
        f"{half}.{level}.{number}.{kind}.conv{c}.conv3d.{leaf}": ["bfloat16", [512]]
        for half, level, kind, numbers in (
            ("encoder", "down", "downsample", (0, 1)),
            ("decoder", "up", "upsample", (1, 2)),
        )
        for number in numbers
        for c in (1, 2, 3)
        for leaf in ("weight", "bias")
    }
    tensors = extra | stated["tensors"]
    tap = torch.full((2,), 0.70703125)
    checkpoint = fake(
        tensors, "x", encoder_patcher3d_wavelets=tap, decoder_unpatcher3d_wavelets=tap
    )
    config = read_tokenizer_config(checkpoint, name="Cosmos-0.1-Tokenizer-CV8x8x8")
    assert (config.temporal, config.spatial) == (8, 8)
    with torch.device("meta"):
        model = CosmosTokenizer(config)
    fits(model, checkpoint, key_map(config))
