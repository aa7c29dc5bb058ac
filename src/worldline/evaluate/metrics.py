"""Fidelity of a clip to another, and how much it moves and flickers.

Frames are uint8 (T, H, W, 3), as arrays or tensors, or ValueError; a single frame (H, W, 3) is a
clip of one.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8] | Tensor
PEAK = 255.0

# Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP
# 13(4), 2004: side and sigma of the window, and the constants that keep flat regions finite.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_CONSTANTS = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)
_BAND = 16  # rows that are worked on at a time: most of the time goes into memory


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB: `decibels` of `mse`."""
    return decibels(mse(frames, reference))


def decibels(error: float) -> float:
    """PSNR of a mean squared error; `inf` for 0."""
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def mse(frames: Frames, reference: Frames) -> float:
    """Mean squared error over all frames, in square grey levels."""
    first, second = _as_pair(frames, reference)
    pairs = zip(first, second, strict=True)
    # whole numbers, so nothing is rounded
    return sum(int((x.int() - y.int()).square().sum()) for x, y in pairs) / first.numel()


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity, mean over frames, channels and places of an 11 x 11 Gaussian window.

    At most 1, for equal clips.
    """
    first, second = _as_pair(frames, reference)
    height, width = first.shape[1:3]
    rows, columns = height - SSIM_WINDOW + 1, width - SSIM_WINDOW + 1
    if min(rows, columns) < 1:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, not {height} x {width}")
    total = 0.0
    for x, y in zip(first, second, strict=True):
        for top in range(0, rows, _BAND):
            band = slice(top, top + _BAND + SSIM_WINDOW - 1)
            total += _ssim_sum(x[band], y[band])
    return total / (3 * rows * columns * len(first))


def motion(frames: Frames) -> float:
    """Mean absolute change from one frame to the next, in grey levels: 0 for a still video."""
    return _mean_change(as_clip(frames), 1)


def flicker(frames: Frames) -> float:
    """Mean absolute second difference in time, halved, in grey levels.

    A picture that alternates by `a` levels flickers by `a`; one that brightens steadily, or stands
    still, by 0. Whatever moves also flickers a little: compare with a true clip.
    """
    return _mean_change(as_clip(frames), 2) / 2


def _mean_change(clip: Tensor, order: int) -> float:
    """Mean size of the differences in time of an order; 0 for a clip too short for one."""
    # whole numbers, so nothing is rounded
    bands = (band.short().diff(n=order, dim=0) for band in clip.split(_BAND, dim=1))
    return sum(int(band.abs().sum()) for band in bands) / max(1, clip[order:].numel())


def as_clip(frames: Frames) -> Tensor:
    """Frames as a tensor (T, H, W, 3)."""
    clip = torch.as_tensor(frames)
    if clip.ndim == 3:
        clip = clip[None]
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.numel():
        raise ValueError(f"frames are uint8 (T, H, W, 3), not {clip.dtype} {tuple(clip.shape)}")
    return clip


def _as_pair(frames: Frames, reference: Frames) -> tuple[Tensor, Tensor]:
    first, second = as_clip(frames), as_clip(reference)
    if first.shape != second.shape:
        raise ValueError(f"clips need one shape, not {first.shape} and {second.shape}")
    return first, second.to(first.device)


def _ssim_sum(first: Tensor, second: Tensor) -> float:
    """Sum of the SSIM of all places of the window and of the channels in uint8 (h, W, 3)."""
    pair = torch.stack([first, second]).permute(0, 3, 1, 2).double()  # variances cancel
    small, large = SSIM_CONSTANTS
    mean, power, product = map(_smooth, (pair, pair.square(), pair.prod(0)))
    variances = (power - mean.square()).sum(0)
    luminance = (2 * mean.prod(0) + small) / (mean.square().sum(0) + small)
    structure = (2 * (product - mean.prod(0)) + large) / (variances + large)
    return float((luminance * structure).sum())


def _smooth(value: Tensor) -> Tensor:
    """Gaussian mean of (..., H, W) at each place of the window: (..., H - 10, W - 10)."""
    weights = torch.signal.windows.gaussian(SSIM_WINDOW, std=SSIM_SIGMA, dtype=torch.float64)
    # Shifted sums: a convolution in float64 first copies each pixel eleven times.
    for dim in (-2, -1):
        size = value.shape[dim] - SSIM_WINDOW + 1
        result = torch.zeros_like(value.narrow(dim, 0, size))
        for place, weight in enumerate((weights / weights.sum()).tolist()):
            result.add_(value.narrow(dim, place, size), alpha=weight)
        value = result
    return value
