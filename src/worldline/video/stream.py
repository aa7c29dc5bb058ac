"""Videos of any length, a few frames at a time: what `read` and `write` do for whole clips.

Axes: T frames, H rows, W columns, and three colours last.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worldline.errors import Error, InputError
from worldline.video.read import _decoded, _opened, _to_rgb, media_kind, read_image
from worldline.video.write import (
    BT709,
    ENCODINGS,
    LIMITED_RANGE,
    _in_yuv,
    check_destination,
    write_bytes,
)

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
    with _opened(path) as (container, stream):
        for frame in _decoded(path, container, stream):
            image = _to_rgb(frame)
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


def write_stream(pieces: Iterable[Frames], path: str | Path, fps: float) -> int:
    """Write a video as `write_video` does, piece by piece, and return how many frames it has.

    Args:
        pieces: uint8 (T, H, W, 3), all of one size; there must be at least one frame.
        path: `.mp4`, `.mov`, `.mkv` or `.webm`; the file is there once it is whole.
        fps: frames a second, above 0.

    Raises:
        InputError: unknown suffix, or a place that cannot be written.
        Error: the disk is full, or this build of PyAV lacks the encoder.
    """
    path = Path(path)
    check_destination(path)
    container, encoder, options = ENCODINGS[path.suffix.lower()]
    if encoder == "gif":
        raise InputError(f"{path}: the palette of a GIF needs the whole clip; use .mp4")
    if encoder not in av.codec.codecs_available:
        raise Error(f"this build of PyAV has no {encoder} encoder; install PyAV's own wheel")
    pieces = iter(pieces)
    first = next(pieces)
    height, width = first.shape[1:3]
    even = encoder == "libx264"  # which stores even sides only
    odd = ((0, 0), (0, height % 2 * even), (0, width % 2 * even), (0, 0))
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    total = 0
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width = height + odd[1][1], width + odd[2][1]
        stream.pix_fmt = "yuv420p"
        # Without tags players guess the matrix from the height, and the colours shift.
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = LIMITED_RANGE
        for piece in chain([first], pieces):
            for picture in _in_yuv(np.pad(piece, odd, mode="edge")):
                picture.pts = total
                picture.time_base = 1 / rate
                output.mux(stream.encode(picture))
                total += 1
        output.mux(stream.encode(None))
    write_bytes(path, file.getbuffer())
    return total


def scaled(frames: Frames, short_side: int) -> Frames:
    """Return uint8 frames (T, H, W, 3) whose short side is `short_side`; the long one is even."""
    height, width = frames.shape[1:3]
    ratio = short_side / min(height, width)
    long_side = max(2, round(max(height, width) * ratio / 2) * 2)
    size = (long_side, short_side) if width >= height else (short_side, long_side)
    pictures = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS)) for p in pictures])
