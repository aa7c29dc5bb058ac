"""Invariants of the flow transformer that hold for any weights, and its files."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.export import dit_settings, dit_tensors, draw_weights
from worldline.errors import CheckpointError
from worldline.families.predict2_5.model import (
    FlowDiT,
    FlowDiTConfig,
    released_exponents,
)
from worldline.families.predict2_5.weights import open_network
from worldline.nn import dit
from worldline.nn.modulation import NORM_EPS
from worldline.nn.rope import axis_sizes, rotary_exponents
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import save
from worldline.weights.stream import load_into

from ..diffusers_layout import diffusers_config, diffusers_tensors

CONFIG = FlowDiTConfig(
    depth=2,
    width=84,
    num_heads=3,
    head_size=28,  # its exponents are changed by rounding
    hidden=160,
    context_width=20,
    lora_rank=8,
    feature_width=56,
)
GRID = LatentShape(3, 6, 8)
RELEASED_NAME = "81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.pt"


def build(config: FlowDiTConfig = CONFIG, dtype: torch.dtype = torch.float64) -> FlowDiT:
    torch.manual_seed(0)
    model = FlowDiT(config)
    draw_weights(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).requires_grad_(False).eval()


def inputs(dtype: torch.dtype = torch.float64, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = torch.zeros(batch, 1, GRID.frames, GRID.height, GRID.width, dtype=dtype)
    mask[:, :, 0] = 1
    times = torch.tensor([[0.1, 700, 700], [0.1, 300, 400]], dtype=dtype)
    return {
        "latents": draw(batch, 16, GRID.frames, GRID.height, GRID.width),
        "timesteps": times[:batch],
        "text": draw(batch, 5, CONFIG.feature_width),
        "condition_mask": mask,
    }


def unrounded(model: FlowDiT) -> FlowDiT:
    """The same with exact rotary exponents, as diffusers computes."""
    time, space, _ = (
        rotary_exponents(size).tolist() for size in axis_sizes(model.config.head_size)
    )
    model = copy.copy(model)
    model.config = replace(model.config, exponents=(tuple(time), tuple(space)))
    return model


def run(model: FlowDiT, given: dict[str, Tensor], **more: Any) -> Tensor:
    return model(
        given["latents"],
        given["timesteps"],
        model.encode_context(given["text"]),
        model.make_positions(LatentShape(*given["latents"].shape[2:])),
        condition_mask=given["condition_mask"],
        **more,
    )


def test_a_batch_gives_what_each_gives_alone() -> None:
    model, given = build(), inputs()
    both = run(model, given)
    for row in range(2):
        alone = run(model, {name: tensor[row : row + 1] for name, tensor in given.items()})
        assert torch.allclose(both[row : row + 1], alone)


def test_everything_given_is_heard() -> None:
    model, given = build(), inputs()
    plain = run(model, given)
    for name in given:
        changed = dict(given)
        changed[name] = given[name] + 0.5
        assert not torch.allclose(run(model, changed), plain), name
    assert not torch.allclose(run(unrounded(model), given), plain)
    assert not torch.allclose(run(model, given, padding_mask=torch.ones(2, 1, 48, 64)), plain)


def test_a_padding_mask_of_zeros_is_no_padding_mask() -> None:
    model, given = build(), inputs()
    assert torch.equal(run(model, given), run(model, given, padding_mask=torch.zeros(2, 1, 7, 9)))


def test_all_rows_of_the_text_take_part() -> None:
    model, given = build(), inputs()
    longer = given | {"text": F.pad(given["text"], (0, 0, 0, 3))}
    assert not torch.allclose(run(model, longer), run(model, given))


def test_equal_timesteps_of_all_frames_are_one_timestep() -> None:
    model, given = build(), inputs()
    one = torch.tensor([[700.0], [30.0]], dtype=torch.float64)
    shared = run(model, given | {"timesteps": one})
    assert torch.allclose(run(model, given | {"timesteps": one.expand(2, GRID.frames)}), shared)
    whole = run(model, given | {"timesteps": one.long()})  # as schedules have them
    assert torch.allclose(whole, shared)


def test_feed_forward_in_parts_changes_nothing() -> None:
    model, given = build(), inputs()
    whole = run(model, given)
    with mock.patch.object(dit, "HIDDEN_BYTES", 8 * CONFIG.hidden * 7), torch.no_grad():
        assert torch.allclose(run(model, given), whole)


def test_noise_levels_and_the_last_layers_are_float32() -> None:
    """All that is close to the sum of the model's errors; the stream itself is bf16."""
    model, given = build(dtype=torch.float32), inputs(torch.float32)
    exact = run(model, given)
    small = build(dtype=torch.bfloat16)
    y = run(small, given)
    assert y.dtype == torch.float32
    assert not torch.equal(y, y.bfloat16().float())
    assert (y - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()
    # levels that bf16 cannot tell apart
    near = given | {"timesteps": given["timesteps"] + 1}
    assert near["timesteps"][0, 1].bfloat16() == given["timesteps"][0, 1].bfloat16()
    assert not torch.equal(run(small, near), y)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (LatentShape(3, 5, 8), "multiples of"),
        (LatentShape(7, 6, 8), "positions"),
        (LatentShape(3, 12, 8), "6 x 10 x 14"),
    ],
)
def test_grids_that_the_model_has_no_positions_for(grid: LatentShape, message: str) -> None:
    small = replace(CONFIG, max_grid=LatentShape(6, 5, 7))
    with pytest.raises(ValueError, match=message):
        build(small).make_positions(grid)


def test_released_exponents_are_rounded() -> None:
    time, space = released_exponents(128)
    assert (len(time), len(space)) == (22, 21)
    assert torch.equal(torch.tensor(space), torch.tensor(space).bfloat16().float())
    exact = torch.arange(21) * 2 / 42
    assert 0 < (torch.tensor(space) - exact).abs().max() <= 2**-9
    with torch.device("meta"):
        assert released_exponents(128) == (time, space)


def test_gradients_reach_every_weight() -> None:
    model = build(dtype=torch.float32).requires_grad_(True)
    run(model, inputs(torch.float32)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fresh_weights_give_zero() -> None:
    model = FlowDiT(CONFIG)
    draw_weights(model)
    with torch.no_grad():
        assert not run(model, inputs(torch.float32)).any()


def read_back(model: FlowDiT, path: Path, **settings: Any) -> None:
    found = open_network(path, settings)
    assert found.config == model.config
    with torch.device("meta"):
        again = FlowDiT(found.config)
    load_into(again, found.source, found.keys, device="cpu", dtype=None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


@pytest.mark.parametrize("name", [RELEASED_NAME, "model_ema_bf16.pt", "model.safetensors"])
def test_a_folder_reads_back(name: str, tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    save(dit_tensors(model), tmp_path / name)
    read_back(model, tmp_path)
    read_back(model, tmp_path / name)


def test_what_differs_from_the_released_models_reads_back(tmp_path: Path) -> None:
    time, space = released_exponents(CONFIG.head_size)
    other = replace(
        CONFIG,
        rope_ratio=(2.0, 1.0, 1.5),
        timestep_scale=0.01,
        exponents=(time, (*space[:-1], 0.875)),
    )
    model = build(other, torch.float32)
    save(dit_tensors(model), tmp_path / "model.pt")
    read_back(model, tmp_path, **dit_settings(other))
    for bad in ({"rope_ratio": [1, 2]}, {"timestep_scale": 0}, {"timestep_scale": "1"}):
        with pytest.raises(CheckpointError, match=next(iter(bad))):
            open_network(tmp_path, bad)


def test_bookkeeping_is_left_aside(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    tensors: dict[str, object] = {
        name: tensor.clone() for name, tensor in dit_tensors(model).items()
    }
    tensors["net.t_embedding_norm._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    tensors["net.blocks.0.self_attn.q_norm._extra_state"] = io.BytesIO(b"state")
    tensors["net.accum_iteration"] = torch.tensor(7)
    tensors["net.pos_embedder.seq"] = torch.arange(128.0)
    torch.save(tensors, tmp_path / RELEASED_NAME)
    read_back(model, tmp_path)


def test_averages_of_training_are_preferred(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    averaged = dit_tensors(model)
    last = {name: tensor + 1 for name, tensor in averaged.items()}
    wrapped = {
        name.replace("net.", "net_ema.").replace(
            "blocks.0.", "blocks.0._checkpoint_wrapped_module."
        ): tensor
        for name, tensor in averaged.items()
    }
    save({**last, **wrapped}, tmp_path / "model.pt")
    read_back(model, tmp_path)
    assert any("averaged" in note for note in open_network(tmp_path, {}).notes)


def test_a_file_of_another_model_is_named_as_such(tmp_path: Path) -> None:
    save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a Cosmos diffusion transformer"):
        open_network(tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.pt"):
        open_network(tmp_path)
    for name in ("a_ema_bf16.pt", "b_ema_bf16.pt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"several.*a_ema_bf16\.pt, b_ema_bf16\.pt"):
        open_network(tmp_path)


def test_input_channels_of_another_kind_are_refused(tmp_path: Path) -> None:
    tensors = dit_tensors(build(dtype=torch.float32))
    name = "net.x_embedder.proj.1.weight"
    tensors[name] = F.pad(tensors[name], (0, 64))
    save(tensors, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"x_embedder.*136.*72"):
        open_network(tmp_path)


def test_a_diffusers_folder_reads_back(tmp_path: Path) -> None:
    model, folder = build(dtype=torch.float32), tmp_path / "transformer"
    folder.mkdir()
    save(diffusers_tensors(model), folder / "diffusion_pytorch_model.safetensors")
    config = diffusers_config(CONFIG)
    (folder / "config.json").write_text(json.dumps(config))
    read_back(model, tmp_path)
    read_back(model, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="rope_scale"):
        open_network(tmp_path)


def test_diffusers_runs_our_export_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.transformers import transformer_cosmos

    # it resizes the padding mask by torchvision, which has no CPU build everywhere
    resize = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    modes = SimpleNamespace(NEAREST="nearest")
    stand_in = SimpleNamespace(functional=resize, InterpolationMode=modes)
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    model, given = build(dtype=torch.float32), inputs(torch.float32, batch=1)
    theirs = diffusers.CosmosTransformer3DModel.from_config(diffusers_config(CONFIG)).eval()
    theirs.load_state_dict(diffusers_tensors(model))  # strict
    for name, module in theirs.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            assert module.eps == 1e-5
            module.eps = NORM_EPS  # as in the released pipeline
    padding = torch.zeros(1, 1, 48, 64)
    padding[:, :, 30:] = 1
    for times in (given["timesteps"], torch.full((1, GRID.frames), 812.0)):
        with torch.no_grad():
            y = theirs(
                hidden_states=given["latents"],
                timestep=times[:, None, :, None, None] * CONFIG.timestep_scale,
                encoder_hidden_states=given["text"],
                condition_mask=given["condition_mask"],
                padding_mask=padding,
                return_dict=False,
            )[0]
        ours = run(unrounded(model), given | {"timesteps": times}, padding_mask=padding)
        assert torch.allclose(ours, y, atol=2e-5, rtol=0)
