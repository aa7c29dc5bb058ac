"""The Wan2.1 tokenizer against the golden cases of kind wan_vae_tiny, and in diffusers' layout."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import Case, cases

from tiny.export import stored_tensors
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.tokenizers.layouts import wan_settings
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.tokenizers.wan.weights import key_map, open_wan
from worldline.weights.checkpoint import save

CASES = cases("wan_vae_tiny")
DIFFUSERS = cases("dit25_diffusers_layout")


@cache
def loaded(case: Case, dtype: torch.dtype = torch.float32) -> WanTokenizer:
    path = case.path / case.spec["checkpoint"] if "checkpoint" in case.spec else case.path
    return open_wan(path).read("cpu", dtype)


@pytest.mark.parametrize("case", CASES + DIFFUSERS, ids=str)
def test_configuration_is_read_from_the_files(case: Case) -> None:
    config, stated = loaded(case).config, case.spec["vae"]
    ours = {
        "dim": config.channels,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.num_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_steps),
    }
    common = ours.keys() & stated.keys()
    assert common
    assert {name: ours[name] for name in common} == {name: stated[name] for name in common}
    for name in ("mean", "std"):
        if name in case.spec:
            assert getattr(config, name) == tuple(case.spec[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clips(case: Case) -> None:
    model = loaded(case)
    for name in case.names("encode.*.video"):
        case.compare(name.replace("video", "latent"), model.encode(case.tensor(name)))
    for name in case.names("decode.*.latent"):
        case.compare(name.replace("latent", "video"), model.decode(case.tensor(name)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_clips_in_pieces(case: Case, chunk: int) -> None:
    model = copy.copy(loaded(case))
    model.chunk = chunk
    for name in case.names("encode.*.video"):
        pieces = encode_stream(model, case.tensor(name).split(3, dim=2))
        case.compare(name.replace("video", "latent"), torch.cat(list(pieces), dim=2))
    for name in case.names("decode.*.latent"):
        pieces = decode_stream(model, case.tensor(name))
        case.compare(name.replace("latent", "video"), torch.cat(list(pieces), dim=2))


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_weights_that_diffusers_saved(case: Case) -> None:
    model = loaded(case)
    for name in case.names("vae*.in.video"):
        latents = model.encode(case.tensor(name))
        case.compare(name.replace(".in.video", ".out.latent"), latents)
    for name in case.names("vae*.in.latent"):
        video = model.decode(case.tensor(name))
        case.compare(name.replace(".in.latent", ".out.video"), video)
    layouts = key_map(model.config), key_map(model.config, True)
    for theirs, ours in case.spec.get("vae_key_map", {}).items():
        assert layouts[0].ours(theirs) == layouts[1].ours(ours)


@pytest.mark.parametrize("case", CASES + DIFFUSERS, ids=str)
def test_diffusers_computes_the_same_from_what_we_export(case: Case, tmp_path: Path) -> None:
    """In float64: networks this narrow make 1e-4 of how float32 is rounded."""
    diffusers = pytest.importorskip("diffusers")
    model = loaded(case, torch.float64)
    tensors, settings = (
        stored_tensors(model, key_map(model.config, True)),
        wan_settings(model.config),
    )
    save(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))

    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert sorted(theirs.state_dict()) == sorted(tensors)
    assert {name: theirs.config[name] for name in settings if name[0] != "_"} == {
        name: value for name, value in settings.items() if name[0] != "_"
    }
    mean, std = (
        torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for numbers in (model.config.mean, model.config.std)
    )
    for name in case.names("*.video"):
        if ".out." in name or name.startswith("decode"):
            continue
        video = case.tensor(name).double()
        mode = theirs.encode(video).latent_dist.mode()
        latents = model.encode(video)
        assert torch.allclose(latents, (mode - mean) / std, atol=1e-10, rtol=0)
        decoded = theirs.decode(latents * std + mean).sample  # clamped; enlarged in float32
        assert torch.allclose(model.decode(latents).clamp(-1, 1), decoded, atol=2e-5, rtol=0)
    assert open_wan(tmp_path).config == model.config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_released_file_is_written_as_it_was_read(case: Case, tmp_path: Path) -> None:
    torch.save(
        stored_tensors(loaded(case), key_map(loaded(case).config)),
        tmp_path / "tokenizer.pth",
    )
    source, stored = open_wan(tmp_path).source, open_wan(case.path / case.spec["checkpoint"]).source
    assert source.tensors.keys() == stored.tensors.keys()
    for name in stored.tensors:
        assert torch.equal(source.read(name), stored.read(name).float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_every_tensor_of_the_tokenizer_is_used(case: Case) -> None:
    assert [name for name in case.unused() if name.startswith("vae.")] == []
