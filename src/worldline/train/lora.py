"""LoRA (arXiv 2106.09685) of any network: adapters beside frozen layers, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.files import replacing
from worldline.weights.checkpoint import refuse_nonfinite, save
from worldline.weights.keymap import KeyMap, LoRARecipe, matches
from worldline.weights.lora import ADAPTER_FILES, CONFIG, METADATA, Adapter

_WEIGHT = ".weight"
_HALVES = ("down", "up")
_PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")

# name of a matrix -> down and up of its adapter
Halves = Mapping[str, tuple[Tensor, Tensor]]


class LowRankLinear(nn.Module):
    """A frozen linear layer, and an adapter beside it: y = W x + scale * up(down(x)).

    It takes the layer's place, so that what is added stands before norms and rotations of heads.

    Attributes:
        base: the layer.
        down: (rank, in_features), float32.
        up: (out_features, rank), float32; 0 at first.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.in_features, self.out_features = base.in_features, base.out_features
        device = base.weight.device
        shapes = (rank, base.in_features), (base.out_features, rank)
        halves = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
        self.down, self.up = map(nn.Parameter, halves)

    @property
    def weight(self) -> Tensor:
        """The merged matrix, in the layer's dtype, for code that multiplies by it itself."""
        base = self.base.weight
        wide = torch.promote_types(base.dtype, torch.float32)  # rounded once, as merged at load
        merged = base.to(wide).addmm(self.up.to(wide), self.down.to(wide), alpha=self.scale)
        return merged.to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        added = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y + self.scale * added


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Name of a matrix -> the layer whose it is."""
    layers = module.named_modules()
    return {f"{name}{_WEIGHT}": each for name, each in layers if isinstance(each, nn.Linear)}


def add_adapters(
    module: nn.Module, recipe: LoRARecipe, generator: torch.Generator
) -> dict[str, LowRankLinear]:
    """Freeze a network, and put new adapters beside its layers; the output does not change yet.

    Args:
        module: with its weights; changed in place.
        recipe: which layers, and how.
        generator: of the CPU, so that a seed gives the same numbers on any device.

    Returns:
        Name of the matrix -> the layer with its adapter, in the order of the network.

    Raises:
        ValueError: a pattern matches no linear layer.
    """
    module.requires_grad_(False)
    linear = linear_layers(module)
    for pattern in recipe.targets:
        if not any(matches(name, [pattern]) for name in linear):
            raise ValueError(f"no linear layer has a name like {pattern}")
    adapted: dict[str, LowRankLinear] = {}
    for name, layer in linear.items():
        if matches(name, recipe.targets):
            adapted[name] = new = LowRankLinear(layer, recipe.rank, recipe.scale)
            if recipe.start == "normal":
                drawn = torch.randn(new.down.shape, generator=generator) / recipe.rank
            else:
                drawn = 2 * torch.rand(new.down.shape, generator=generator) - 1
                drawn *= layer.in_features**-0.5
            new.down.data.copy_(drawn)
            owner, _, leaf = name.removesuffix(_WEIGHT).rpartition(".")
            setattr(module.get_submodule(owner), leaf, new)
    return adapted


def check_adapter(shapes: Mapping[str, Sequence[int]], adapter: Adapter) -> None:
    """Compare the matrices of an adapter, and its rank, with those of a run, by its header.

    Args:
        shapes: name of a matrix -> shape of `down`.
        adapter: of a file.

    Raises:
        ValueError: they differ; the first of them are named.
    """
    own = {name: (*shape,) for name, shape in shapes.items()}
    theirs = {name: (*update.down.meta.shape,) for name, update in adapter.updates.items()}
    if different := sorted(dict(own.items() ^ theirs.items())):
        names = ", ".join(different[:3])
        raise ValueError(f"{adapter.path} adapts other matrices, or by another rank ({names})")


def restore(adapted: Mapping[str, LowRankLinear], adapter: Adapter) -> None:
    """Give adapters the numbers of a file; a ValueError where its matrices differ."""
    check_adapter({name: layer.down.shape for name, layer in adapted.items()}, adapter)
    for name, layer in adapted.items():
        for parameter, half in zip(
            (layer.down, layer.up), adapter.updates[name].halves, strict=True
        ):
            value = half.read()
            refuse_nonfinite(half.path, name, value)
            parameter.data.copy_(value)


def half_name(keys: KeyMap, name: str, end: str, prefix: str | None = None) -> str:
    """Name of half of an adapter: that of its matrix in `keys`, with the end of a form."""
    stem = keys.released(name, prefix).removesuffix(_WEIGHT)
    if end.startswith("_"):  # Predict1's, which leaves out the place in a list
        stem = stem.removesuffix(".0")
    return f"{stem}{end}"


def adapted_name(keys: KeyMap, ends: tuple[str, str], name: str) -> str:
    """Released name of a parameter of an adapted network, by the ends of a trainer."""
    stem, _, leaf = name.rpartition(".")
    if leaf in _HALVES:
        return half_name(keys, f"{stem}{_WEIGHT}", ends[_HALVES.index(leaf)])
    return keys.released(f"{stem.removesuffix('.base')}.{leaf}")


def named_halves(
    halves: Halves, keys: KeyMap, ends: tuple[str, str], prefix: str
) -> dict[str, Tensor]:
    """Tensors of an adapter by the names of a form: its ends behind the layers' in `keys`."""
    return {
        half_name(keys, ours, end, prefix): half
        for ours, pair in halves.items()
        for end, half in zip(ends, pair, strict=True)
    }


def settings(halves: Halves, scale: float, keys: KeyMap) -> dict[str, Any]:
    """Content of PEFT's configuration of an adapter of one rank."""
    [rank] = {len(down) for down, _ in halves.values()}
    alpha = rank * scale
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(keys.released(n, "").removesuffix(_WEIGHT) for n in halves),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def save_peft(halves: Halves, scale: float, keys: KeyMap, folder: Path) -> None:
    """Write an adapter as PEFT does: a folder, made if absent, of tensors and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = named_halves(halves, keys, _PEFT_ENDS, "base_model.model.")
    save(tensors, folder / ADAPTER_FILES[0], {"format": "pt"})
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(settings(halves, scale, keys), indent=2) + "\n")


def save_diffusers(
    halves: Halves, scale: float, keys: KeyMap, path: Path, *, pipeline: bool = True
) -> None:
    """Write an adapter as diffusers does: of a pipeline, or of its transformer alone.

    `keys` are diffusers' names; `path` ends in .safetensors.
    """
    prefix = "transformer." if pipeline else ""
    stated = {f"{prefix}{name}": value for name, value in settings(halves, scale, keys).items()}
    text = {"format": "pt", METADATA: json.dumps(stated, indent=2, sort_keys=True)}
    save(named_halves(halves, keys, _PEFT_ENDS, prefix), path, text)
