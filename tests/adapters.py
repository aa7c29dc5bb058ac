"""Random LoRA adapters for tiny worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.family import FAMILIES
from worldline.opening import open_model_weights
from worldline.train.lora import Halves, named_halves, save_peft
from worldline.weights.checkpoint import save
from worldline.weights.networks import Network, shapes_of


def draw(
    network: Network[Any], patterns: Sequence[str], rank: int = 3, seed: int = 0, size: float = 0.1
) -> Halves:
    """Halves for the matrices of a network whose names fit a pattern."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(size * torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[misc]
        for name, (rows, columns) in (
            item for item in shapes_of(network.kind, network.config).items() if len(item[1]) == 2
        )
        if any(fnmatch(name, pattern) for pattern in patterns)
        for shapes in [((rank, columns), (rows, rank))]
    }


def write_peft(family: str, model: Path, folder: Path, scale: float = 1.0) -> Path:
    """Write an adapter of all that the family's trainer adapts, as PEFT does."""
    weights = import_module(f"{FAMILIES[family]}.weights")
    network = weights.open_network(open_model_weights(model), None)
    save_peft(draw(network, weights.LORA.targets), scale, weights.KEYS, folder)
    return folder


def save_inside(weights: Mapping[str, Tensor], halves: Halves, family: Any, path: Path) -> None:
    """Save weights by released names with an adapter beside, in their precision; no scale.

    `family` is the `weights` of one.
    """
    dtype = next(iter(weights.values())).dtype
    named = named_halves(halves, family.KEYS, family.LORA.ends, family.KEYS.prefixes[0])
    save({**weights, **{name: half.to(dtype) for name, half in named.items()}}, path)
