"""Adapters beside frozen layers compute what the merged network does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL_TRANSFORMER
from worldline.families.autoregressive import weights as autoregressive
from worldline.families.autoregressive.model import ARTransformer, make_positions
from worldline.families.diffusion import weights as diffusion
from worldline.families.predict2_5 import weights as flow
from worldline.nn import dit
from worldline.train.lora import LowRankLinear, add_adapters, restore, save_peft
from worldline.weights import lora
from worldline.weights.checkpoint import save
from worldline.weights.keymap import LoRARecipe
from worldline.weights.networks import open_adapter, shapes_of

RANK, SCALE = 5, 0.5


def filled(model: ARTransformer) -> ARTransformer:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def attach(model: ARTransformer, seed: int = 3) -> dict[str, LowRankLinear]:
    recipe = replace(autoregressive.LORA, rank=RANK, scale=SCALE)
    return add_adapters(model, recipe, torch.Generator().manual_seed(seed))


def test_an_adapter_trained_saved_and_merged(tmp_path: Path) -> None:
    model = filled(ARTransformer(SMALL_TRANSFORMER))
    weights = {autoregressive.KEYS.released(n): p.detach() for n, p in model.named_parameters()}
    save(weights, tmp_path / "model.safetensors")
    network = autoregressive.open_network(tmp_path, {})
    tokens = torch.randint(0, SMALL_TRANSFORMER.vocabulary, (2, 7))
    positions = make_positions(network.config, "cpu", torch.float32)
    before = model(tokens, positions)
    layers = attach(model)
    assert torch.equal(model(tokens, positions), before)
    per_layer = 7  # of attention and SwiGLU
    assert len(layers) == per_layer * SMALL_TRANSFORMER.depth
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{n.removesuffix('weight')}{half}" for n in layers for half in ("up", "down")
    }

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):  # of the first, down has no gradient
        optimizer.zero_grad()
        model(tokens, positions).square().mean().backward()
        optimizer.step()
    after = model(tokens, positions)
    assert not torch.allclose(after, before)
    halves = {name: (layer.down.detach(), layer.up.detach()) for name, layer in layers.items()}
    save_peft(halves, SCALE, autoregressive.KEYS, tmp_path / "a")
    adapter = network.match_adapter(open_adapter(tmp_path / "a"))
    merged = network.adapted(adapter).read("cpu", torch.float32)
    torch.testing.assert_close(merged(tokens, positions), after, rtol=1e-5, atol=1e-5)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, merged.get_parameter(name))

    again = network.read("cpu", torch.float32)
    restore(attach(again, seed=4), adapter)
    assert torch.equal(again(tokens, positions), after)
    few = network.match_adapter(open_adapter(tmp_path / "a"), 2.0)
    with pytest.raises(ValueError, match=r"other matrices, .*\(layers\.0"):
        restore(dict(list(layers.items())[1:]), few)


def test_layers_that_are_multiplied_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long feed-forwards of inference read the matrix itself."""
    sizes = dit.DiTSizes(
        depth=1, width=8, num_heads=1, head_size=8, hidden=16, context_width=8, lora_rank=2,
        max_grid=dit.LARGEST_GRID, rope_ratio=(1, 1, 1),
    )  # fmt: skip
    layer = dit.FeedForward(sizes)
    recipe = LoRARecipe(targets=("*.weight",), rank=2, scale=1.5, start="normal")
    adapted = add_adapters(layer, recipe, torch.Generator().manual_seed(0))
    for one in adapted.values():
        torch.nn.init.normal_(one.up)
    x = torch.randn(3, 40, 8)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(dit, "HIDDEN_BYTES", 16 * 4 * 7)
        torch.testing.assert_close(layer(x), whole)


def test_half_precision_keeps_the_adapter_wide() -> None:
    layer = torch.nn.Linear(6, 4, bias=False).bfloat16()
    low = LowRankLinear(layer, 2, 1.0)
    assert (low.down.dtype, low.up.dtype) == (torch.float32, torch.float32)
    assert low(torch.ones(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert low.weight.dtype == torch.bfloat16


def test_patterns_that_match_nothing() -> None:
    model = filled(ARTransformer(SMALL_TRANSFORMER))
    with pytest.raises(ValueError, match=r"like layers\.\*\.attn"):
        add_adapters(model, LoRARecipe(("layers.*.attn",), 2), torch.Generator())


def test_targets_of_the_released_recipes() -> None:
    """224 tensors for Predict1, ten matrices a block for Predict2.5."""
    from worldline.families.diffusion.model import PRESETS, DiT
    from worldline.families.predict2_5.model import PRESETS as FLOW
    from worldline.families.predict2_5.model import FlowDiT

    for weights, kind, config, count in (
        (diffusion, DiT, PRESETS["7B-Video2World"], 112),
        (flow, FlowDiT, FLOW["2B"], 280),
    ):
        shapes = {n: s for n, s in shapes_of(kind, config).items() if len(s) == 2}
        targets = [n for n in shapes if any(lora_fits(n, p) for p in weights.LORA.targets)]
        assert len(targets) == count
        assert {*targets} <= {*lora.target_names(weights.LAYOUTS, shapes).values()}


def lora_fits(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)
