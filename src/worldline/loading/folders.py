"""What the folders of a world tell before a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from worldline.catalog import BUNDLED_PREFIX
from worldline.errors import CheckpointError, InputError
from worldline.files import stamp
from worldline.models.predict1_dit.weights import is_decoder
from worldline.weights.source import Checkpoint


def world_name(name: str, *, bundled: bool) -> str:
    """Return the name that a world is asked for by, of its own or that of its folder."""
    return f"{BUNDLED_PREFIX if bundled else ''}{name}"


def refuse_decoder(folder: Path, source: Checkpoint) -> None:
    """Refuse the diffusion decoder of autoregressive worlds where a world is asked for.

    Raises:
        CheckpointError: it is one.
    """
    if is_decoder(source.tensors):
        raise CheckpointError(
            f"{folder} is the diffusion decoder of the autoregressive worlds, not a world: "
            "worldline autoregressive runs it with them"
        )


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
