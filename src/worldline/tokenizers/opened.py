"""A video tokenizer on disk, whatever its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint
from worldline.weights.stream import load_into

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


@dataclass(frozen=True)
class OpenedTokenizer(Generic[Network, Config]):
    """A tokenizer on disk: headers read, names and shapes of all tensors checked.

    Attributes:
        network: its class.
        config: architecture; has `latent_channels`, `temporal` and `spatial`.
        source: its tensors.
        keys: their names to ours.
        settings: further files that decide its result, such as statistics of latents.

    Raises:
        CheckpointError: a tensor is missing, unknown or of the wrong shape.
    """

    network: Callable[[Config], Network]
    config: Config
    source: Checkpoint
    keys: KeyMap
    settings: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        match(self.source.tensors, self.shapes, self.keys, str(self.source.path))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by our names."""
        with torch.device("meta"):
            model = self.network(self.config)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def folder(self) -> Path:
        path = self.source.path
        return path if path.is_dir() else path.parent

    @property
    def files(self) -> list[Path]:
        """All files that decide its result."""
        return [*self.source.files, *self.settings]

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Network:
        """The network in evaluation mode.

        Args:
            device: where it goes.
            dtype: of weights and activations.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        with torch.device("meta"):
            model = self.network(self.config)
        load_into(model, self.source, self.keys, device=device, dtype=dtype)
        return model.requires_grad_(False).eval()
