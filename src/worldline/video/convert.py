"""uint8 frames to the float range of the networks and back: resize, crop, pad, and only here.

Source: nvidia-cosmos/cosmos-predict1 `cosmos_predict1/autoregressive/utils/inference.py`
(`load_vision_input`, `resize_input`, `prepare_video_batch_for_saving`), matched bit for bit; and
`cosmos_predict1/diffusion/inference/inference_utils.py`, but in float32 where it has bf16;
nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py`.
Axes: T frames, C colours, H/W pixels.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import InputError
from worldline.video.read import Clip


def condition_frames(
    clip: Clip, num_input_frames: int, num_frames: int, height: int, width: int
) -> Tensor:
    """Turn the end of a clip into the conditioning input of the autoregressive models.

    The last `num_input_frames` frames, followed by copies of the very last one. The tokenizer is
    causal, so the copies do not reach the prompt; they only fill the window.

    Returns:
        float32 (1, 3, num_frames, height, width) in [-1, 1], on the CPU.

    Raises:
        InputError: the clip is shorter than `num_input_frames`.
    """
    if not 1 <= num_input_frames <= num_frames:
        raise ValueError(f"num_input_frames is {num_input_frames}; it must be 1 to {num_frames}")
    frames = _last_frames(clip, num_input_frames)
    # float32 with the division first: the reference's order, and its rounding.
    frames = resize_and_crop(frames.to(torch.float32) / 255 * 2 - 1, height, width)
    video = torch.empty(1, 3, num_frames, height, width)
    video[0, :, :num_input_frames] = frames.transpose(0, 1)
    video[0, :, num_input_frames:] = frames[-1, :, None]
    return video


def stretched_frames(clip: Clip, num_input_frames: int, height: int, width: int) -> Tensor:
    """Turn the end of a clip into the conditioning input of the diffusion models.

    Pixel level p becomes p / 128 - 1, so white stays a little below 1. The frames are stretched to
    the wanted size whatever their aspect, bicubic, antialiased, and may overshoot a little.

    Returns:
        float32 (1, 3, num_input_frames, height, width), on the CPU.

    Raises:
        InputError: the clip is shorter than `num_input_frames`.
    """
    frames = _last_frames(clip, num_input_frames).to(torch.float32) / 128 - 1
    if frames.shape[-2:] != (height, width):
        frames = F.interpolate(
            frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
    return frames.transpose(0, 1)[None]


def covering_frames(clip: Clip, num_input_frames: int, height: int, width: int) -> Tensor:
    """Turn the end of a clip into the conditioning input of the flow models.

    The frames are scaled, keeping their aspect, until they cover the wanted size, and the middle is
    cut out; they are rounded to whole levels again.

    Returns:
        uint8 (1, 3, num_input_frames, height, width), on the CPU.

    Raises:
        InputError: the clip is shorter than `num_input_frames`.
    """
    frames = _last_frames(clip, num_input_frames).to(torch.float32)
    levels = resize_and_crop(frames, height, width).round().to(torch.uint8)
    return levels.transpose(0, 1)[None]


def _last_frames(clip: Clip, count: int) -> Tensor:
    """Return the last frames of a clip, uint8 (T, 3, h, w)."""
    if count < 1:
        raise ValueError(f"num_input_frames is {count}; it must be 1 or more")
    have = len(clip.frames)
    if have < count:
        raise InputError(f"the clip has {have} frames, but {count} are needed")
    return torch.from_numpy(np.array(clip.frames[-count:])).permute(0, 3, 1, 2)


def resize_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale until the target is covered, keeping the aspect, then cut out the middle.

    Args:
        frames: (T, C, h, w), floating, any range.
        height: rows of the result.
        width: columns of the result.

    Returns:
        (T, C, height, width), in the dtype of `frames`.
    """
    rows, columns = frames.shape[-2:]
    scale = max(width / columns, height / rows)
    # scale * rows may round to just above `height`; the reference keeps that extra row, then crops.
    size = ceil(scale * rows), ceil(scale * columns)
    if size != (rows, columns):
        frames = F.interpolate(
            frames, size=size, mode="bilinear", align_corners=False, antialias=True
        )
    top = round((size[0] - height) / 2)  # half goes to even, like the reference's
    left = round((size[1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def to_uint8(video: Tensor) -> NDArray[np.uint8]:
    """Turn a decoded video into frames by truncation, as the reference does, not by rounding.

    Args:
        video: (3, T, H, W), floating, in [0, 1]; what lies outside is clamped.

    Returns:
        uint8 (T, H, W, 3).
    """
    # float32: 255 levels do not fit in the 8 significant bits of bfloat16 once multiplied.
    levels = (video.detach().to(torch.float32).clamp(0, 1) * 255).to(torch.uint8)
    frames: NDArray[np.uint8] = levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames


def signed_to_uint8(video: Tensor) -> NDArray[np.uint8]:
    """Do what `to_uint8` does for (3, T, H, W) in [-1, 1], in float32 throughout."""
    return to_uint8((video.detach().to(torch.float32) + 1) / 2)
