"""Videos of any length, a few frames at a time: what `read` does for whole clips.

`write_stream`, in `write`, is the way back.
Axes: T frames, H rows, W columns, and three colours last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldline.errors import InputError
from worldline.video.read import decoded, frame_to_rgb, media_kind, opened, read_image

Frames = NDArray[np.uint8]


def stream_media(path: str | Path, count: int) -> Iterator[Frames]:
    """Yield the frames of a video, or the one of an image, as `read_video` gives them.

    Args:
        path: the file; its suffix tells images from videos.
        count: frames of a piece (T, H, W, 3); the last may be shorter.

    Raises:
        InputError: missing, unreadable, damaged, without frames, or its frames change size.
    """
    path = Path(path)
    if media_kind(path) == "image":
        yield read_image(path).frames
        return
    waiting: list[Frames] = []
    shape: tuple[int, ...] | None = None
    with opened(path) as (container, stream):
        for frame in decoded(path, container, stream):
            image = frame_to_rgb(frame)
            if shape not in (None, image.shape):
                raise InputError(
                    f"{path}: its frames change size within the clip, which is not supported"
                )
            shape = image.shape
            waiting.append(image)
            if len(waiting) == count:
                yield np.stack(waiting)
                waiting.clear()
    if waiting:
        yield np.stack(waiting)
    if shape is None:
        raise InputError(f"{path} has no video frames")


def scaled(frames: Frames, short_side: int) -> Frames:
    """Return uint8 frames (T, H, W, 3) whose short side is `short_side`; the long one is even."""
    height, width = frames.shape[1:3]
    ratio = short_side / min(height, width)
    long_side = max(2, round(max(height, width) * ratio / 2) * 2)
    size = (long_side, short_side) if width >= height else (short_side, long_side)
    pictures = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS)) for p in pictures])
