"""Several files as one, or one under other names, without touching tensor data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from worldline.errors import CheckpointError
from worldline.weights.read import Checkpoint, Entry


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """Return `checkpoint` with every name passed through `rename`; None leaves a tensor out."""
    entries = {
        new: entry for old, entry in checkpoint.entries.items() if (new := rename(old)) is not None
    }
    return replace(checkpoint, entries=entries)


def joined(checkpoints: Sequence[Checkpoint], path: Path) -> Checkpoint:
    """Return the tensors of all `checkpoints` as one; `path` stands for the whole in messages.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    entries: dict[str, Entry] = {}
    for checkpoint in checkpoints:
        twice = entries.keys() & checkpoint.entries.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)} is in more than one of its files")
        entries.update(checkpoint.entries)
    return replace(checkpoints[0], path=path, entries=entries)
