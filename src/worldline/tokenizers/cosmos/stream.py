"""A clip of any length through a tokenizer piece by piece, as if it were whole.

Every layer is causal, and norms look at one frame, so that the pieces are exactly what the whole
would be: there is no seam, and no overlap is computed twice. Memory is that of one piece, and the
keys and values of the temporal attention, which do look at every latent frame before: at
704 x 1280 these are 29 MB (bf16) for each 8 frames.
Axes: B batch, C channels, T/H/W frames, rows, columns; t/h/w those of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from worldline.tokenizers.cosmos.model import CosmosTokenizer, Past

CHUNK = 4  # latent frames at once; at 704 x 1280 5 % slower than the whole, in about 3 GB


def encode_stream(
    model: CosmosTokenizer, frames: Iterable[Tensor], *, chunk: int = CHUNK
) -> Iterator[Tensor]:
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
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more")
    return _encode(model, frames, chunk)


@torch.no_grad()
def _encode(model: CosmosTokenizer, frames: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
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


def decode_stream(
    model: CosmosTokenizer, latents: Tensor, *, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Yield the video (B, 3, T, H, W), about [-1, 1] and not clamped, piece by piece.

    Args:
        model: on its device.
        latents: (B, C, t, h, w), or codes of a discrete tokenizer; any device and float dtype.
        chunk: latent frames that are computed at once, 1 or more.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more")
    return _decode(model, latents, chunk)


@torch.no_grad()
def _decode(model: CosmosTokenizer, latents: Tensor, chunk: int) -> Iterator[Tensor]:
    weight = model.post_quant_conv.weight
    past = Past()
    for piece in latents.split(chunk, dim=2):
        yield model.decode(piece.to(weight.device, weight.dtype), past)
