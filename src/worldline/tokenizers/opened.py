"""Files of video tokenizers: opening, checking and writing, for all families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint
from worldline.weights.stream import load_into

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")
Layout = Literal["released", "diffusers"]  # whose names the tensors of a file have

CONFIG = "config.json"
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)


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
            dtype: precision of weights and activations.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        with torch.device("meta"):
            model = self.network(self.config)
        load_into(model, self.source, self.keys, device=device, dtype=dtype)
        return model.requires_grad_(False).eval()


def renamed_by(rules: Iterable[tuple[str, str]], name: str) -> str:
    """Name after regular expressions and their replacements, applied in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def stored_tensors(model: nn.Module, keys: KeyMap) -> dict[str, Tensor]:
    """Tensors of a network by their names in a file, in their own dtype."""
    return {
        keys.released(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
    }


def refuse_other_settings(
    path: Path, settings: Mapping[str, Any], stated: Mapping[str, Any]
) -> None:
    """Refuse a config.json that differs from the one that belongs to the tensors beside it.

    Args:
        path: the file.
        settings: its content.
        stated: the one that belongs to the tensors.

    Raises:
        CheckpointError: a setting differs.
    """
    for name, value in settings.items():
        if name in stated and value != stated[name]:
            raise CheckpointError(
                f"{path}: {name} is {value}; the tensors beside it are of {stated[name]}"
            )
