"""From a folder of released files to a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from worldline.errors import CheckpointError
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map, network_view, read_config
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.views import joined

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
            checkpoint), or the path of a whole file.
        ema: take the averaged weights of a training checkpoint.
        levels: FSQ levels, for files without them.

    Raises:
        CheckpointError: nothing fits, or half of a set is missing.
    """
    if folder.is_file():
        return _opened([folder], folder, folder.parent.name, ema, levels)
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
            return _opened(paths, folder, folder.name, ema, levels)
        if present:
            missing = next(path for path in paths if path not in present)
            half_missing = f"{folder} is half downloaded: {missing.name} is missing"
    wanted = "encoder.jit and decoder.jit, autoencoder.jit, or model.pt"
    raise CheckpointError(half_missing or f"{folder} holds no tokenizer ({wanted})")


def _opened(
    paths: list[Path], whole: Path, name: str, ema: bool, levels: tuple[int, ...] | None
) -> tuple[Checkpoint, CosmosTokenizerConfig]:
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
    with torch.device("meta"):
        model = CosmosTokenizer(config)
    load_into(model, source, key_map(config), device=device, dtype=dtype)
    return model.requires_grad_(False).eval()
