"""Two processes that train on halves of a batch give what one gives on the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import Together
from tests.states import read_state
from worldline.parallel.mesh import Axis
from worldline.train.loop import LoopConfig, Objective, fit, generator
from worldline.train.optim import Cosine

RATE = Cosine(peak=0.05, warmup=2, decay=6, early=True)
CONFIG = LoopConfig(steps=6, rate=RATE, log_every=2, save_every=4)


def train(ranks: Axis, folder: Path, late: int | None = None) -> int:
    """Steps done; process `late` alone has no time."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def draw(step: int) -> tuple[Tensor]:
        x = torch.randn(8, 4, generator=generator(0, step))
        return (x[ranks.rank :: ranks.count],)

    def loss(own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (model(own).squeeze(-1) - own.sum(-1)).square().mean(), {}

    objective = Objective(draw=draw, loss=loss)
    seconds = 0.0 if ranks.rank == late else None
    return fit(model, objective, CONFIG, folder, seconds=seconds, ranks=ranks)[0]


def weights(folder: Path) -> dict[str, Tensor]:
    tensors = read_state(folder)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}


@pytest.mark.slow
def test_two_give_what_one_gives(two: Together, tmp_path: Path) -> None:
    train(Axis(), tmp_path / "one")
    assert two(train, tmp_path / "two") == [6, 6]
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor, both[name], atol=1e-6), name
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


@pytest.mark.slow
def test_all_stop_where_one_runs_out_of_time(two: Together, tmp_path: Path) -> None:
    assert two(train, tmp_path, 1) == [2, 2]


def test_processes_seeds_and_steps_draw_different_numbers() -> None:
    whos = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [
        torch.randn(4, generator=generator(seed, step, rank=rank)) for rank, seed, step in whos
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(whos)
