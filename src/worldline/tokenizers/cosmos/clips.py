"""uint8 clips of any size and length to latents or token ids, and back, in bounded memory.

What a tokenizer cannot take is padded: rows and columns by repeating the last one, frames by
repeating the last one, so that a crop of the decoded video gives back the clip's own size.
Axes: T frames, H/W pixels; t/h/w latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.stream import decode_stream, encode_stream

Frames = NDArray[np.uint8]


def encode_clip(model: CosmosTokenizer, pieces: Iterable[Frames]) -> tuple[Tensor, VideoShape]:
    """Encode a clip that is read piece by piece.

    Args:
        model: on its device.
        pieces: uint8 (T, H, W, 3) RGB, of any lengths, one frame or more in all.

    Returns:
        On the CPU, of a continuous tokenizer the latents (C, t, h, w) in the dtype of its weights,
        not normalised; of a discrete one the token ids (t, h, w), int32. And the clip's own size.
    """
    counted = _Counted(pieces)
    parts = []
    for latents in encode_stream(model, _prepared(model, counted)):
        part = latents if model.config.levels is None else model.to_tokens(latents)
        parts.append(part.cpu())
    return torch.cat(parts, dim=-3)[0], counted.shape


class _Counted:
    """Passes pieces on and remembers how much went by."""

    def __init__(self, pieces: Iterable[Frames]) -> None:
        self.pieces = pieces
        self.shape = VideoShape(0, 0, 0)

    def __iter__(self) -> Iterator[Frames]:
        for piece in self.pieces:
            frames, height, width = piece.shape[:3]
            self.shape = VideoShape(self.shape.frames + frames, height, width)
            yield piece


def _prepared(model: CosmosTokenizer, counted: _Counted) -> Iterator[Tensor]:
    """As the network takes them: (1, 3, T, H, W) in [-1, 1], padded."""
    weight, config = model.quant_conv.weight, model.config
    video: Tensor | None = None
    for piece in counted:
        height, width = counted.shape.height, counted.shape.width
        rows = torch.arange(height + -height % config.spatial).clamp(max=height - 1)
        columns = torch.arange(width + -width % config.spatial).clamp(max=width - 1)
        levels = torch.from_numpy(piece).to(weight.device)
        levels = levels[:, rows.to(weight.device)][:, :, columns.to(weight.device)]
        # float32: 255 levels need more than the 8 significant bits of bf16 while they are scaled
        video = (levels.float() / 255 * 2 - 1).to(weight.dtype).permute(3, 0, 1, 2)[None]
        yield video
    if video is None:
        raise ValueError("a clip needs at least one frame")
    missing = -(counted.shape.frames - 1) % config.temporal
    if missing:
        yield video[:, :, -1:].expand(-1, -1, missing, -1, -1)


def decode_clip(
    model: CosmosTokenizer, stored: Tensor, shape: VideoShape | None = None
) -> Iterator[Frames]:
    """Yield a clip, piece by piece: uint8 (T, H, W, 3), rounded.

    Args:
        model: on its device.
        stored: what `encode_clip` returned.
        shape: the clip's own size, to which the video is cut; absent, all of it.

    Raises:
        ValueError: `stored` is not of such a tokenizer or not finite, or `shape` is larger than its
            video.
    """
    config = model.config
    discrete = config.levels is not None
    if stored.is_floating_point() == discrete or stored.dim() != (3 if discrete else 4):
        wanted = "token ids (t, h, w)" if discrete else "latents (C, t, h, w)"
        raise ValueError(f"{stored.dtype} {list(stored.shape)}; {wanted} are needed")
    if not discrete and stored.shape[0] != config.latent_channels:
        raise ValueError(f"latents of {stored.shape[0]} channels, not {config.latent_channels}")
    if not discrete and not bool(stored.isfinite().all()):
        raise ValueError("latents that are not finite")
    if discrete and (int(stored.min()) < 0 or int(stored.max()) >= config.vocabulary):
        raise ValueError(f"token ids outside 0 to {config.vocabulary - 1:,}")
    whole = LatentShape(*stored.shape[-3:]).video(config.temporal, config.spatial)
    shape = shape or whole
    pairs = zip(astuple(shape), astuple(whole), strict=True)
    if not all(0 < wanted <= have for wanted, have in pairs):
        raise ValueError(f"a clip of {shape} cannot be cut from {whole}")
    latents = model.to_codes(stored[None]) if discrete else stored[None]
    return _cut(decode_stream(model, latents), shape)


def _cut(pieces: Iterable[Tensor], shape: VideoShape) -> Iterator[Frames]:
    left = shape.frames
    for video in pieces:
        part = video[0, :, :left, : shape.height, : shape.width]
        # float32: 255 levels need more than the 8 significant bits of bf16
        levels = ((part.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5).floor().to(torch.uint8)
        yield levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
        left -= part.shape[1]
        if left == 0:
            return
