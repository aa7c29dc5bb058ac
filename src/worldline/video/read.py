"""Images and videos to uint8 RGB frames, upright; a bad file is an InputError of one line.

The reference opens two image types and `.mp4`, drops other files without a word and crashes on
alpha and grey. Axes: T frames, H rows, W columns, and three colours last.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from worldline.errors import InputError
from worldline.files import disguise

Frames: TypeAlias = NDArray[np.uint8]
Kind = Literal["image", "video"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")

# errors of Pillow's decoders on damaged files
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
BT709 = 1  # FFmpeg's number for the matrix of high definition

# First atoms of a QuickTime or MP4 file; `ftyp` alone would refuse old camera files.
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


@dataclass(frozen=True)
class Clip:
    """Decoded frames.

    Attributes:
        frames: uint8 (T, H, W, 3), RGB, upright, contiguous.
        fps: average frames a second; 0 if unknown, as for an image.
    """

    frames: Frames
    fps: float


@dataclass(frozen=True)
class MediaInfo:
    """Measurements of a media file.

    Attributes:
        kind: "image" or "video".
        frames: number of frames that `read_video` gives; 1 for an image.
        height: rows, after rotation by the file's metadata.
        width: columns, after rotation.
        fps: average frames a second; 0 if unknown.
    """

    kind: Kind
    frames: int
    height: int
    width: int
    fps: float


def media_kind(path: str | Path) -> Kind:
    """Kind of a file by its suffix, in any letter case.

    Raises:
        InputError: the suffix is neither an image's nor a video's.
    """
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if Path(path).is_dir():
        wrong = "it is a folder"
    elif not suffix:
        wrong = "no suffix" if Path(path).exists() else "no such file, and no suffix"
    else:
        wrong = f"unknown media type {suffix}"
    raise InputError(
        f"{path}: {wrong}; "
        f"images are {' '.join(IMAGE_SUFFIXES)}, videos are {' '.join(VIDEO_SUFFIXES)}"
    )


def probe(path: str | Path, *, kind: Kind | None = None) -> MediaInfo:
    """Measurements of a file, of which the first frame is decoded and the others are counted.

    Args:
        path: the file.
        kind: that it must have; None for any.

    Raises:
        InputError: missing, unreadable, damaged, without frames, or not of this kind.
    """
    path = Path(path)
    actual = media_kind(path)
    if kind not in (actual, None):
        raise InputError(f"{path} is of type {actual}, --input_type is {kind}; give {actual}")
    if actual == "image":
        height, width = read_image(path).frames.shape[1:3]
        return MediaInfo("image", 1, height, width, 0.0)
    with _opened(path) as (container, stream):
        count, first = 0, None
        for packet in chain(_packets(path, container, stream), [None]):
            count += packet is not None and not packet.is_discard
            first = first or next(iter(stream.codec_context.decode(packet)), None)
        if first is None:
            raise InputError(f"{path} has no video frames")
        height, width = first.height, first.width
        if _orientation(first)[0]:
            height, width = width, height
        return MediaInfo("video", count, height, width, _fps(stream))


def check_written(path: str | Path, frames: int | None) -> None:
    """Refuse a video or picture of `write_video` that is no longer whole; cheap, as `probe`.

    Args:
        path: the file.
        frames: number of frames that it must have; None for any.

    Raises:
        InputError: absent, damaged, cut short, or of another number of frames.
    """
    path = Path(path)
    count = probe(path).frames
    if frames is not None and count != frames:
        raise InputError(f"{path} has {count} of {frames} frames")
    # FFmpeg takes a GIF that was cut short for a shorter one
    if path.suffix.lower() == ".gif" and not path.read_bytes().endswith(b";"):
        raise InputError(f"{path} is truncated")


def read_video(path: str | Path, *, last: int | None = None) -> Clip:
    """Frames of a video or an animated GIF; those of a varying frame rate, each once.

    Args:
        path: a file of any of `VIDEO_SUFFIXES`; the contents decide, not the suffix.
        last: number of frames to keep from the end, in memory too; all of a shorter clip.

    Raises:
        InputError: missing, unreadable, not a video, damaged, or without frames.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        frames = _decoded(path, container, stream)
        if last is not None:  # only the kept frames are worth their conversion
            frames = iter(deque(frames, maxlen=last))
        return Clip(np.stack([_to_rgb(frame) for frame in frames]), _fps(stream))


def stream_media(path: str | Path, count: int) -> Iterator[Frames]:
    """Frames of a video, or the one of an image, in pieces of `count`; the last may be shorter.

    Raises:
        InputError: missing, unreadable, damaged, without frames, or its frames change size.
    """
    path = Path(path)
    if media_kind(path) == "image":
        yield read_image(path).frames
        return
    images: list[Frames] = []
    with _opened(path) as (container, stream):
        for frame in _decoded(path, container, stream):
            images.append(_to_rgb(frame))
            if len(images) == count:
                yield np.stack(images)
                images.clear()
    if images:
        yield np.stack(images)


def read_image(path: str | Path) -> Clip:
    """One upright RGB frame, see `to_rgb`; the first of an animated WebP.

    Raises:
        InputError: missing, unreadable, not an image, damaged, or larger than Pillow's limit.
    """
    path = Path(path)
    head = _read_head(path)
    try:
        with warnings.catch_warnings():  # Pillow warns above half of its limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as stored:
                return to_rgb(stored, str(path))
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image{_guess(head)}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: {error}") from None
    except _DAMAGE as error:
        raise InputError(f"{path} is a damaged image: {error}") from None


def to_rgb(stored: Image.Image, name: str) -> Clip:
    """One upright RGB frame of a picture.

    Transparent pixels become white, as in the diffusion members of the family; grey, palette, CMYK
    and 16-bit images become 8-bit RGB. Colour profiles are ignored, as in the reference.

    Args:
        stored: any mode; its EXIF orientation is applied.
        name: for messages.

    Raises:
        InputError: it has no pixels, or its file is damaged.
    """
    if not stored.width or not stored.height:
        raise InputError(f"{name} has no pixels")
    try:
        image = ImageOps.exif_transpose(stored)
        image.load()
    except _DAMAGE as error:
        raise InputError(f"{name} is a damaged image: {error}") from None
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        frame = np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    elif image.has_transparency_data:
        frame = _over_white(np.asarray(image.convert("RGBA")))
    else:
        frame = np.array(image.convert("RGB"))
    return Clip(frame[None], 0.0)


def _over_white(rgba: Frames) -> Frames:
    """Colours (..., 3) of (..., 4) over white; opaque pixels keep their value exactly."""
    alpha = rgba[..., 3:].astype(np.uint16)
    colour = rgba[..., :3].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _read_head(path: Path) -> bytes:
    """First bytes of a file, at least one."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a media file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None
    if not head:
        raise InputError(f"{path} is empty (0 bytes)")
    return head


def _guess(head: bytes) -> str:
    """Likely nature of a wrong file, as the end of a message; "" if unknown."""
    if kind := disguise(head):
        return f" but a {kind}"
    return " but text" if head.isascii() and b"\0" not in head else ""


def _segment_end(head: bytes) -> int:
    """End of the Matroska segment, which holds everything behind the EBML header; 0 if unknown."""

    def number(place: int) -> tuple[int, int]:
        """A number of variable length, 0 if unknown as in a live recording; where it ends."""
        width = 9 - head[place : place + 1].ljust(1, b"\0")[0].bit_length()
        ones = (1 << 7 * width) - 1
        value = int.from_bytes(head[place : place + width], "big") & ones
        return 0 if value == ones else value, place + width

    size, place = number(4)
    place += size
    if head[place : place + 4] != b"\x18\x53\x80\x67":
        return 0
    size, place = number(place + 4)
    return place + size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video and its stream, for the time of a `with`; what fails inside is damage of the file.

    The demuxer is named: else FFmpeg also takes playlists, which may open other files, and draws
    plain text.
    """
    head = _read_head(path)
    if head[4:8] in _MOV_ATOMS:
        name = "mov"
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        name = "matroska"
        if _segment_end(head) > path.stat().st_size:  # to FFmpeg a shorter video
            raise InputError(f"{path} is truncated")
    elif head[:4] == b"GIF8":
        name = "gif"
    else:
        raise InputError(f"{path} is not an mp4, mov, mkv, webm or gif video{_guess(head)}")
    try:
        with av.open(str(path), format=name) as container:
            # not the picture of an audio file, which to FFmpeg is a video of one frame
            covers = Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise InputError(f"{path} has no video stream")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except (InputError, MemoryError):
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _packets(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[av.Packet[VideoStream]]:
    count = 0
    for packet in container.demux(stream):
        if packet.size:  # PyAV ends with an empty packet
            if packet.is_corrupt:
                raise InputError(f"{path} is damaged or truncated: it ends within a frame")
            count += 1
            yield packet
    if count < stream.frames:  # of the index of MP4 and MOV; 0 in other files
        raise InputError(f"{path} is truncated: it has {count} of {stream.frames} frames")


def _decoded(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Frames in the order of display, at least one, all of one size."""
    sizes = set()
    # None at the end: the decoder gives what it holds back for reordering.
    for packet in chain(_packets(path, container, stream), [None]):
        for frame in stream.codec_context.decode(packet):
            sizes.add((frame.height, frame.width))
            if len(sizes) > 1:
                raise InputError(f"{path}: its frames change size, which is not supported")
            yield frame
    if not sizes:
        raise InputError(f"{path} has no video frames")


def _fps(stream: VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Rotation by the display matrix: (swap rows and columns, then flip rows, then flip columns).

    The nine numbers are [a b u; c d v; x y w], and pixel (x, y) goes to (ax + cy, bx + dy).
    """
    item: Any  # PyAV's stubs call it a str
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=5i", bytes(item)[:20])
            if abs(b) > abs(a):
                return True, b < 0, c < 0
            return False, d < 0, a < 0
    return False, False, False


def _to_rgb(frame: av.VideoFrame) -> Frames:
    """A decoded frame as (H, W, 3), upright, transparent parts over white."""
    alpha = any(component.is_alpha for component in frame.format.components)
    layout = "rgba" if alpha else "rgb24"
    if int(frame.colorspace) == BT709:
        # PyAV before 17 applies the tag only where the two matrices differ; for RGB the second
        # has no meaning. Without a tag every version takes BT.601, as the reference does.
        converted = frame.reformat(
            format=layout, src_colorspace=Colorspace.ITU709, dst_colorspace=Colorspace.ITU601
        )
    else:
        converted = frame.reformat(format=layout)
    image: Any = converted.to_ndarray()
    if alpha:
        image = _over_white(image)
    swap, flip_rows, flip_columns = _orientation(frame)
    if swap:
        image = image.transpose(1, 0, 2)
    if flip_rows:
        image = image[::-1]
    if flip_columns:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
