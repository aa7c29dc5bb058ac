"""Clips of any length through the Wan tokenizer, see `worldline.nn.pieces`.

Nothing looks further back than two frames of its own level, so that memory is that of one piece,
whatever the length of the clip.
Axes: B batch, C channels, T/H/W frames, rows, columns; t/h/w those of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from worldline.nn.pieces import decode_pieces, encode_pieces
from worldline.tokenizers.wan.model import WanTokenizer

CHUNK = 1  # latent frames at once: 4 frames; two are 6 % faster in 1.6 times the memory


def encode_stream(
    model: WanTokenizer, frames: Iterable[Tensor], *, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Yield latents (B, C, t, h, w) of a clip that arrives in pieces; see `encode_pieces`."""
    return encode_pieces(model, frames, chunk)


def decode_stream(model: WanTokenizer, latents: Tensor, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Yield the video (B, 3, T, H, W) in pieces; see `decode_pieces`."""
    return decode_pieces(model, latents, chunk)
