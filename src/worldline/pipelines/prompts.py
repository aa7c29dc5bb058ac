"""Embeddings that a caller gives in place of prompts, as a world takes them."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import InputError
from worldline.text import embeddings
from worldline.text.embeddings import padded

logger = logging.getLogger(__name__)

GivenEmbedding = str | Path | Tensor | NDArray[Any]
TRUNCATION = "prompt_truncation"  # fact of a recorder, and entry of a report


def read_prompt_embedding(given: GivenEmbedding | None, rows: int, width: int) -> Tensor | None:
    """Return the embedding of a prompt that a caller gives, checked, float32 (1, rows, width).

    Args:
        given: (S, E) or (1, S, E), or a file of it: see `worldline.text.embeddings`. Rows that are
            missing are zeros, as those behind the end of a prompt are. None for none.
        rows: that the world takes.
        width: E.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    if given is None:
        return None
    found = read_both(given)
    if "negative_prompt" in found:
        _tell_unread(str(given))
    tensor, called = found["prompt"]
    return filled(tensor, rows, width, called)


@cache  # once a file, for however many clips it is read
def _tell_unread(path: str) -> None:
    logger.warning("%s: no effect on an autoregressive model: negative_prompt", path)


def read_both(
    prompt: GivenEmbedding | None, negative: GivenEmbedding | None = None
) -> dict[str, tuple[Tensor, str]]:
    """Return the embeddings that a caller gives: "prompt" and "negative_prompt", as far as given.

    Each comes with what an error calls it.

    Args:
        prompt: a tensor, or a file of it and perhaps of the negative prompt's: see
            `worldline.text.embeddings.read_embeddings`.
        negative: likewise, of the negative prompt.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    for name, given in (("negative_prompt", negative), ("prompt", prompt)):
        if given is None:
            continue
        if isinstance(given, (str, Path)):
            read = embeddings.read_embeddings(Path(given))
            if name == "negative_prompt":  # a file of its own may call it "prompt" all the same
                read = {name: read.get(name, read["prompt"])}
            called = f"{name}_embeddings {given}"
            found = {**{kind: (tensor, called) for kind, tensor in read.items()}, **found}
        elif isinstance(given, (Tensor, np.ndarray)):
            found[name] = (torch.as_tensor(given), f"{name}_embeddings")
        else:
            raise InputError(
                f"{name}_embeddings is a {type(given).__name__}; give a file or tensor"
            )
    return found


def filled(given: Tensor, rows: int, width: int, name: str) -> Tensor:
    """Return an embedding with as many rows as a world takes, float32 (1, rows, width), on the CPU.

    Raises:
        InputError: it is not floating and finite, or of another shape.
    """
    flat = given[0] if given.ndim == 3 and len(given) == 1 else given
    fits = flat.ndim == 2 and 1 <= len(flat) <= rows and flat.shape[1] == width
    if not fits or not flat.is_floating_point() or not flat.isfinite().all():
        raise InputError(
            f"{name} is {str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}; it must be "
            f"floating and finite, (S, {width}) or (1, S, {width}) with S up to {rows}"
        )
    return padded(flat.detach().float().cpu(), rows)
