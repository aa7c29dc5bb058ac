"""Long clips window by window: how the ids are cut, and how the windows' frames are joined.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/diffusion_decoder/utils.py`.
Axes: B batch, C channels, T frames, H/W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split_windows(frames: Tensor, size: int, overlap: int) -> list[Tensor]:
    """Cut (B, T, ...) into windows of `size` frames that overlap; the last is filled by reflection.

    Windows begin every `size - overlap` frames while more than `overlap` frames are left.

    Raises:
        ValueError: the numbers make no windows.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"windows of {size} frames cannot overlap by {overlap}")
    length = frames.shape[1]
    starts = range(0, max(1, length - overlap), size - overlap)
    windows = []
    for start in starts:
        order = [reflected(at, length - start) for at in range(size)]
        windows.append(frames[:, [start + at for at in order]])
    return windows


def reflected(index: int, length: int) -> int:
    """Return where `index` lies in 0 to length - 1 when the ends are mirrors: 0 1 2 1 0 1, …."""
    period = max(1, 2 * (length - 1))
    index %= period
    return index if index < length else period - index


def blend_windows(windows: Sequence[Tensor], overlap: int) -> Tensor:
    """Join (B, C, T, H, W) windows; each overlap fades linearly from the earlier to the later.

    The weights of the later window run from 0 to 1, both ends included, so an overlap of one frame
    takes the earlier window's.

    Raises:
        ValueError: a window is shorter than the overlap.
    """
    joined = windows[0]
    for window in windows[1:]:
        if overlap > min(joined.shape[2], window.shape[2]) or overlap < 0:
            raise ValueError(f"windows of {window.shape[2]} frames cannot overlap by {overlap}")
        if overlap == 0:
            joined = torch.cat([joined, window], dim=2)
            continue
        weight = torch.linspace(0, 1, overlap, device=window.device, dtype=window.dtype)
        weight = weight.view(1, 1, -1, 1, 1)
        seam = joined[:, :, -overlap:] * (1 - weight) + window[:, :, :overlap] * weight
        joined = torch.cat([joined[:, :, :-overlap], seam, window[:, :, overlap:]], dim=2)
    return joined
