"""From a folder of released files to a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from worldline.errors import CheckpointError
from worldline.tokenizers.cosmos.diffusers import open_vae
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import find_vae
from worldline.tokenizers.cosmos.weights import key_map, network_view, read_config
from worldline.weights.read import Checkpoint, joined, open_checkpoint
from worldline.weights.stream import load_into

# in order of preference: what a folder may hold
LAYOUTS = (
    ("encoder.safetensors", "decoder.safetensors"),
    ("encoder.jit", "decoder.jit"),
    ("autoencoder.safetensors",),
    ("autoencoder.jit",),
    ("model.safetensors",),
    ("model.pt",),
)


def open_tokenizer(
    folder: Path, *, ema: bool = False, levels: tuple[int, ...] | None = None
) -> tuple[Checkpoint, CosmosTokenizerConfig]:
    """Return the tensors of a tokenizer folder and the configuration they imply; headers only.

    Args:
        folder: with one of the released sets of files (two halves, one whole, or a training
            checkpoint), the path of a whole file, or a folder of diffusers (a model's, or its
            `vae`), whose tensors are returned by their released names.
        ema: take the averaged weights of a training checkpoint.
        levels: FSQ levels, for files without them.

    Raises:
        CheckpointError: nothing fits, or half of a set is missing.
    """
    if folder.is_dir() and find_vae(folder) is not None:
        if ema:
            raise CheckpointError(f"{folder}: holds no averaged (EMA) weights")
        return open_vae(folder)
    if folder.is_file():
        return open_files([folder], folder.parent.name, ema=ema, levels=levels)
    if not folder.is_dir():
        raise CheckpointError(f"no tokenizer folder {folder}")
    layouts = (
        *LAYOUTS,
        *((path.name,) for path in sorted(folder.glob("iter_*.pt"), reverse=True)),
    )
    half_missing = ""
    for names in layouts:
        if ema and len(names) == 2:
            continue  # only a training checkpoint holds averages
        paths = [folder / name for name in names]
        present = [path for path in paths if path.exists()]
        if len(present) == len(paths):
            return open_files(paths, folder.name, ema=ema, levels=levels)
        if present:
            missing = next(path for path in paths if path not in present)
            half_missing = f"{folder} is half downloaded: {missing.name} is missing"
    wanted = "encoder.jit and decoder.jit, autoencoder.jit, or model.pt"
    raise CheckpointError(half_missing or f"{folder} holds no tokenizer ({wanted})")


def open_files(
    paths: Sequence[Path],
    name: str,
    *,
    ema: bool = False,
    levels: tuple[int, ...] | None = None,
) -> tuple[Checkpoint, CosmosTokenizerConfig]:
    """Return what `open_tokenizer` does, of the files themselves: a whole one, or two halves.

    Args:
        paths: of the files.
        name: of the tokenizer; see `read_config`.
        ema: as for `open_tokenizer`.
        levels: as for `open_tokenizer`.

    Raises:
        CheckpointError: a file cannot be read, or they are not of one tokenizer.
    """
    whole = paths[0] if len(paths) == 1 else paths[0].parent
    source = joined([open_checkpoint(path) for path in paths], whole)
    source = network_view(source, ema=ema)
    return source, read_config(source, name=name, levels=levels)


def load_tokenizer(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    ema: bool = False,
    levels: tuple[int, ...] | None = None,
) -> CosmosTokenizer:
    """Return the tokenizer of `folder` in evaluation mode; see `open_tokenizer`."""
    source, config = open_tokenizer(folder, ema=ema, levels=levels)
    return build_tokenizer(source, config, device=device, dtype=dtype)


def build_tokenizer(
    source: Checkpoint,
    config: CosmosTokenizerConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> CosmosTokenizer:
    """Return the tokenizer that `open_tokenizer` found, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, unknown or of the wrong shape.
    """
    with torch.device("meta"):
        model = CosmosTokenizer(config)
    load_into(model, source, key_map(config), device=device, dtype=dtype)
    return model.requires_grad_(False).eval()
