"""Networks read from a local file or folder; strict, and nothing in it is executed."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldline.errors import CheckpointError
from worldline.files import unfinished
from worldline.weights.keymap import KeyMap
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into


def pretrained(kind: Any, folder: Path, dtype: torch.dtype, unused: Collection[str] = ()) -> Any:
    """Return a network of transformers for inference, on the CPU.

    Args:
        kind: a class with `from_pretrained`.
        folder: config.json and safetensors.
        dtype: of the weights.
        unused: patterns of tensors in the file that this network has no place for.

    Raises:
        CheckpointError: the folder is absent or incomplete, or its tensors are not the network's.
    """
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        network, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # a pickle is never opened
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named; none is accepted
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}{unfinished(folder)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    # transformers would draw such weights at random
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


def pretrained_tokenizer(folder: Path, *, chat: bool = True) -> Any:
    """Return a tokenizer of transformers.

    Args:
        folder: of its files.
        chat: it must know how a conversation is written.

    Raises:
        CheckpointError: a file is absent or damaged, or there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the packages raise plain Exception for a damaged file
        told = f"{type(error).__name__}: {error}".splitlines()[0]  # of a page of advice
        raise CheckpointError(
            f"{folder} holds no tokenizer ({told}){unfinished(folder)}"
        ) from error
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{folder} holds no chat template (chat_template.jinja)")
    return tokenizer


def fill(network: nn.Module, path: Path, keys: KeyMap, device: torch.device | str) -> None:
    """Give a network of our own the weights of a file, in float32, for inference.

    Args:
        network: built under `torch.device("meta")`.
        path: the file.
        keys: from its names to ours.
        device: where the weights go.

    Raises:
        CheckpointError: it is absent, damaged or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{unfinished(path.parent)}")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # counted in training alone, and absent from files of old torch
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    counts = ("*.num_batches_tracked",)
    checkpoint = open_checkpoint(path)
    load_into(network, checkpoint, keys, device=device, dtype=torch.float32, optional=counts)
    network.requires_grad_(False).eval()
