"""Processes that share the training of a network train as one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import Together
from worldline.families.autoregressive.model import (
    SHARD_PLAN,
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.objective import NextTokenObjective
from worldline.parallel.mesh import Axis
from worldline.shapes import LatentShape
from worldline.train.sharding import Sharded, full_tensors, shard_weights, share_layers

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
STEPS, CLIPS = 6, 4
PARTIAL = ("q_norm.weight", "k_norm.weight")


def draw(step: int) -> Tensor:
    """Tokens (clips, length); the same again every second step."""
    generator = torch.Generator().manual_seed(step % 2)
    return torch.randint(CONFIG.vocabulary, (CLIPS, CONFIG.length), generator=generator)


class Step(nn.Module):
    """A step's loss as one module."""

    def __init__(self, network: ARTransformer) -> None:
        super().__init__()
        self.network = network
        self.positions = make_positions(network.config, "cpu", torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        terms = NextTokenObjective().loss(self.network, (tokens, self.positions, None))
        return terms.cross_entropy + terms.z


def build(config: ARTransformerConfig) -> ARTransformer:
    torch.manual_seed(4)
    model = ARTransformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def part(model: ARTransformer, rank: int, count: int) -> ARTransformer:
    """A tensor-parallel process's part of a model."""
    own = ARTransformer(model.config.part(count))
    for (_, mine), (_, all_) in zip(own.named_parameters(), model.named_parameters(), strict=True):
        value = all_.detach()
        for axis, size in enumerate(mine.shape):
            value = value.narrow(axis, rank * size if size != value.shape[axis] else 0, size)
        mine.data = value.clone()
    return own


def train(axis: Axis, tp: int, accumulated: int = 1) -> tuple[list[float], list[float], Any]:
    """Losses, norms, and final weights."""
    mesh = init_device_mesh("cpu", (axis.count // tp, tp), mesh_dim_names=("dp", "tp"))
    dp = mesh["dp"].get_local_rank()
    network, cut = build(CONFIG), frozenset[str]()
    whole = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if tp > 1:
        network = part(network, mesh["tp"].get_local_rank(), tp)
        cut = share_layers(network, SHARD_PLAN, whole, mesh["tp"])
    step = Step(network)
    partial = frozenset(n for n in whole if tp > 1 and n.endswith(PARTIAL))
    shard_weights(step, mesh["dp"], [*network.layers], torch.float32)
    names = {f"network.{name}" for name in cut}, {f"network.{name}" for name in partial}
    sharded = Sharded(step, mesh, *map(frozenset, names))
    optimizer = torch.optim.AdamW(sharded.groups(), lr=0.02, foreach=True)
    losses: list[float] = []
    norms: list[float] = []
    for number in range(STEPS):
        tokens = draw(number)
        own = tokens.chunk(axis.count // tp)[dp]
        total = torch.zeros(())
        for rows in own.chunk(accumulated):
            loss = step(rows) / accumulated
            loss.backward()
            total += loss.detach()
        sharded.sum_partial_gradients()
        norms.append(float(sharded.clip(1.0)))
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total, group=mesh["dp"].get_group())
        losses.append(float(total) / (axis.count // tp))
    return losses, norms, {name: value.clone() for name, value in full_tensors(step)}


def train_alone() -> tuple[list[float], list[float], Any]:
    step = Step(build(CONFIG))
    optimizer = torch.optim.AdamW(step.parameters(), lr=0.02)
    losses: list[float] = []
    norms: list[float] = []
    for number in range(STEPS):
        tokens = draw(number)
        loss = step(tokens)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(step.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in step.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "accumulated"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_two_train_as_one(two: Together, tp: int, accumulated: int) -> None:
    """FSDP, tensor parallel, with accumulation: losses, norms of gradients, final weights."""
    losses, norms, weights = train_alone()
    assert losses[-1] < losses[0]
    for found in two(train, tp, accumulated):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-4)
        assert found[2].keys() == weights.keys()
        for name, value in weights.items():
            # Adam's first steps do not depend on the size of a gradient, which may be near 0
            assert float((found[2][name] - value).abs().mean()) < 1e-5, name
