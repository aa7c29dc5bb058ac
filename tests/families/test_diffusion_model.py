"""Invariants of the diffusion transformer that hold for any weights, and its files."""

from __future__ import annotations

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
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.diffusion.weights import open_network
from worldline.nn import dit
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import save
from worldline.weights.networks import DIFFUSERS_FILES
from worldline.weights.stream import load_into

from ..diffusers_layout import diffusers_config, diffusers_tensors

CONFIG = DiTConfig(
    depth=2,
    width=72,
    num_heads=3,
    head_size=24,
    hidden=160,
    context_width=20,
    lora_rank=8,
    condition_mask=True,
    max_grid=LatentShape(6, 5, 7),
    rope_ratio=(2.0, 1.0, 1.5),
)
GRID = LatentShape(3, 6, 8)


def build(config: DiTConfig = CONFIG, dtype: torch.dtype = torch.float64) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
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
    return {
        "latents": draw(batch, 16, GRID.frames, GRID.height, GRID.width),
        "timesteps": draw(batch),
        "text": draw(batch, 5, CONFIG.context_width),
        "condition_mask": mask,
    }


def run(model: DiT, given: dict[str, Tensor], fps: float = 24.0, **more: Any) -> Tensor:
    mask = given["condition_mask"] if model.config.condition_mask else None
    return model(
        given["latents"],
        given["timesteps"],
        model.encode_context(given["text"]),
        model.make_positions(GRID, fps),
        condition_mask=mask,
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
    assert not torch.allclose(run(model, given, fps=30.0), plain)
    assert not torch.allclose(run(model, given, padding_mask=torch.ones(2, 1, 48, 64)), plain)


def test_a_padding_mask_of_zeros_is_no_padding_mask() -> None:
    model, given = build(), inputs()
    assert torch.equal(run(model, given), run(model, given, padding_mask=torch.zeros(2, 1, 7, 9)))


def test_zero_rows_of_the_text_take_part() -> None:
    model, given = build(), inputs()
    longer = given | {"text": torch.nn.functional.pad(given["text"], (0, 0, 0, 3))}
    assert not torch.allclose(run(model, longer), run(model, given))


def test_feed_forward_in_parts_changes_nothing() -> None:
    model, given = build(), inputs()
    whole = run(model, given)
    with mock.patch.object(dit, "HIDDEN_BYTES", 8 * CONFIG.hidden * 7), torch.no_grad():
        assert torch.allclose(run(model, given), whole)


def test_a_text2world_model_is_a_video2world_model_whose_mask_is_zero() -> None:
    """The mask's columns of the embedding then see zeros alone."""
    model, given = build(), inputs()
    given["condition_mask"] = torch.zeros_like(given["condition_mask"])
    cells = dit.PATCH_CELLS
    bare = build(replace(CONFIG, condition_mask=False))
    state = model.state_dict()
    state["embed.weight"] = torch.cat(
        [state["embed.weight"][:, : 16 * cells], state["embed.weight"][:, 17 * cells :]], dim=1
    )
    bare.load_state_dict(state)
    assert torch.allclose(run(bare, given), run(model, given))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (LatentShape(3, 5, 8), "multiples of"),
        (LatentShape(7, 6, 8), "positions"),
        (LatentShape(3, 12, 8), "6 x 10 x 14"),
    ],
)
def test_grids_that_the_model_has_no_positions_for(grid: LatentShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().make_positions(grid, 24)


def test_gradients_reach_every_weight() -> None:
    model = build(dtype=torch.float32).requires_grad_(True)
    given = inputs(torch.float32)
    run(model, given).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fresh_weights_give_zero() -> None:
    model = DiT(CONFIG)
    draw_weights(model)
    with torch.no_grad():
        assert not run(model, inputs(torch.float32)).any()


def saved(folder: Path, model: DiT, name: str = "model.pt", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save(dit_tensors(model), folder / name)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_folder_reads_back(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    settings = dit_settings(CONFIG)
    found = open_network(saved(tmp_path, model), settings)
    assert found.config == CONFIG
    with torch.device("meta"):
        again = DiT(found.config)
    load_into(again, found.source, found.keys, device="cpu", dtype=None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_a_nested_file_gives_its_model_not_its_average(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in dit_tensors(model).items()}
    average = {name.replace(".", "-"): tensor + 1 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": average}, tmp_path / "model.pt")
    found = open_network(tmp_path, dit_settings(CONFIG))
    name = "net.x_embedder.proj.1.weight"
    assert torch.equal(found.source.read(name), tensors[name])


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    tensors = dit_tensors(build(dtype=torch.float32))
    adapter = "net.blocks.block0.blocks.0.block.attn.to_q.0.lora_A.weight"
    save({**tensors, adapter: torch.zeros(4, CONFIG.width)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"lack their other half: .*to_q\.0\.lora_A"):
        open_network(tmp_path, dit_settings(CONFIG))


def test_an_unknown_width_needs_its_rotary_stretching(tmp_path: Path) -> None:
    folder = saved(tmp_path, build(dtype=torch.float32))
    with pytest.raises(CheckpointError, match=r'rotary stretching.*"rope_ratio"'):
        open_network(folder, {})
    for bad in ([1, 2], [1, 2, 0], "2,1,1", None):
        with pytest.raises(CheckpointError, match=r"rope_ratio|rotary"):
            open_network(folder, {"rope_ratio": bad})


def test_a_file_of_another_model_is_named_as_such(tmp_path: Path) -> None:
    save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a Cosmos diffusion transformer"):
        open_network(tmp_path, {})
    (tmp_path / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.pt"):
        open_network(tmp_path, {})


def test_a_diffusers_folder_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = diffusers_tensors(build(dtype=torch.float32))
    save(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    assert open_network(tmp_path).config == open_network(folder).config == CONFIG
    half = dict(list(tensors.items())[::2])
    save(half, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=DIFFUSERS_FILES[1]):
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
    with torch.no_grad():
        y = theirs(
            hidden_states=given["latents"],
            timestep=given["timesteps"],
            encoder_hidden_states=given["text"],
            fps=30,
            condition_mask=given["condition_mask"],
            padding_mask=torch.zeros(1, 1, 48, 64),
            return_dict=False,
        )[0]
        assert torch.allclose(run(model, given, fps=30.0), y, atol=2e-5)
