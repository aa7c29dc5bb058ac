"""uint8 frames to the float range of the networks and back: resize, crop, pad, and only here.

Source: nvidia-cosmos/cosmos-predict1 `cosmos_predict1/autoregressive/utils/inference.py`
(`load_vision_input`, `resize_input`, `prepare_video_batch_for_saving`), matched bit for bit; and
`cosmos_predict1/diffusion/inference/inference_utils.py`, but in float32 where it has bf16;
nvidia-cosmos/cosmos-predict2.5 `_src/predict2/inference/video2world.py`.
Axes: T frames, C colours, H/W pixels. The conditioning tensors are on the CPU.
"""

from collections.abc import Callable
from functools import partial
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from worldline.finite import check_finite, total
from worldline.shapes import Fit
from worldline.video.read import Clip, Frames

Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def condition_frames(
    clip: Clip, num_input_frames: int, num_frames: int, height: int, width: int, fit: Fit = "crop"
) -> Tensor:
    """Conditioning of the autoregressive models: the end of a clip, then copies of its last frame.

    The tokenizer is causal, so the copies do not reach the prompt; they only fill the window.
    float32 (1, 3, num_frames, height, width) in [-1, 1].
    """
    # float32 with the division first: the reference's order, and its rounding.
    signed = partial(_fit, scaled=lambda x: x.div_(255).mul_(2).sub_(1), black=-1)
    frames = signed(clip, num_input_frames, (height, width), fit)
    copies = frames[-1:].expand(num_frames - num_input_frames, -1, -1, -1)
    return torch.cat([frames, copies]).transpose(0, 1)[None].contiguous()


def stretched_frames(
    clip: Clip, num_input_frames: int, height: int, width: int, fit: Fit = "stretch"
) -> Tensor:
    """Conditioning of the diffusion models: the end of a clip, by default stretched.

    float32 (1, 3, num_input_frames, height, width). Pixel level p becomes p / 128 - 1, so white
    stays a little below 1. The resize is bicubic, antialiased, and may overshoot a little.
    """
    signed = partial(_fit, scaled=lambda x: x.div_(128).sub_(1), mode="bicubic", black=-1)
    return signed(clip, num_input_frames, (height, width), fit).transpose(0, 1)[None]


def covering_frames(
    clip: Clip, num_input_frames: int, height: int, width: int, fit: Fit = "crop"
) -> Tensor:
    """Conditioning of the flow models: the end of a clip, by default scaled to cover and cropped.

    uint8 (1, 3, num_input_frames, height, width).
    """
    frames = _fit(clip, num_input_frames, (height, width), fit)
    return frames.round().to(torch.uint8).transpose(0, 1)[None]


def _fit(
    clip: Clip,
    count: int,
    size: tuple[int, int],
    fit: Fit,
    scaled: Callable[[Tensor], Tensor] = lambda levels: levels,
    mode: str = "bilinear",
    black: float = 0,
) -> Tensor:
    """Last `count` frames of a clip, float32 (count, 3, *size), their levels `scaled` in place."""
    planes = [  # one after another: a large picture in float32 would fill the memory
        fit_frames(scaled(torch.from_numpy(plane.astype(np.float32))), *size, fit, mode, black)
        for frame in clip.frames[-count:]
        for plane in frame.transpose(2, 0, 1)[:, None, None]
    ]
    frames = torch.cat(planes).view(-1, 3, *size)
    # by whose layout kernels round differently: colours last, as the frames are
    return frames.contiguous(memory_format=torch.channels_last)


def fit_frames(
    frames: Tensor, height: int, width: int, fit: Fit, mode: str = "bilinear", black: float = 0
) -> Tensor:
    """Frames (T, C, h, w), floating, of a size: as they are, stretched, cropped or padded.

    `mode` is the interpolation, `black` the colour of what is padded, on both sides.
    """
    if fit == "crop":
        return resize_and_crop(frames, height, width, mode)
    if fit == "stretch":
        return _resize(frames, (height, width), mode)
    rows, columns = frames.shape[-2:]
    scale = min(width / columns, height / rows)
    frames = _resize(frames, (max(1, round(scale * rows)), max(1, round(scale * columns))), mode)
    spare = width - frames.shape[-1], height - frames.shape[-2]
    return F.pad(frames, [n for s in spare for n in (s // 2, s - s // 2)], value=black)


def resize_and_crop(frames: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Frames (T, C, h, w), floating, scaled until they cover (height, width), then centre-cropped.

    The aspect and the dtype stay.
    """
    rows, columns = frames.shape[-2:]
    scale = max(width / columns, height / rows)
    # scale * rows may round to just above `height`; the reference keeps that extra row, then crops.
    frames = _resize(frames, (ceil(scale * rows), ceil(scale * columns)), mode)
    top = round((frames.shape[-2] - height) / 2)  # half goes to even, like the reference's
    left = round((frames.shape[-1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def _resize(frames: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if frames.shape[-2:] == size:
        return frames
    return F.interpolate(frames, size=size, mode=mode, align_corners=False, antialias=True)


def scaled(frames: Frames, short_side: int) -> Frames:
    """Frames (T, H, W, 3) whose short side is `short_side`; the long one is rounded, then even."""
    short, long = sorted(frames.shape[1:3])
    long_side = int(long * short_side / short + 0.5)
    long_side += long_side % 2
    size = (short_side, long_side) if frames.shape[1] == long else (long_side, short_side)
    pictures = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def to_uint8(
    video: Tensor,
    dtype: torch.dtype | None = None,
    join: Join = lambda totals, levels: (totals, levels),
) -> Frames:
    """Frames (T, H, W, 3) of a video (3, T, H, W) in [0, 1]: clamped, truncated as the reference's.

    In float32: 255 levels do not fit in the 8 significant bits of bfloat16 once multiplied. `dtype`
    is the network's, by default the video's. `join` makes sums and frames of all rows of those
    of a process. Raises `NonFiniteError` for NaN and infinity.
    """
    levels = (video.detach().float().clamp(0, 1) * 255).byte()
    totals, levels = join(total(video), levels.permute(1, 2, 3, 0).contiguous())
    frames: Frames = levels.cpu().numpy()
    check_finite(totals, "decode: frames", dtype or video.dtype)
    return frames


def signed_to_uint8(video: Tensor, *join: Join) -> Frames:
    """`to_uint8` of a video in [-1, 1]."""
    return to_uint8((video.float() + 1) / 2, video.dtype, *join)
