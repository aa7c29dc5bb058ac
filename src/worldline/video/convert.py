"""uint8 frames to the float range of the networks and back: resize, crop, pad, and only here.

Source: nvidia-cosmos/cosmos-predict1 `cosmos_predict1/autoregressive/utils/inference.py`
(`load_vision_input`, `resize_input`, `prepare_video_batch_for_saving`), matched bit for bit; and
`cosmos_predict1/diffusion/inference/inference_utils.py`, but in float32 where it has bf16;
nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py`.
Axes: T frames, C colours, H/W pixels. The conditioning tensors are on the CPU.
"""

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from worldline.finite import check_finite, total
from worldline.video.read import Clip, Frames


def condition_frames(
    clip: Clip, num_input_frames: int, num_frames: int, height: int, width: int
) -> Tensor:
    """Conditioning of the autoregressive models: the end of a clip, then copies of its last frame.

    The tokenizer is causal, so the copies do not reach the prompt; they only fill the window.
    float32 (1, 3, num_frames, height, width) in [-1, 1].
    """
    # float32 with the division first: the reference's order, and its rounding.
    frames = _last_frames(clip, num_input_frames) / 255 * 2 - 1
    frames = resize_and_crop(frames, height, width)
    copies = frames[-1:].expand(num_frames - num_input_frames, -1, -1, -1)
    return torch.cat([frames, copies]).transpose(0, 1)[None].contiguous()


def stretched_frames(clip: Clip, num_input_frames: int, height: int, width: int) -> Tensor:
    """Conditioning of the diffusion models: the end of a clip, stretched whatever its aspect.

    float32 (1, 3, num_input_frames, height, width). Pixel level p becomes p / 128 - 1, so white
    stays a little below 1. The resize is bicubic, antialiased, and may overshoot a little.
    """
    frames = _last_frames(clip, num_input_frames) / 128 - 1
    if frames.shape[-2:] != (height, width):
        frames = F.interpolate(
            frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
    return frames.transpose(0, 1)[None]


def covering_frames(clip: Clip, num_input_frames: int, height: int, width: int) -> Tensor:
    """Conditioning of the flow models: the end of a clip, scaled to cover the size and cropped.

    uint8 (1, 3, num_input_frames, height, width).
    """
    frames = resize_and_crop(_last_frames(clip, num_input_frames), height, width)
    return frames.round().to(torch.uint8).transpose(0, 1)[None]


def _last_frames(clip: Clip, count: int) -> Tensor:
    """Last frames of a clip, float32 (T, 3, h, w) in [0, 255]."""
    return torch.from_numpy(np.array(clip.frames[-count:])).permute(0, 3, 1, 2).float()


def resize_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames (T, C, h, w), floating, scaled until they cover (height, width), then centre-cropped.

    The aspect and the dtype stay.
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


def scaled(frames: Frames, short_side: int) -> Frames:
    """Frames (T, H, W, 3) whose short side is `short_side`; the long one is even."""
    short, long = sorted(frames.shape[1:3])
    long_side = max(2, round(long * (short_side / short) / 2) * 2)
    size = (short_side, long_side) if frames.shape[1] == long else (long_side, short_side)
    pictures = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def to_uint8(video: Tensor, dtype: torch.dtype | None = None) -> Frames:
    """Frames (T, H, W, 3) of a video (3, T, H, W) in [0, 1]: clamped, truncated as the reference's.

    In float32: 255 levels do not fit in the 8 significant bits of bfloat16 once multiplied. `dtype`
    is the network's, by default the video's. Raises `NonFiniteError` for NaN and infinity.
    """
    totals = total(video)
    levels = (video.detach().float().clamp(0, 1) * 255).byte()
    frames: Frames = levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    check_finite(totals, "decode: frames", dtype or video.dtype)
    return frames


def signed_to_uint8(video: Tensor) -> Frames:
    """`to_uint8` of a video in [-1, 1]."""
    return to_uint8((video.float() + 1) / 2, video.dtype)
