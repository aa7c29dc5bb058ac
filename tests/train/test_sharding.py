"""Processes that share the training of a network train as one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import Together
from tests.states import read_state
from worldline.families.autoregressive.model import (
    SHARD_PLAN,
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.objective import NextTokenObjective
from worldline.families.autoregressive.trainer import files as trainer_files
from worldline.families.autoregressive.trainer import order
from worldline.families.autoregressive.weights import KEYS
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.diffusion.objective import DenoisingObjective, Draws, Uncertainty
from worldline.parallel.mesh import Axis
from worldline.shapes import LatentShape
from worldline.train.files import Checkpoints, Names, ReferenceFiles
from worldline.train.loop import LoopConfig, Objective, Run, fit
from worldline.train.optim import Cosine, Power
from worldline.train.sharding import fill, local, share
from worldline.weights.trainings import open_state

CONFIG = ARTransformerConfig(
    depth=2,
    width=36,
    num_heads=4,
    num_kv_heads=2,
    head_size=12,
    hidden=60,
    vocabulary=70,
    embedding_rows=70,
    grid=LatentShape(3, 4, 5),
)
PROMPTED = replace(CONFIG, embedding_rows=72, context_width=20, absolute_positions=True)
DENOISER = DiTConfig(
    depth=2,
    width=24,
    num_heads=2,
    head_size=12,
    hidden=96,
    context_width=20,
    lora_rank=6,
    max_grid=LatentShape(4, 6, 6),
    rope_ratio=(1.0, 1.0, 1.0),
    condition_mask=True,
)
CONFIGS = {"base": CONFIG, "prompted": PROMPTED, "denoiser": DENOISER}
STEPS, CLIPS = 6, 4
LOOP = LoopConfig(
    steps=STEPS,
    rate=Cosine(peak=0.02, warmup=2, decay=STEPS, early=True),
    decay_all=True,
    average=Power(0.1),
    log_every=1,
    save_every=2,
)


class Step(nn.Module):
    """A step's loss as one module; the batch's number alone decides what it is."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.uncertainty = Uncertainty(8) if isinstance(network, DiT) else None
        if self.uncertainty:
            generator = torch.Generator().manual_seed(0)
            for value in (*self.uncertainty.parameters(), *self.uncertainty.buffers()):
                nn.init.normal_(value.data, std=0.1, generator=generator)

    def forward(self, clips: Tensor, text: Tensor) -> Tensor:
        if self.uncertainty is None:
            positions = make_positions(self.network.config, "cpu", torch.float32)
            given = text if self.network.config.context_width else None
            terms = NextTokenObjective().loss(self.network, (clips.long(), positions, given))
            return terms.cross_entropy + terms.z
        count = len(clips)
        draws = Draws(
            torch.ones(count),
            clips[:, 0, 0, 0, 0].exp(),
            clips.flip(1),
            (text[:, 0, 0] > 0).long(),
            torch.full((count,), 0.1),
            clips.flip(2),
        )
        objective = DenoisingObjective(most_conditioning=2)
        return objective.loss(
            self.network, self.uncertainty, (clips, text, 24.0, None), draws
        ).mean()


def build(config: Any) -> Any:
    torch.manual_seed(4)
    model = DiT(config) if isinstance(config, DiTConfig) else ARTransformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def part(model: ARTransformer, rank: int, count: int) -> ARTransformer:
    """A tensor-parallel process's part of a model."""
    own = ARTransformer(model.config.part(count))
    for (_, mine), (_, whole) in zip(own.named_parameters(), model.named_parameters(), strict=True):
        value = whole.detach()
        for axis, size in enumerate(mine.shape):
            value = value.narrow(axis, rank * size if size != value.shape[axis] else 0, size)
        mine.data = value.clone()
    return own


def draw(config: Any, number: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Clips and texts of a batch; the same again every second batch."""
    generator = torch.Generator().manual_seed(number % 2)
    shape: tuple[int, ...] = (CLIPS, 16, 3, 4, 4)
    clips = torch.randn(shape, generator=generator)
    if isinstance(config, ARTransformerConfig):
        ids = torch.randint(config.vocabulary, (CLIPS, config.length), generator=generator)
        clips = ids.float()
    text = torch.randn(CLIPS, 5, config.context_width or 1, generator=generator)
    return clips[rows], text[rows]


def train(axis: Axis, name: str, folder: Path, *, tp: int, parts: int, stop: int = STEPS) -> None:
    """Train with batches of all clips, or in `parts` batches of each process a step."""
    config = CONFIGS[name]
    network, dp, rank, sharded = build(config), axis.count // tp, 0, None
    whole = {key: tuple(p.shape) for key, p in network.named_parameters()}
    mesh = None
    if axis.count > 1:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        rank = mesh["dp"].get_local_rank()
        network = part(network, mesh["tp"].get_local_rank(), tp) if tp > 1 else network
    step = Step(network)
    if mesh is not None:
        plan = SHARD_PLAN if tp > 1 else None
        blocks = "blocks" if isinstance(config, DiTConfig) else "layers"
        sharded = share(
            step, "network", mesh, blocks=blocks, compute=torch.float32, whole=whole, plan=plan
        )
    own = CLIPS // dp // parts

    def mine(number: int) -> tuple[Tensor, Tensor]:
        start = rank * (CLIPS // dp) + number % parts * own
        return draw(config, number // parts, slice(start, start + own))

    asked = iter(range(1, 99))
    fit(
        step,
        Objective(draw=mine, loss=lambda *batch: (step(*batch), {})),
        replace(LOOP, accumulate=parts),
        folder,
        ranks=axis,
        sharded=sharded,
        stopping=lambda: next(asked) >= stop,
    )


def check(one: Path, other: Path) -> None:
    """Norms of gradients, final weights and averages of two runs."""
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    lines = [[json.loads(line) for line in log] for log in logs]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-3), ours["step"]
    states = [read_state(folder) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        # Adam's first steps do not depend on the size of a gradient, which may be near 0
        difference = (states[1][name] - value).abs().mean()
        assert float(difference) < 2e-5, name


WAYS = [("base", 1, 1), ("base", 2, 1), ("base", 2, 2), ("prompted", 2, 1), ("denoiser", 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "parts"), WAYS)
def test_two_train_as_one(two: Together, tmp_path: Path, name: str, tp: int, parts: int) -> None:
    """FSDP, or tensor parallel layers, and accumulation."""
    train(Axis(), name, tmp_path / "one", tp=1, parts=1)
    first, *_, last = (tmp_path / "one" / "log.jsonl").read_text().splitlines()
    assert json.loads(last)["loss"] < json.loads(first)["loss"]
    two(train_in_ranks, name, tmp_path / "two", tp, parts)
    check(tmp_path / "one", tmp_path / "two")


def train_in_ranks(
    axis: Axis, name: str, folder: Path, tp: int, parts: int, stop: int = STEPS
) -> None:
    train(axis, name, folder, tp=tp, parts=parts, stop=stop)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 0), (0, 2)])
def test_a_run_goes_on_in_another_layout(
    two: Together, tmp_path: Path, before: int, after: int
) -> None:
    """Two processes by FSDP (1) or tensor parallel (2), or one alone (0)."""
    train(Axis(), "base", tmp_path / "one", tp=1, parts=1)
    for tp, stop in ((before, 3), (after, STEPS)):
        if tp:
            two(train_in_ranks, "base", tmp_path / "cut", tp, 1, stop)
        else:
            train(Axis(), "base", tmp_path / "cut", tp=1, parts=1, stop=stop)
    check(tmp_path / "one", tmp_path / "cut")


def filled(axis: Axis) -> dict[str, Tensor]:
    """Weights of a shared module after whole ones were put into it."""
    mesh = init_device_mesh("cpu", (axis.count, 1), mesh_dim_names=("dp", "tp"))
    step = nn.Module()
    step.network = nn.Module()
    step.network.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(5, 1, bias=False)])
    share(step, "network", mesh, blocks="layers", compute=torch.float32)
    for name, parameter in step.named_parameters():
        fill(parameter.detach(), numbered(name, parameter.shape))
    named = step.named_parameters()
    return {name: each.full_tensor().detach() for name, each in named}  # type: ignore[attr-defined]


def numbered(name: str, shape: torch.Size) -> Tensor:
    return torch.arange(float(shape.numel())).view(shape) + len(name)


@pytest.mark.slow
def test_whole_tensors_are_put_into_shared_ones(two: Together) -> None:
    """Of three rows a process has two, the other one; of one row, one has none."""
    for found in two(filled):
        assert all(torch.equal(t, numbered(name, t.shape)) for name, t in found.items())
        assert {t.shape[0] for t in found.values()} == {1, 3}


def shared_run(axis: Axis, folder: Path, tp: int) -> tuple[Run, Checkpoints]:
    """A run of processes, `tp` of which share layers, that writes as the released trainer does."""
    mesh = init_device_mesh("cpu", (axis.count // tp, tp), mesh_dim_names=("dp", "tp"))
    network, rank = build(CONFIG), mesh["tp"].get_local_rank()
    whole = {key: tuple(p.shape) for key, p in network.named_parameters()}
    step = Step(part(network, rank, tp) if tp > 1 else network)
    plan = SHARD_PLAN if tp > 1 else None
    sharded = share(
        step, "network", mesh, blocks="layers", compute=torch.float32, whole=whole, plan=plan
    )
    objective = Objective(
        draw=lambda number: draw(CONFIG, number, slice(0, 1)),
        loss=lambda *batch: (step(*batch), {}),
    )
    run = Run(step, objective, replace(LOOP, average=None), folder, axis, sharded)
    names = Names(
        lambda name: KEYS.released(name.removeprefix("network.")), Axis(rank, tp), sharded.cut, {}
    )
    reference = ReferenceFiles(
        trainer_files, order, torch.bfloat16, names, tuple(run.parameters), lambda step: {}, False
    )
    files = Checkpoints(folder, (reference,), "iter_{step:09}.pt", names, {})
    run.keep(files, True)
    return run, files


def through_files(axis: Axis, folder: Path, tp: int) -> list[str]:
    """Names of tensors that a trainer's files do not give back to each process as they were."""
    run, files = shared_run(axis, folder / "a", tp)
    run.go(None, lambda: True)
    axis.any(False)
    again, _ = shared_run(axis, folder / "b", tp)
    names = sorted(map(files.tensors.released, run.parameters), key=order)
    ending = "_model_mp_0.pt" if tp > 1 else ".pt"
    stored = open_state(folder / "a" / f"iter_000000001{ending}", names)
    assert files.restore(stored, again.state()) == 1
    found = again.state()
    return [
        name
        for name, value in run.state().items()
        if not torch.equal(local(found[name]), local(value).bfloat16().float())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_files_of_a_trainer_give_each_process_its_part(
    two: Together, tmp_path: Path, tp: int
) -> None:
    assert two(through_files, tmp_path, tp) == [[], []]
