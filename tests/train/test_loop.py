"""The loop: a cut run ends where an uncut one does; averages; step sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldline.errors import CheckpointError, NonFiniteError
from worldline.train.loop import LoopConfig, Objective, fit, generator
from worldline.train.optim import Average, Cosine, Rising, make_optimizer, orthogonalise, trainable
from worldline.train.states import States

RATE = Cosine(peak=0.05, warmup=3, decay=12, floor=5e-4, early=True)
CONFIG = LoopConfig(steps=12, rate=RATE, log_every=4, save_every=5)


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def summed(model: nn.Module) -> Objective:
    """The sum of a model's output for ones."""
    return Objective(draw=lambda step: (torch.ones(1, 4),), loss=lambda x: (model(x).sum(), {}))


def train(
    folder: Path, config: LoopConfig, stop_at: int | None = None
) -> tuple[nn.Module, Average]:
    model = small()

    def draw(step: int) -> tuple[Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        return (torch.randn(16, 4, generator=generator(0, step)),)

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (model(x).squeeze(-1) - x.sum(-1)).square().mean(), {"largest": x.max()}

    _, average = fit(model, Objective(draw=draw, loss=loss), config, folder)
    assert average is not None
    return model, average


def test_streams_of_a_step_are_its_own() -> None:
    kinds = product((0, 1), (0, 7), (0, 1), (0, 1, 2))  # rank, seed, step, stream
    seeds = [generator(s, t, rank=r, stream=n).initial_seed() for r, s, t, n in kinds]
    assert len(set(seeds)) == len(seeds)
    assert generator(7, 1).initial_seed() == generator(7, 1, rank=0, stream=0).initial_seed()
    # what runs drew before there were streams
    before = np.random.SeedSequence((1, 7, 5)).generate_state(1)[0]
    assert generator(7, 5, rank=1).initial_seed() == before


@pytest.mark.parametrize("orthogonal", [(), ("0.weight",)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, orthogonal: tuple[str, ...]) -> None:
    config = replace(CONFIG, orthogonal=orthogonal)
    whole, whole_average = train(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config, stop_at=8)  # the state of step 5 is on disk
    cut, cut_average = train(tmp_path / "cut", config)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in whole_average.values.items():
        assert torch.equal(value, cut_average.values[name])


def test_one_state_is_kept_and_the_log_is_json(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_000000012.state", "log.jsonl"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("bar", [False, True])
def test_bars_of_the_caller_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bar: bool
) -> None:
    """No thread watches the loop's; those of the caller are watched as before."""
    monkeypatch.setattr(tqdm, "monitor_interval", 7)
    monkeypatch.setattr(tqdm, "monitor", None)
    train(tmp_path, replace(CONFIG, bar=bar))
    assert (tqdm.monitor_interval, tqdm.monitor) == (7, None)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    other = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        fit(other, summed(other), CONFIG, tmp_path)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    train(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        train(tmp_path, replace(CONFIG, orthogonal=("0.weight",)))


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_orthogonal_updates(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    done = orthogonalise(matrices).float()
    # in the axes of U and V it is diagonal, of values near one
    inside = u.mT @ done @ vt.mT
    assert inside.diagonal(dim1=1, dim2=2).sub(1).abs().max() < 0.4
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def test_muon_takes_the_matrices_it_is_given_and_adamw_the_rest() -> None:
    plain, mixed = small(), small()
    for model, orthogonal in ((plain, ()), (mixed, ("0.*",))):
        optimizer = make_optimizer(
            trainable(model), betas=(0.9, 0.99), weight_decay=0.0, orthogonal=orthogonal
        )
        optimizer.defaults["lr"].fill_(0.01)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    names = [name for name, _ in mixed.named_parameters()]
    for name, a, b in zip(names, plain.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(a, b) == (name != "0.weight"), name  # a bias is no matrix


def test_steps_of_muon_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    shapes = {"wide": (4, 16), "square": (6, 6), "other": (4, 16)}
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    rate, decay = 0.1, 0.5
    optimizer = make_optimizer(
        trainable(model), betas=(0.9, 0.99), weight_decay=decay, orthogonal=("*",)
    )
    optimizer.defaults["lr"].fill_(rate)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(shapes[name], dtype=torch.float64)
            parameter.grad = gradient.float()
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
            ahead = 0.95 * momenta[name] + 0.05 * gradient
            u, _, vt = torch.linalg.svd(ahead, full_matrices=False)
            size = 0.2 * max(shapes[name]) ** 0.5
            weights[name] = weights[name] * (1 - rate * decay) - rate * size * (u @ vt)
        optimizer.step()
    for name, parameter in model.named_parameters():
        # singular values are near one, not one: each step is right to a third of its length
        steps = 2 * rate * 0.2 * max(shapes[name]) ** 0.5 * min(shapes[name]) ** 0.5
        error = torch.linalg.matrix_norm(parameter.detach().double() - weights[name])
        assert error < 0.25 * steps, name


def test_a_pattern_that_fits_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no matrix to train has a name like 7\.\*"):
        make_optimizer(trainable(small()), betas=(0.9, 0.99), weight_decay=0.0, orthogonal=("7.*",))


def test_held_out_figures_are_logged_when_they_are_due(tmp_path: Path) -> None:
    model = small()
    objective = replace(summed(model), watch=lambda: {"held_out": torch.tensor(0.5)}, watch_every=6)
    fit(model, objective, CONFIG, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("held_out")) for line in lines] == [
        (4, None),
        (6, 0.5),
        (8, None),
        (12, 0.5),
    ]


def test_the_state_of_another_width_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    narrow, wide = nn.Linear(4, 1, bias=False), nn.Linear(4, 8, bias=False)
    fit(narrow, summed(narrow), CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        fit(wide, summed(wide), CONFIG, tmp_path)


def test_a_run_stops_in_time_and_saves(tmp_path: Path) -> None:
    model = small()
    done, _ = fit(model, summed(model), CONFIG, tmp_path, seconds=0)
    assert done == 1
    assert States(tmp_path).steps() == [1]


def test_step_sizes_rise_and_fall() -> None:
    rate = Cosine(peak=1.0, warmup=10, decay=110, floor=0.01, early=True)
    rates = [rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.505)
    assert rates[110] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_an_average_follows() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(trainable(model), Rising(0.9))
    nn.init.ones_(model.weight)
    average.set_weight(1_000_000)
    average.update()
    assert average.values["weight"].item() == pytest.approx(0.1)
    assert model.weight.item() == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("orthogonal", [(), ("0.weight",)])
def test_a_recorded_step_is_the_step(tmp_path: Path, orthogonal: tuple[str, ...]) -> None:
    models, averages = [], []
    for graphed in (False, True):
        model = small().cuda()

        def draw(step: int) -> tuple[Tensor]:
            return (torch.randn(16, 4, generator=generator(0, step)).cuda(),)

        def loss(x: Tensor, model: nn.Module = model) -> tuple[Tensor, dict[str, Tensor]]:
            error = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
            return error, {"largest": x.max()}

        config = replace(CONFIG, graphed=graphed, orthogonal=orthogonal)
        _, average = fit(model, Objective(draw=draw, loss=loss), config, tmp_path / str(graphed))
        models.append(model)
        averages.append(average)
    for plain, recorded in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(recorded, plain)
    for name, value in averages[0].values.items():
        torch.testing.assert_close(averages[1].values[name], value)
    logs = [(tmp_path / str(graphed) / "log.jsonl").read_text() for graphed in (False, True)]
    figures = [[json.loads(line)["largest"] for line in log.splitlines()] for log in logs]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_that_diverges_names_its_batches(tmp_path: Path, bad: float) -> None:
    """The last state is kept; it stops before the next one is written."""
    model = small()

    def draw(number: int) -> tuple[Tensor]:
        return (torch.full((1, 4), bad if number == 13 else 1.0),)

    objective = Objective(
        draw=draw, loss=lambda x: (model(x).sum(), {}), named=lambda number: f"clip {number}"
    )
    config = replace(CONFIG, accumulate=2, log_every=100)  # batch 13 is of step 7
    with pytest.raises(NonFiniteError, match=r"step 7: .* clip 12, clip 13; .*step 5 is kept"):
        fit(model, objective, config, tmp_path)
    assert States(tmp_path).steps() == [5]


def test_accumulated_batches_are_one(tmp_path: Path) -> None:
    """Four batches a step give what one of all gives."""
    ends = []
    for parts in (1, 4):
        model = small()

        def draw(number: int, parts: int = parts) -> tuple[Tensor]:
            whole = torch.randn(16, 4, generator=generator(0, number // parts))
            return (whole.chunk(parts)[number % parts],)

        def loss(x: Tensor, model: nn.Module = model) -> tuple[Tensor, dict[str, Tensor]]:
            return (model(x).squeeze(-1) - x.sum(-1)).square().mean(), {}

        config = replace(CONFIG, accumulate=parts)
        fit(model, Objective(draw=draw, loss=loss), config, tmp_path / str(parts))
        ends.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
