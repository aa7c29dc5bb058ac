"""From a released file or folder to a Wan tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.files import read_json, unfinished
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import diffusers_config, find_layout, key_map, read_config
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.stream import load_into

# in order of preference: what a folder may hold
FILES = ("tokenizer.pth", "Wan2.1_VAE.pth")
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
CONFIG = "config.json"
_KIND = "AutoencoderKLWan"


@dataclass(frozen=True)
class WanFiles:
    """A Wan tokenizer on disk, checked but not read.

    Attributes:
        source: its tensors.
        keys: from their names to ours.
        config: what they imply.
    """

    source: Checkpoint
    keys: KeyMap
    config: WanTokenizerConfig


def open_wan(path: Path) -> WanFiles:
    """Open a tokenizer of either layout; headers only.

    Args:
        path: the file of weights; or a folder with `tokenizer.pth` or `Wan2.1_VAE.pth`; or a folder
            of diffusers, a model's or its `vae`.

    Raises:
        CheckpointError: there is none, it is damaged or half downloaded, or a tensor does not fit.
    """
    file = _find(Path(path))
    source = open_checkpoint(file)
    layout = find_layout(source)
    settings: Mapping[str, Any] = {}
    if layout == "diffusers" and (file.parent / CONFIG).is_file():
        settings = read_json(file.parent / CONFIG)
        kind = settings.get("_class_name")
        if kind != _KIND:
            raise CheckpointError(f"{file.parent} holds a {kind}; {_KIND} is expected")
    config = read_config(source, settings)
    keys = key_map(config, layout or "released")
    with torch.device("meta"):
        model = WanTokenizer(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    match(source.tensors, expected, keys, str(source.path))
    _compare(file.parent / CONFIG, settings, config)
    return WanFiles(source, keys, config)


def _compare(path: Path, settings: Mapping[str, Any], config: WanTokenizerConfig) -> None:
    """Refuse a config.json that is not of the tensors beside it."""
    stated = diffusers_config(config)
    for name, value in settings.items():
        same = (None, config.channels) if name == "decoder_base_dim" else (stated.get(name),)
        if name in stated and name != "dropout" and value not in same:
            raise CheckpointError(
                f"{path}: {name} is {value}, yet the tensors beside it are of a tokenizer with "
                f"{stated[name]}"
            )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no tokenizer {path}")
    candidates = [path / name for name in FILES]
    candidates += [path / folder / name for folder in ("", "vae") for name in DIFFUSERS_FILES]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} holds no tokenizer of Wan2.1 ({', '.join(FILES)}, or {DIFFUSERS_FILES[0]} of "
            f"diffusers){unfinished(path)}"
        )
    return found


def load_wan(files: WanFiles, device: torch.device | str, dtype: torch.dtype) -> WanTokenizer:
    """Return the tokenizer of `files` in evaluation mode.

    Args:
        files: of `open_wan`.
        device: where it goes.
        dtype: of weights and activations; the reference's is bfloat16.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    with torch.device("meta"):
        model = WanTokenizer(files.config)
    load_into(model, files.source, files.keys, device=device, dtype=dtype)
    return channels_last(model).requires_grad_(False).eval()


def channels_last(model: WanTokenizer) -> WanTokenizer:
    """Keep the weights in the order in which convolutions of cells take them, and return `model`.

    Without it every call would bring them into that order.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return model
