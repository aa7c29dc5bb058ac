"""Two processes that train on halves of a batch give what one gives on the whole."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline.parallel.ranks import ALONE, Ranks, join, leave
from worldline.train.loop import STATE, LoopConfig, Objective, fit, generator

CONFIG = LoopConfig(steps=6, learning_rate=0.05, warmup=2, log_every=2, save_every=4)


def train(folder: Path, ranks: Ranks, *, seconds: float | None = None) -> int:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def draw(step: int) -> tuple[Tensor]:
        x = torch.randn(8, 4, generator=generator(0, step))
        return (x[ranks.rank :: ranks.count],)

    def loss(own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (model(own).squeeze(-1) - own.sum(-1)).square().mean(), {}

    objective = Objective(draw=draw, loss=loss)
    return fit(model, objective, CONFIG, folder, seconds=seconds, ranks=ranks)[0]


def work(rank: int, port: int, folder: Path, seconds: float | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks, device = join("cpu")
    assert (ranks, device) == (Ranks(rank, 2), "cpu")
    # only one of two runs out of time, and both must stop
    steps = train(folder, ranks, seconds=seconds if rank else None)
    (folder / f"steps-{rank}").write_text(str(steps))
    leave(ranks)


def run_two(folder: Path, seconds: float | None = None) -> None:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, folder, seconds), nprocs=2)


def weights(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / STATE)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}


@pytest.mark.slow
def test_two_give_what_one_gives(tmp_path: Path) -> None:
    train(tmp_path / "one", ALONE)
    run_two(tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-6), name
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


@pytest.mark.slow
def test_all_stop_where_one_runs_out_of_time(tmp_path: Path) -> None:
    run_two(tmp_path / "two", seconds=0)
    assert [(tmp_path / "two" / f"steps-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_alone_there_is_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == (ALONE, "cpu")
    tensor = torch.ones(3)
    ALONE.average([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert not ALONE.any(False, torch.device("cpu"))


def test_processes_seeds_and_steps_draw_different_numbers() -> None:
    whos = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [
        torch.randn(4, generator=generator(seed, step, rank=rank)) for rank, seed, step in whos
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(whos)
