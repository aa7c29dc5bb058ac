"""The loop: a cut run ends where an uncut one does; averages; step sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.train.loop import LoopConfig, fit, generator
from worldline.train.optim import Average, warmup_cosine

CONFIG = LoopConfig(steps=12, learning_rate=0.05, warmup=3, log_every=4, save_every=5)


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def train(
    folder: Path, config: LoopConfig, stop_at: int | None = None
) -> tuple[nn.Module, Average]:
    model = small()

    def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=generator(0, step))
        loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
        return loss, {"seen": torch.tensor(float(step))}

    _, average = fit(model, objective, config, folder)
    return model, average


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, whole_average = train(tmp_path / "whole", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", CONFIG, stop_at=8)  # the state of step 5 is on disk
    cut, cut_average = train(tmp_path / "cut", CONFIG)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in whole_average.values.items():
        assert torch.equal(value, cut_average.values[name])


def test_one_state_is_kept_and_the_log_is_json(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["step"] == 12
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(state["files"].values())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    other = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="another model"):
        fit(other, lambda step: (other.weight.sum(), {}), CONFIG, tmp_path)


def test_a_run_stops_in_time_and_saves(tmp_path: Path) -> None:
    model = small()
    done, _ = fit(
        model, lambda step: (model(torch.ones(1, 4)).sum(), {}), CONFIG, tmp_path, seconds=0
    )
    assert done == 1
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 1


def test_step_sizes_rise_and_fall() -> None:
    rates = [warmup_cosine(s, peak=1.0, warmup=10, total=110, final=0.1) for s in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_an_average_follows_and_swaps_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.9)
    nn.init.ones_(model.weight)
    average.update(model, 1_000_000)
    assert average.values["weight"].item() == pytest.approx(0.1)
    average.swap(model)
    assert model.weight.item() == pytest.approx(0.1)
    average.swap(model)
    assert model.weight.item() == pytest.approx(1.0)
