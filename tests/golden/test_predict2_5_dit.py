"""The flow transformer against the reference: every tensor of every case, both layouts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import Case, cases, watched
from flow_networks import load, model_of, settings_of
from torch import Tensor

from worldline.families.predict2_5.model import FlowDiT
from worldline.families.predict2_5.weights import DIFFUSERS_KEYS, KEYS, open_network
from worldline.nn import dit
from worldline.nn.dit import PATCH
from worldline.nn.modulation import NORM_EPS, sinusoid
from worldline.nn.rope import Rotation, axis_sizes, rotary_exponents, rotate
from worldline.shapes import LatentShape

CASES = cases("dit25_tiny") + cases("dit25_14b_like_tiny")
DIFFUSERS = cases("dit25_diffusers_layout")
SUB_BLOCKS = {"attention": "selfattn", "cross_attention": "crossattn", "feed_forward": "mlp"}


def run(case: Case, call: str, model: FlowDiT, **options: Any) -> Tensor:
    def get(name: str) -> Tensor:
        return case.tensor(f"{call}.in.{name}")

    x = get("x")
    return model(
        x,
        get("timesteps"),
        model.encode_context(get("crossattn_emb")),
        model.make_positions(LatentShape(*x.shape[2:]), **options),
        condition_mask=get("mask"),
        padding_mask=get("padding_mask"),
    )


def unrounded(model: FlowDiT) -> FlowDiT:
    """The same with exact rotary exponents, which no checkpoint was trained with."""
    time, space, _ = (
        rotary_exponents(size).tolist() for size in axis_sizes(model.config.head_size)
    )
    model = copy.copy(model)
    model.config = replace(model.config, exponents=(tuple(time), tuple(space)))
    return model


def calls(case: Case) -> list[str]:
    return sorted({name.split(".")[0] for name in case.names("*.in.x")})


def agrees_with_stated(model: FlowDiT, stated: dict[str, Any]) -> None:
    config = model.config
    time, rows, _ = PATCH
    ours = {
        "num_blocks": config.depth,
        "model_channels": config.width,
        "num_heads": config.num_heads,
        "crossattn_emb_channels": config.context_width,
        "crossattn_proj_in_channels": config.feature_width,
        "adaln_lora_dim": config.lora_rank,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "patch_temporal": time,
        "patch_spatial": rows,
    }
    common = ours.keys() & stated.keys()
    assert common
    assert {name: ours[name] for name in common} == {name: stated[name] for name in common}
    if "mlp_ratio" in stated:
        assert config.hidden == int(config.width * stated["mlp_ratio"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_is_read_from_the_file(case: Case) -> None:
    agrees_with_stated(model_of(case), case.spec["net"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_everything_inside(case: Case) -> None:
    model = model_of(case)
    for call in calls(case):
        seen = watched(model, lambda c=call: run(case, c, model))
        case.compare(f"{call}.out", seen[""])
        inside = case.names(f"{call}.mid.*")
        grid = model.config.tokens(LatentShape(*seen[""].shape[2:]))
        batch, width = len(seen[""]), model.config.width
        shape = (batch, grid.frames, grid.height, grid.width, width)

        times = case.tensor(f"{call}.in.timesteps") * model.config.timestep_scale
        normed = F.rms_norm(sinusoid(times, width), (width,), model.noise.norm, NORM_EPS)
        ours = {
            "x_embed": seen["embed"].view(shape),
            "crossattn_proj": seen["project"],
            "adaln_lora": seen["noise"].shared,
            "t_emb": normed,
        }
        for part, theirs in SUB_BLOCKS.items():
            body = seen[f"blocks.0.{part}.body"]
            ours[f"block0_{theirs}"] = body.view(shape) if theirs == "mlp" else body
        for index in range(model.config.depth):
            ours[f"block{index}"] = seen[f"blocks.{index}"].total().view(shape)
        for name, tensor in ours.items():
            if f"{call}.mid.{name}" in inside:
                case.compare(f"{call}.mid.{name}", tensor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_positions(case: Case) -> None:
    model = model_of(case)
    for name in case.names("*.mid.rope"):
        grid = LatentShape(*case.tensor(f"{name.split('.')[0]}.in.x").shape[2:])
        angles = case.tensor(name)
        rotation = model.make_positions(grid)
        bound = case.tolerance(name, angles.dtype)
        for ours, function in ((rotation.cos, torch.cos), (rotation.sin, torch.sin)):
            theirs = function(angles).view(ours.shape)
            torch.testing.assert_close(ours, theirs, rtol=bound["rtol"], atol=bound["atol"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []


def norm_heads_of_diffusers(x: Tensor, weight: Tensor, rotation: Rotation | None = None) -> Tensor:
    """Do what `norm_heads` does, with 1e-5 below the root in place of 1e-6."""
    y = F.rms_norm(x, weight.shape, weight, 1e-5).transpose(1, 2)
    return (y if rotation is None else rotate(y, rotation)).transpose(1, 2)


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_diffusers_folder(case: Case) -> None:
    """The folder alone tells everything: the stated numbers are compared, not used."""
    [config] = case.path.rglob("transformer/config.json")
    found = open_network(config.parent.parent)
    assert found.keys is DIFFUSERS_KEYS
    assert list(found.config.rope_ratio) == settings_of(case)["rope_ratio"]
    model = load(found)
    agrees_with_stated(model, case.spec["net"])
    for theirs, ours in case.spec.get("transformer_key_map", {}).items():
        assert KEYS.ours(theirs) == DIFFUSERS_KEYS.ours(ours)
    for call in calls(case):
        case.compare(f"{call}.out_reference", run(case, call, model))
        case.compare(f"{call}.out_diffusers", run(case, call, unrounded(model)))
        # that bound is for other arithmetic; with that of diffusers the reference's bound holds
        with mock.patch.object(dit, "norm_heads", norm_heads_of_diffusers):
            aligned = run(case, call, unrounded(model))
        theirs = case.tensor(f"{call}.out_diffusers")
        bound = case.tolerance(f"{call}.out_reference", theirs.dtype)
        torch.testing.assert_close(aligned, theirs, rtol=bound["rtol"], atol=bound["atol"])
    # the tokenizer of the same folder is tested beside the other tokenizers
    assert [name for name in case.unused() if not name.startswith("vae.")] == []
