"""A clip of any size through a tokenizer, window by window, each padded to what the network takes.

This is how the released command-line tools reconstruct videos; every window is coded on its own,
which leaves a seam at its borders. Source: nvidia-cosmos/cosmos-predict1
`tokenizer/inference/utils.py`, `tokenizer/inference/video_lib.py`.
Axes: B batch, T frames, H/W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.tokenizers.cosmos.model import CosmosTokenizer

# the released tools align to these whatever the tokenizer's own compression is
_SPATIAL_ALIGNMENT = 16
_TEMPORAL_ALIGNMENT = 8


class Crop(NamedTuple):
    """Where the original lies in its padded form: first frame, row, column, and the ends."""

    frame: int
    row: int
    column: int
    frame_end: int
    row_end: int
    column_end: int


def pad(frames: Tensor) -> tuple[Tensor, Crop]:
    """Pad `frames` (B, T, H, W, 3), any dtype, to 1 + 8k frames and sides that are multiples of 16.

    Rows and columns are black, half on each side; frames are copies of the first and the last, half
    (rounded down) in front.
    """
    _, count, height, width, _ = frames.shape
    extra_rows = -height % _SPATIAL_ALIGNMENT
    extra_columns = -width % _SPATIAL_ALIGNMENT
    extra_frames = -(count - 1) % _TEMPORAL_ALIGNMENT
    front, top, left = extra_frames // 2, extra_rows // 2, extra_columns // 2
    frames = F.pad(frames, (0, 0, left, extra_columns - left, top, extra_rows - top))
    order = torch.arange(-front, count + extra_frames - front).clamp(0, count - 1)
    frames = frames[:, order.to(frames.device)]
    return frames, Crop(front, top, left, front + count, top + height, left + width)


def crop(frames: Tensor, place: Crop) -> Tensor:
    """Undo `pad`."""
    return frames[
        :,
        place.frame : place.frame_end,
        place.row : place.row_end,
        place.column : place.column_end,
    ]


@torch.no_grad()
def reconstruct_windows(model: CosmosTokenizer, frames: Tensor, window: int) -> Tensor:
    """Return `frames` (B, T, H, W, 3), uint8, after encoding and decoding, of the same size.

    Args:
        model: on its device.
        frames: any number of frames and any size.
        window: frames that are coded together.

    Raises:
        ValueError: `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more")
    weight = model.quant_conv.weight
    parts = []
    for start in range(0, frames.shape[1], window):
        padded, place = pad(frames[:, start : start + window])
        video = padded.to(weight.device).float() / 255 * 2 - 1
        decoded = model.reconstruct(video.permute(0, 4, 1, 2, 3).to(weight.dtype))
        levels = (decoded.float().clamp(-1, 1) + 1) / 2 * 255
        parts.append(crop((levels + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 4, 1), place))
    return torch.cat(parts, dim=1)
