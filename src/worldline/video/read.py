"""Images and videos to uint8 RGB frames, upright.

A file that is missing, unreadable, damaged, cut short or without frames is an InputError of one
line; the reference opens two image types and `.mp4`, drops other files without a word and crashes
on alpha and grey. Axes: T frames, H rows, W columns, and three colours last.
"""

import contextlib
import struct
import warnings
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

from worldline.errors import InputError
from worldline.files import disguise

Frames: TypeAlias = NDArray[np.uint8]
Packets: TypeAlias = Iterator["av.Packet[VideoStream] | None"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")

# errors of Pillow's decoders on damaged files
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
BT709 = 1  # FFmpeg's number for the matrix of high definition
_NO_FRAMES = "it has no video frames"

_MATROSKA_IDS = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")  # EBML header and segment, in this order


class Clip(NamedTuple):
    """Decoded frames."""

    frames: Frames  # uint8 (T, H, W, 3), RGB, upright, contiguous
    fps: float  # average frames a second; 0 if unknown, as for an image


class MediaInfo(NamedTuple):
    """Measurements of a media file, after rotation by its metadata."""

    frames: int  # as many as `read_video` gives; 1 for an image
    height: int
    width: int
    fps: float  # as of a clip


def media_kind(path: str | Path) -> Literal["image", "video"]:
    """Kind of a file by its suffix, in any letter case; another suffix is an InputError."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    wrong = f"unknown media type {suffix}" if suffix else "no suffix"
    raise InputError(
        f"{path}: {'it is a folder' if Path(path).is_dir() else wrong}; "
        f"images are {' '.join(IMAGE_SUFFIXES)}, videos are {' '.join(VIDEO_SUFFIXES)}"
    )


def probe(path: str | Path) -> MediaInfo:
    """Measurements of a file, of which the first frame is decoded and the others are counted."""
    path = Path(path)
    if media_kind(path) == "image":
        _, height, width, _ = read_image(path).frames.shape
        return MediaInfo(1, height, width, 0.0)
    with _opened(path) as (stream, packets):
        count, first = 0, None
        for packet in packets:
            count += packet is not None and not packet.is_discard
            first = first or next(iter(stream.codec_context.decode(packet)), None)
        if first is None:
            raise ValueError(_NO_FRAMES)
        height, width, _ = _to_rgb(first).shape
        return MediaInfo(count, height, width, _fps(stream))


def check_written(path: str | Path, frames: int | None) -> None:
    """Refuse a video or picture of `write_video` that is no longer whole; cheap, as `probe`.

    Or that has another number of frames, unless `frames` is None.
    """
    count = probe(path).frames
    if frames not in (count, None):
        raise InputError(f"{path} has {count} of {frames} frames")
    # FFmpeg takes a GIF that was cut short for a shorter one
    if Path(path).suffix.lower() == ".gif" and not Path(path).read_bytes().endswith(b";"):
        raise InputError(f"{path} is truncated")


def read_video(path: str | Path, *, last: int | None = None) -> Clip:
    """Frames of a video or an animated GIF; those of a varying frame rate, each once.

    The contents decide, not the suffix. Only the `last` frames are kept, in memory too, or all of
    a shorter clip.
    """
    with _opened(Path(path)) as (stream, packets):
        frames = _decoded(stream, packets)
        if last is not None:  # only the kept frames are worth their conversion
            frames = iter(deque(frames, maxlen=last))
        return Clip(np.stack([_to_rgb(frame) for frame in frames]), _fps(stream))


def stream_media(path: str | Path, count: int) -> Iterator[Frames]:
    """Frames of a video, or the one of an image, in pieces of `count`; the last may be shorter."""
    path = Path(path)
    if media_kind(path) == "image":
        yield read_image(path).frames
        return
    with _opened(path) as (stream, packets):
        images = map(_to_rgb, _decoded(stream, packets))
        while piece := [*islice(images, count)]:
            yield np.stack(piece)


def read_image(path: str | Path) -> Clip:
    """One upright RGB frame, as `to_rgb` makes it; the first of an animated WebP.

    An image above Pillow's limit is refused.
    """
    path = Path(path)
    head = _read_head(path)
    try:
        with warnings.catch_warnings():  # Pillow warns above half of its limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            stored = Image.open(path)
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is damaged, too large or not an image{_guess(head)}: {error}"
        ) from None
    with stored:
        return to_rgb(stored, str(path))


def to_rgb(stored: Image.Image, name: str) -> Clip:
    """One upright RGB frame of a picture in any mode, its EXIF orientation applied.

    Transparent pixels become white, as in the diffusion members of the family; grey, palette, CMYK
    and 16-bit images become 8-bit RGB. Colour profiles are ignored, as in the reference.
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
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return Clip(_over_white(np.asarray(image.convert("RGBA")))[None], 0.0)


def _over_white(rgba: Frames) -> Frames:
    """Colours (..., 3) of (..., 4) over white; opaque pixels keep their value exactly."""
    color, alpha = np.split(rgba.astype(np.uint16), [3], axis=-1)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _read_head(path: Path) -> bytes:
    """First bytes of a file, at least one."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path}: {_reason(error).lower()}") from None
    if not head:
        raise InputError(f"{path} is empty (0 bytes)")
    return head


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _guess(head: bytes) -> str:
    """Likely nature of a wrong file, as the end of a message; "" if unknown."""
    kind = disguise(head) or ("text file" if head.isascii() and b"\0" not in head else "")
    return f" but a {kind}" if kind else ""


def _segment_end(head: bytes) -> int:
    """End of the Matroska segment, which holds nearly all of the file; 0 if unknown."""
    end = 0
    for name in _MATROSKA_IDS:
        field = head[end + 4 : end + 12]  # size of what follows, a number of variable length
        if not field or head[end : end + 4] != name:
            return 0
        width = 9 - field[0].bit_length()
        ones = (1 << 7 * width) - 1
        size = int.from_bytes(field[:width]) & ones
        end += 4 + width + size
    return 0 if size == ones else end  # all ones in a live recording


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[VideoStream, Packets]]:
    """Video stream of a file and its packets; what fails inside the `with` is damage of the file.

    FFmpeg may take few formats: else it takes playlists, which may open other files, and draws
    plain text.
    """
    head = _read_head(path)
    try:
        if _segment_end(head) > path.stat().st_size:  # to FFmpeg a shorter video
            raise ValueError("its segment ends early")
        with av.open(str(path), options={"format_whitelist": "mov,matroska,gif"}) as container:
            # not the picture of an audio file, which to FFmpeg is a video of one frame
            covers = Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise InputError(f"{path} has no video stream")
            streams[0].thread_type = "AUTO"
            yield streams[0], _packets(container, streams[0])
    except (InputError, MemoryError):
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged, truncated or not an mp4, mov, mkv, webm or gif video"
            f"{_guess(head)}: {_reason(error)}"
        ) from None


def _packets(container: InputContainer, stream: VideoStream) -> Packets:
    """Packets of a video, then the None at which a decoder gives what it holds back."""
    count = 0
    for packet in container.demux(stream):
        if packet.size:  # PyAV ends with an empty packet
            if packet.is_corrupt:
                raise ValueError("it ends within a frame")
            count += 1
            yield packet
    if count < stream.frames:  # of the index of MP4 and MOV; 0 in other files
        raise ValueError(f"it has {count} of {stream.frames} frames")
    yield None


def _decoded(stream: VideoStream, packets: Packets) -> Iterator[av.VideoFrame]:
    """Frames in the order of display, at least one, all of one size."""
    size = None
    for frame in chain.from_iterable(map(stream.codec_context.decode, packets)):
        size = size or (frame.height, frame.width)
        if size != (frame.height, frame.width):
            raise ValueError("its frames change size")
        yield frame
    if size is None:
        raise ValueError(_NO_FRAMES)


def _fps(stream: VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _to_rgb(frame: av.VideoFrame) -> Frames:
    """A decoded frame as (H, W, 3), upright, transparent parts over white."""
    alpha = any(component.is_alpha for component in frame.format.components)
    # PyAV before 17 applies the tag only where the two matrices differ; for RGB the second has no
    # meaning. Without a tag every version takes BT.601, as the reference does.
    tagged = int(frame.colorspace) == BT709
    matrices = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU601}
    converted = frame.reformat(format="rgba" if alpha else "rgb24", **matrices if tagged else {})
    image: Any = converted.to_ndarray()
    if alpha:
        image = _over_white(image)
    item: Any  # PyAV's stubs call it a str
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            # [a b u; c d v; x y w]: pixel (x, y) goes to (ax + cy, bx + dy)
            a, b, _, c, d = struct.unpack("=5i", bytes(item)[:20])
            if abs(b) > abs(a):
                image, a, d = image.transpose(1, 0, 2), c, b
            image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)
