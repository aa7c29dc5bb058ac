"""Networks that transformers builds, read from a local folder; strict, and nothing is executed."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from worldline.errors import CheckpointError
from worldline.files import unfinished


def pretrained(
    kind: Any, folder: Path, dtype: torch.dtype, unused: Collection[str] = (), **options: Any
) -> Any:
    """Return a network of transformers for inference, on the CPU.

    Args:
        kind: a class with `from_pretrained`.
        folder: config.json and safetensors.
        dtype: of the weights.
        unused: patterns of tensors in the file that this network has no place for.
        options: passed on to `from_pretrained`.

    Raises:
        CheckpointError: the folder is absent or incomplete, or its tensors are not the network's.
    """
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # a pickle is never opened
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}{unfinished(folder)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # transformers only warns of these and draws the weights at random
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(str(each) for each in found["mismatched_keys"]),
        "unknown": sorted(
            name
            for name in found["unexpected_keys"]
            if not any(fnmatchcase(name, pattern) for pattern in unused)
        ),
    }
    problems = [f"{what}: {', '.join(names[:3])}" for what, names in wrong.items() if names]
    if problems:
        raise CheckpointError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}")
    return network.requires_grad_(False).eval()
