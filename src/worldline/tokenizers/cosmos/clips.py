"""uint8 clips of any size and length to latents or token ids, and back, in bounded memory.

What a tokenizer cannot take is padded, and cut off again after decoding. `reconstruct_windows` pads
and cuts as the released command-line tools do; every window is a clip of its own there, which
leaves a seam at its borders (nvidia-cosmos/cosmos-predict1 `tokenizer/inference/utils.py`,
`tokenizer/inference/video_lib.py`).
Axes: B batch, T frames, H/W pixels; t/h/w latent frames, rows, columns.
"""

from collections.abc import Iterable, Iterator
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.finite import check_finite, total
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.video.read import Frames


def encode_clip(model: CosmosTokenizer, pieces: Iterable[Frames]) -> tuple[Tensor, VideoShape]:
    """Encode a clip that is read piece by piece.

    Rows, columns and frames are padded by repeating the last one.

    Args:
        model: on its device.
        pieces: uint8 (T, H, W, 3) RGB, of any lengths, one frame or more in all.

    Returns:
        Latents (C, t, h, w) of a continuous tokenizer, not normalised, in the dtype of its weights,
        or token ids (t, h, w), int32, of a discrete one, on the CPU; and the size of the clip.

    """
    config, weight = model.config, model.quant_conv.weight
    shape = VideoShape(0, 0, 0)

    def videos() -> Iterator[Tensor]:
        nonlocal shape
        for piece in pieces:
            count, height, width = piece.shape[:3]
            shape = VideoShape(shape.frames + count, height, width)
            sides = ((0, 0), (0, -height % config.spatial), (0, -width % config.spatial), (0, 0))
            levels = torch.from_numpy(np.pad(piece, sides, mode="edge")).to(weight.device)
            video = _to_video(levels[None], weight)
            yield video
        missing = -(shape.frames - 1) % config.temporal
        yield video[:, :, -1:].expand(-1, -1, missing, -1, -1)

    parts = []
    for latents in encode_stream(model, videos()):
        check_finite(total(latents), "encode: latents", weight.dtype)
        parts.append((model.to_tokens(latents) if config.levels else latents).cpu())
    return torch.cat(parts, dim=-3)[0], shape


def decode_clip(
    model: CosmosTokenizer, stored: Tensor, shape: VideoShape | None = None
) -> Iterator[Frames]:
    """Frames uint8 (T, H, W, 3) of a clip, piece by piece, rounded.

    Args:
        model: on its device.
        stored: latents or token ids, as from `encode_clip`, which fit (see `check_stored`).
        shape: size of the clip, to which the video is cut; by default all of it.

    Raises:
        ValueError: latents that are not finite, or ids beyond the vocabulary.
    """
    config, latents = model.config, stored[None]
    if config.levels:
        if not 0 <= int(stored.min()) <= int(stored.max()) < config.vocabulary:
            raise ValueError(f"token ids outside 0 to {config.vocabulary - 1:,}")
        latents = model.to_codes(latents)
    elif not stored.isfinite().all():
        raise ValueError("latents that are not finite")
    whole = LatentShape(*stored.shape[-3:]).video(config.temporal, config.spatial)
    return _cut(decode_stream(model, latents), shape or whole)


def check_stored(config: CosmosTokenizerConfig, stored: Tensor, clip: VideoShape | None) -> None:
    """Refuse latents or token ids that are not of a tokenizer, by their dtype and shape.

    They may be on the meta device. `clip` is the size of what they were made from, if known.
    """
    channels, grid = [] if config.levels else [config.latent_channels], list(stored.shape[-3:])
    if clip is not None:
        sides = (ceil(side / config.spatial) for side in (clip.height, clip.width))
        grid = [1 + ceil((clip.frames - 1) / config.temporal), *sides]
    fits = list(stored.shape) == channels + grid and len(grid) == 3 and min(grid) > 0
    if not fits or stored.is_floating_point() == bool(config.levels):
        name = "token ids" if config.levels else "latents"
        raise ValueError(
            f"{name} {channels + grid} are needed, not {stored.dtype} {list(stored.shape)}"
        )


def _cut(pieces: Iterable[Tensor], shape: VideoShape) -> Iterator[Frames]:
    remaining = shape.frames
    for video in pieces:
        part = _to_levels(video[:, :, :remaining, : shape.height, : shape.width])[0]
        yield part.contiguous().cpu().numpy()
        remaining -= len(part)
        if remaining == 0:
            return


def _to_video(levels: Tensor, like: Tensor) -> Tensor:
    """Video (B, 3, T, H, W) in [-1, 1], in the dtype of `like`, of uint8 (B, T, H, W, 3)."""
    # float32: 255 levels need more than the 8 significant bits of bf16 while they are scaled
    return (levels.float() / 255 * 2 - 1).to(like.dtype).permute(0, 4, 1, 2, 3)


def _to_levels(video: Tensor) -> Tensor:
    """Inverse of `_to_video`: clamped, rounded; `NonFiniteError` for NaN and infinity."""
    check_finite(total(video), "decode: frames", video.dtype)
    # float32: 255 levels need more than the 8 significant bits of bf16
    levels = ((video.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5).floor().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1)


def pad(frames: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad `frames` (B, T, H, W, 3), any dtype, to 1 + 8k frames and sides that are multiples of 16.

    The released tools align to these whatever the tokenizer's own compression is. Rows and columns
    are black, half on each side; frames are copies of the first and the last, half (rounded down)
    in front.

    Returns:
        The frames, and where the originals lie: first frame, row, column, and their ends.
    """
    _, count, height, width, _ = frames.shape
    extra_frames, extra_rows, extra_columns = -(count - 1) % 8, -height % 16, -width % 16
    front, top, left = extra_frames // 2, extra_rows // 2, extra_columns // 2
    frames = F.pad(frames, (0, 0, left, extra_columns - left, top, extra_rows - top))
    order = torch.arange(-front, count + extra_frames - front).clamp(0, count - 1)
    frames = frames[:, order.to(frames.device)]
    return frames, (front, top, left, front + count, top + height, left + width)


@torch.no_grad()
def reconstruct_windows(model: CosmosTokenizer, frames: Tensor, window: int) -> Tensor:
    """`frames` (B, T, H, W, 3), uint8, of any number and size, after encoding and decoding.

    `window` of them are coded together.
    """
    weight = model.quant_conv.weight
    parts = []
    for start in range(0, frames.shape[1], window):
        padded, (t0, y0, x0, t1, y1, x1) = pad(frames[:, start : start + window])
        levels = _to_levels(model.reconstruct(_to_video(padded.to(weight.device), weight)))
        parts.append(levels[:, t0:t1, y0:y1, x0:x1])
    return torch.cat(parts, dim=1)
