"""The diffusion transformer against the reference: every tensor of every case, both layouts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases, watched
from torch import Tensor

from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import DIFFUSERS_KEYS, open_network
from worldline.nn.modulation import norm_heads, sinusoid
from worldline.nn.rope import stretched_angles_3d
from worldline.shapes import LatentShape
from worldline.weights.stream import load_into

CASES = cases("dit_t2w_tiny") + cases("dit_v2w_tiny") + cases("dit_14b_like_tiny")
DIFFUSERS = cases("dit_diffusers_layout")
SUB_BLOCKS = {"attention": "fa", "cross_attention": "ca", "feed_forward": "mlp"}


def settings_of(model: dict[str, Any]) -> dict[str, Any]:
    ratio = [model[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"]
    return {"rope_ratio": ratio, "base_fps": model["base_fps"]}


@cache
def loaded(case: Case, dtype: torch.dtype = torch.float32) -> DiT:
    found = open_network(case.path / checkpoint_of(case), settings_of(case.spec["model"]))
    with torch.device("meta"):
        model = DiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=dtype)
    return model.requires_grad_(False).eval()


def checkpoint_of(case: Case) -> Path:
    """The folder with the weights; its name is the case's own."""
    [file] = [
        path
        for pattern in ("*/model.*", "*/transformer/*.safetensors")
        for path in case.path.glob(pattern)
    ]
    return file.parent.relative_to(case.path)


def run(case: Case, call: str, model: DiT, dtype: torch.dtype) -> Tensor:
    """One forward in `dtype`, angles included."""

    def get(name: str) -> Tensor:
        return case.tensor(f"{call}.{name}").to(dtype)

    x = get("x")
    fps = {float(value) for value in case.tensor(f"{call}.fps")}
    assert len(fps) == 1, "one frame rate a call"
    grid = LatentShape(*x.shape[2:])
    masked = f"{call}.condition_video_input_mask" in case
    return model(
        x,
        get("timesteps"),
        model.encode_context(get("crossattn_emb")),
        model.make_positions(grid, fps.pop(), rotary_dtype=dtype),
        condition_mask=get("condition_video_input_mask") if masked else None,
        padding_mask=get("padding_mask").expand(len(x), -1, -1, -1),
    )


def calls(case: Case) -> list[str]:
    return sorted({name.split(".")[0] for name in case.names("*.x")})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_is_read_from_the_file(case: Case) -> None:
    config, stated = loaded(case).config, case.spec["model"]
    assert config.depth == stated["num_blocks"]
    assert config.width == stated["model_channels"]
    assert config.num_heads == stated["num_heads"]
    assert config.hidden == stated["model_channels"] * stated["mlp_ratio"]
    assert config.context_width == stated["crossattn_emb_channels"]
    assert config.lora_rank == stated["adaln_lora_dim"]
    assert config.condition_mask == stated["condition_mask_channel"]
    grid = config.max_grid
    assert (grid.frames, grid.height, grid.width) == (
        stated["max_frames"],
        stated["max_img_h"] // stated["patch_spatial"],
        stated["max_img_w"] // stated["patch_spatial"],
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_everything_inside(case: Case) -> None:
    model = loaded(case)
    for call in calls(case):
        seen = watched(model, lambda c=call: run(case, c, model, torch.float32))
        case.compare(f"{call}.y", seen[""])
        for name in ("sigma", "crossattn_mask"):  # how inputs were made; what nobody reads
            case.tensor(f"{call}.{name}")
        if f"{call}.patch_embed" not in case:
            continue
        grid = model.config.tokens(LatentShape(*seen[""].shape[2:]))
        shape = (len(seen[""]), grid.frames, grid.height, grid.width, model.config.width)
        case.compare(f"{call}.patch_embed", seen["embed"].view(shape))
        timesteps = case.tensor(f"{call}.timesteps")
        waves = sinusoid(timesteps, model.config.width)
        case.compare(f"{call}.timestep_sinusoid", waves)
        normed = norm_heads(waves[:, None, None], model.noise.norm)[:, 0, 0]
        case.compare(f"{call}.affline_emb", normed)
        case.compare(f"{call}.adaln_lora_B_3D", seen["noise"].shared)
        for ours, theirs in SUB_BLOCKS.items():
            residual = seen[f"blocks.0.{ours}"]
            case.compare(f"{call}.block0_after_{theirs}", residual.total().view(shape))
        last = seen[f"blocks.{model.config.depth - 1}"]
        case.compare(f"{call}.last_block", last.total().view(shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_positions(case: Case) -> None:
    for name in case.names("*.rope_emb_*"):
        call, what = name.split(".")
        bf16 = what.endswith("bf16_pipeline")
        model = loaded(case, torch.bfloat16 if bf16 else torch.float32)
        latents = LatentShape(*case.tensor(f"{call}.x").shape[2:])
        grid, config = model.config.tokens(latents), model.config
        fps = float(case.tensor(f"{call}.fps")[0])
        angles = stretched_angles_3d(
            grid,
            config.head_size,
            ratio=config.rope_ratio,
            time_scale=(fps, config.base_fps),
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        case.compare(name, angles.view(grid.tokens, 1, 1, -1))
        learned = f"{call}.extra_pos_emb{'_bf16_pipeline' if bf16 else ''}"
        shape = (1, grid.frames, grid.height, grid.width, config.width)
        case.compare(learned, model.positions(grid).float().view(shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_as_in_the_released_pipelines(case: Case) -> None:
    model = loaded(case, torch.bfloat16)
    for name in case.names("*.y_bf16_pipeline"):
        call = name.split(".")[0]
        y = run(case, call, model, torch.bfloat16)
        case.compare(name, y.float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_diffusers_folder(case: Case) -> None:
    """The folder alone tells everything: the stated numbers are compared, not used."""
    [folder] = [path.parent.parent for path in case.path.glob("*/transformer/config.json")]
    found = open_network(folder)
    assert list(found.config.rope_ratio) == settings_of(case.spec["model"])["rope_ratio"]
    assert found.keys is DIFFUSERS_KEYS
    with torch.device("meta"):
        model = DiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    model.requires_grad_(False).eval()
    for call in calls(case):
        y = run(case, call, model, torch.float32)
        for output in case.names(f"{call}.y_*"):
            case.compare(output, y)
        case.tensor(f"{call}.sigma")
    assert case.unused() == []
