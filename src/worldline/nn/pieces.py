"""A clip of any length through a causal video tokenizer piece by piece, as if it were whole.

A network qualifies if each of its layers that looks back keeps in a `Past` what it needs of the
frames before, and none looks ahead: the pieces are then exactly what the whole would be, with no
seam, and nothing is computed twice.
Axes: B batch, C channels, T/H/W frames, rows, columns; t/h/w those of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Past:
    """What a network remembers of the frames before a piece of a clip; new for each clip.

    Attributes:
        begun: a piece has passed; until then the layers start a clip.
        kept: layer -> its last input frames, or the keys and values of all frames.
    """

    def __init__(self) -> None:
        self.begun = False
        self.kept: dict[nn.Module, Tensor] = {}


def starts(past: Past | None) -> bool:
    """Tell whether a piece is the first of its clip."""
    return past is None or not past.begun


class CausalTokenizer(Protocol):
    """What the functions below ask of a tokenizer."""

    @property
    def config(self) -> Any: ...  # its `temporal` is the number of frames of a latent frame

    def encode(self, video: Tensor, past: Past | None = None) -> Tensor: ...

    def decode(self, latents: Tensor, past: Past | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def encode_pieces(model: CausalTokenizer, frames: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Yield latents (B, C, t, h, w), piece by piece, of a clip that arrives piece by piece.

    Args:
        model: on its device.
        frames: pieces (B, 3, T, H, W) in [-1, 1], on the device and in the dtype of the weights, of
            any lengths; 1 + temporal*k frames in all.
        chunk: latent frames that are computed at once, 1 or more.

    Raises:
        ValueError: the frames do not add up to 1 + temporal*k, a side is no multiple of the
            compression, or `chunk` is below 1.
    """
    _check(chunk)
    return _encode(model, frames, chunk)


def decode_pieces(model: CausalTokenizer, latents: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield the video (B, 3, T, H, W), about [-1, 1] and not clamped, piece by piece.

    Args:
        model: on its device.
        latents: (B, C, t, h, w), or codes of a discrete tokenizer; any device and float dtype.
        chunk: latent frames that are computed at once, 1 or more.

    Raises:
        ValueError: `chunk` is below 1.
    """
    _check(chunk)
    return _decode(model, latents, chunk)


def _check(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more")


@torch.no_grad()
def _encode(model: CausalTokenizer, frames: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    temporal = model.config.temporal
    past = Past()
    waiting: list[Tensor] = []
    count, total = 0, 0
    for piece in frames:
        waiting.append(piece)
        count += piece.shape[2]
        total += piece.shape[2]
        wanted = temporal * chunk - (0 if past.begun else temporal - 1)
        while count >= wanted:
            joined = torch.cat(waiting, dim=2)
            yield model.encode(joined[:, :, :wanted], past)
            waiting, count = [joined[:, :, wanted:]], count - wanted
            wanted = temporal * chunk
    if (total - 1) % temporal:
        raise ValueError(f"{total} frames: a clip must have 1 + {temporal}k frames")
    if count:
        yield model.encode(torch.cat(waiting, dim=2), past)


@torch.no_grad()
def _decode(model: CausalTokenizer, latents: Tensor, chunk: int) -> Iterator[Tensor]:
    weight = next(model.parameters())
    past = Past()
    for piece in latents.split(chunk, dim=2):
        yield model.decode(piece.to(weight.device, weight.dtype), past)
