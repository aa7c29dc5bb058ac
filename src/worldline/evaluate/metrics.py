"""How close two clips are, and how much one moves and flickers.

Frames are uint8 (T, H, W, 3), as arrays or tensors; a lone frame (H, W, 3) counts as a clip of one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldline.evaluate.tasks import SSIM_WINDOW

Frames = NDArray[np.uint8] | Tensor
PEAK = 255.0

# Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP
# 13(4), 2004, as SSIM_WINDOW: the window's width, and the two constants that keep flat regions
# finite.
SSIM_SIGMA = 1.5
SSIM_BAND = 16  # rows that are worked on at a time
SSIM_CONSTANTS = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)


def psnr(
    frames: Frames, reference: Frames, mask: NDArray[np.bool_] | Tensor | None = None
) -> float:
    """Peak signal-to-noise ratio of a clip in dB, its squared error pooled over all frames.

    Args:
        frames: uint8 (T, H, W, 3).
        reference: the same shape.
        mask: bool (T, H, W) or (H, W); only True pixels count.

    Returns:
        dB; `inf` where nothing differs, `nan` where the mask is empty.

    Raises:
        ValueError: shapes differ, or the dtype is not uint8.
    """
    error, weight = _squared_error(frames, reference, mask)
    return _decibels(float(error.sum()), float(weight.sum()))


def psnr_per_frame(
    frames: Frames, reference: Frames, mask: NDArray[np.bool_] | Tensor | None = None
) -> list[float]:
    """Give `psnr` of each frame by itself; arguments and errors are the same."""
    error, weight = _squared_error(frames, reference, mask)
    return [_decibels(*pair) for pair in zip(error.tolist(), weight.tolist(), strict=True)]


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity with an 11 x 11 Gaussian window, mean over channels and frames.

    The window stays inside the picture, so a border of 5 pixels has no value of its own.

    Args:
        frames: uint8 (T, H, W, 3), at least 11 x 11.
        reference: the same shape.

    Returns:
        At most 1, which only equal clips reach.

    Raises:
        ValueError: shapes differ, the dtype is not uint8, or the window does not fit.
    """
    values = ssim_per_frame(frames, reference)
    return sum(values) / len(values)


def ssim_per_frame(frames: Frames, reference: Frames) -> list[float]:
    """Give `ssim` of each frame by itself; arguments and errors are the same."""
    first, second = _as_pair(frames, reference)
    if min(first.shape[1:3]) < SSIM_WINDOW:
        height, width = first.shape[1:3]
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
            f"not {height} x {width}"
        )
    # One frame at a time: five filtered copies of a 33-frame 640 x 1024 clip would take 2.6 GB.
    return [_ssim_of_frame(x, y) for x, y in zip(first, second, strict=True)]


class ChangeMeter:
    """`motion` and `flicker` of a clip that comes one frame at a time; two frames are held."""

    def __init__(self) -> None:
        self._frame: Tensor | None = None
        self._change: Tensor | None = None
        self._motions: list[float] = []
        self._flickers: list[float] = []

    def add(self, frame: Frames) -> None:
        """Take the next frame, uint8 (H, W, 3), of the same size as the others."""
        now = _as_clip(frame)[0].float()
        if self._frame is not None:
            change = now - self._frame
            self._motions.append(float(change.abs().mean()))
            if self._change is not None:
                self._flickers.append(float((change - self._change).abs().mean()) / 2)
            self._change = change
        self._frame = now

    @property
    def motion(self) -> float:
        """Of the frames so far; 0 of fewer than two."""
        return sum(self._motions) / max(1, len(self._motions))

    @property
    def flicker(self) -> float:
        """Of the frames so far; 0 of fewer than three."""
        return sum(self._flickers) / max(1, len(self._flickers))


class FidelityMeter:
    """`psnr` and `ssim` of two clips that come one frame at a time.

    Attributes:
        frames: how many were compared.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._error = 0.0
        self._weight = 0.0
        self._ssim = 0.0

    def add(self, frame: Frames, reference: Frames) -> None:
        """Take a frame of each, uint8 (H, W, 3); errors are those of `ssim`."""
        error, weight = _squared_error(frame, reference, None)
        self._error += float(error.sum())
        self._weight += float(weight.sum())
        self._ssim += sum(ssim_per_frame(frame, reference))
        self.frames += 1

    @property
    def psnr(self) -> float:
        """Of the frames so far, in dB; `inf` where nothing differs, `nan` of none."""
        return _decibels(self._error, self._weight)

    @property
    def ssim(self) -> float:
        """Of the frames so far; `nan` of none."""
        return self._ssim / self.frames if self.frames else math.nan


def motion(frames: Frames) -> float:
    """Mean absolute change from one frame to the next, in grey levels: 0 for a still video."""
    return _changes(frames).motion


def flicker(frames: Frames) -> float:
    """Mean absolute second difference in time, halved, in grey levels.

    A picture that jumps forth and back by `a` levels flickers by `a`; one that brightens steadily,
    or stands still, by 0. Compare it with a true clip's: whatever moves also flickers a little.
    """
    return _changes(frames).flicker


def _changes(frames: Frames) -> ChangeMeter:
    meter = ChangeMeter()
    for frame in _as_clip(frames):
        meter.add(frame)
    return meter


def _as_clip(frames: Frames) -> Tensor:
    clip = frames if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
    if clip.ndim == 3:
        clip = clip[None]
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.numel():
        raise ValueError(
            f"frames are uint8 (T, H, W, 3), not {str(clip.dtype).removeprefix('torch.')} "
            f"{tuple(clip.shape)}"
        )
    return clip


def _as_pair(frames: Frames, reference: Frames) -> tuple[Tensor, Tensor]:
    first, second = _as_clip(frames), _as_clip(reference)
    if first.shape != second.shape:
        raise ValueError(
            f"clips to compare need one shape, not {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second.to(first.device)


def _squared_error(
    frames: Frames, reference: Frames, mask: NDArray[np.bool_] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of squared differences, and the number of values that entered: two float64 (T,)."""
    first, second = _as_pair(frames, reference)
    shape = first.shape[:3]
    if mask is None:
        chosen = torch.ones((), dtype=torch.bool, device=first.device).expand(shape)
    else:
        given = mask if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(mask))
        if given.dtype != torch.bool or tuple(given.shape) not in (tuple(shape), tuple(shape[1:])):
            raise ValueError(
                f"the mask is bool {tuple(shape)} or {tuple(shape[1:])}, not "
                f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            )
        chosen = given.to(first.device).expand(shape)
    errors, weights = [], []
    for x, y, inside in zip(first, second, chosen, strict=True):
        square = (
            (x.int() - y.int()).square().sum(-1)
        )  # (H, W); whole numbers, so nothing is rounded
        errors.append(float(square[inside].sum()))
        weights.append(float(inside.sum()) * 3)
    return torch.tensor(errors, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def _decibels(error: float, count: float) -> float:
    if count == 0:
        return math.nan
    if error == 0:
        return math.inf
    return 10 * math.log10(PEAK**2 * count / error)


def _ssim_of_frame(first: Tensor, second: Tensor) -> float:
    """SSIM of two uint8 (H, W, 3) pictures."""
    rows = len(first) - SSIM_WINDOW + 1
    total = 0.0
    # In bands that stay in the cache, since most of the time goes into memory.
    for top in range(0, rows, SSIM_BAND):
        end = min(top + SSIM_BAND, rows) + SSIM_WINDOW - 1
        total += _ssim_sum(first[top:end], second[top:end])
    return total / (3 * rows * (first.shape[1] - SSIM_WINDOW + 1))


def _ssim_sum(first: Tensor, second: Tensor) -> float:
    """Sum the SSIM of all places of the window, and of the channels, in uint8 (h, W, 3)."""
    x, y = (picture.permute(2, 0, 1).double() for picture in (first, second))  # variances cancel
    mean_x, mean_y, square_x, square_y, product = _smooth(torch.stack([x, y, x * x, y * y, x * y]))
    small, large = SSIM_CONSTANTS
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x**2 + square_y - mean_y**2
    luminance = (2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    structure = (2 * covariance + large) / (variances + large)
    return float((luminance * structure).sum())


def _smooth(value: Tensor) -> Tensor:
    """Weigh (..., H, W) by the Gaussian window, where it fits: (..., H - 10, W - 10)."""
    weights = [
        math.exp(-((place - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
        for place in range(SSIM_WINDOW)
    ]
    total = sum(weights)
    # Shifted sums: a convolution in float64 first copies each pixel eleven times.
    for dim in (-2, -1):
        size = value.shape[dim] - SSIM_WINDOW + 1
        result = torch.zeros_like(value.narrow(dim, 0, size))
        for place, weight in enumerate(weights):
            result.add_(value.narrow(dim, place, size), alpha=weight / total)
        value = result
    return value
