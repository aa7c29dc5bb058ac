"""What the folders of a world tell before a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from worldline.catalog import BUNDLED_PREFIX
from worldline.errors import CheckpointError, InputError
from worldline.files import TRANSFORMER_FILES, read_json, stamp, unfinished
from worldline.models.predict1_ar.weights import SHARDS
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.shards import find_shards, open_shards, shard_stem


def world_name(name: str, *, bundled: bool) -> str:
    """Return the name that a world is asked for by, of its own or that of its folder."""
    return f"{BUNDLED_PREFIX if bundled else ''}{name}"


def open_transformer(path: Path) -> Checkpoint:
    """Open the transformer of a folder, in whatever form it was saved; headers only.

    Args:
        path: the folder; or a file, which is opened whatever lies beside it (of a tensor-parallel
            shard, the set that it belongs to).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_file():
        stem = shard_stem(path)
        if stem is None:
            return open_checkpoint(path)
        return open_shards(find_shards(path.parent, stem), SHARDS)
    for name in TRANSFORMER_FILES:
        if (path / name).exists():
            return open_checkpoint(path / name)
    shards = find_shards(path)
    if shards:
        return open_shards(shards, SHARDS)
    saved = sorted(path.glob("iter_*.pt"))
    if saved:
        return open_checkpoint(saved[-1])
    raise CheckpointError(
        f"{path} holds no model.pt (nor model.safetensors, model_model_mp_*.pt, iter_*.pt)"
        f"{unfinished(path)}"
    )


def is_diffusion(source: Checkpoint) -> bool:
    """Tell a diffusion transformer in NVIDIA's layout from others, by names alone."""
    return any(name.endswith("x_embedder.proj.1.weight") for name in source.tensors)


def refuse_decoder(folder: Path, source: Checkpoint) -> None:
    """Refuse the diffusion decoder of autoregressive worlds where a world is asked for.

    Raises:
        CheckpointError: it is one.
    """
    if any(name.endswith("token_embedder.weight") for name in source.tensors):
        raise CheckpointError(
            f"{folder} is the diffusion decoder of the autoregressive worlds, not a world: "
            "worldline autoregressive runs it with them"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json in `folder` says; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def typed_settings(
    settings: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], folder: Path
) -> dict[str, Any]:
    """Return those of `settings` that `kinds` names, each of its kind; numbers of 0 or more.

    Raises:
        CheckpointError: one is of another kind; names the config.json in `folder`.
    """
    given: dict[str, Any] = {}
    for name, expected in kinds.items():
        value = settings.get(name)
        if value is None:
            continue
        of_kind = isinstance(value, expected) and isinstance(value, bool) == (bool in expected)
        if not of_kind or (not isinstance(value, str) and not 0 <= value < math.inf):
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value!r}")
        given[name] = value
    return given


def stamps(parts: dict[str, Iterable[Path]]) -> dict[str, Any]:
    """Return name, size and time of every file of every part.

    Raises:
        CheckpointError: a file has vanished.
    """
    try:
        return {part: [stamp(path) for path in paths] for part, paths in parts.items()}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read any more: {error}") from error


def refuse_options(folder: Path, kind: str, given: dict[str, Any]) -> None:
    """Refuse options that belong to another family of worlds.

    Raises:
        InputError: one of them is given.
    """
    wrong = [name for name, value in given.items() if value not in (None, False)]
    if wrong:
        raise InputError(f"{folder.name} is {kind} world, which has no {', no '.join(wrong)}")
