"""Images and videos to uint8 RGB frames; every bad file gets one clear line.

The reference opens two image types and `.mp4`, drops what it does not know without a word, and
hands alpha and grey to the model, which crashes on them. Here each file gives RGB or an InputError.
Axes: T frames, H rows, W columns, and three colours last.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import av
import av.container
import av.error
import av.stream
import av.video
import numpy as np
from av.video.reformatter import Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from worldline.errors import InputError
from worldline.files import disguise

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")

Kind = Literal["image", "video"]

# Up to here `probe` decodes every frame, above it counts packets: a packet may hold no visible
# frame, and only short clips can fall below a number of conditioning frames because of that.
COUNT_BY_DECODING = 64

BT709 = 1  # FFmpeg's number for the matrix of high definition
ATTACHED_PIC = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC

# what Pillow's decoders raise on damage
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)

# First atoms of a QuickTime or MP4 file; `ftyp` alone would refuse old camera files.
MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


GIF_END = b";"  # FFmpeg takes a cut-off GIF for a shorter one


@dataclass(frozen=True)
class Clip:
    """Decoded frames.

    Attributes:
        frames: uint8 (T, H, W, 3), RGB, upright, contiguous.
        fps: frames a second on average; 0 where the file does not say, as for an image.
    """

    frames: NDArray[np.uint8]
    fps: float


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, known without keeping its frames.

    Attributes:
        kind: "image" or "video".
        frames: how many frames `read_video` gives; 1 for an image.
        height: rows, after rotation by the file's metadata.
        width: columns, likewise.
        fps: as in `Clip`.
    """

    kind: Kind
    frames: int
    height: int
    width: int
    fps: float


def media_kind(path: str | Path) -> Kind:
    """Tell images from videos by the suffix, in any letter case.

    Raises:
        InputError: the suffix is neither.
    """
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    raise InputError(
        f"{path}: {f'unknown media type {suffix}' if suffix else 'no suffix to tell its type'}; "
        f"images are {' '.join(IMAGE_SUFFIXES)}, videos are {' '.join(VIDEO_SUFFIXES)}"
    )


def probe(path: str | Path, *, kind: Kind) -> MediaInfo:
    """Check that a file is readable media of this kind, and measure it.

    At least the first frame is decoded, so what passes here is media and not only a good header.

    Raises:
        InputError: missing, unreadable, damaged, without frames, or not of this kind.
    """
    path = Path(path)
    found = media_kind(path)
    _check_file(path)
    if found != kind:
        article = {"image": "an image", "video": "a video"}[found]
        raise InputError(
            f"{path} is {article}, but --input_type is {kind}; use --input_type {found}"
        )
    if kind == "image":
        height, width = read_image(path).frames.shape[1:3]
        return MediaInfo("image", 1, height, width, 0.0)
    with opened(path) as (container, stream):
        packets = sum(not p.is_discard for p in _packets(path, container, stream))
    with opened(path) as (container, stream):
        count = 0
        for frame in decoded(path, container, stream):
            if count == 0:
                height, width = frame.height, frame.width
                if _orientation(frame)[0]:
                    height, width = width, height
            count += 1
            if packets > COUNT_BY_DECODING:
                count = packets
                break
        if count == 0:
            raise InputError(f"{path} has no video frames")
        return MediaInfo("video", count, height, width, _rate(stream))


def check_written(path: str | Path, frames: int | None) -> None:
    """Check that a video, or a picture, that `write_video` once wrote is still there, whole.

    Cheap: as in `probe`, the frames of a long video are counted, not decoded.

    Args:
        path: the file.
        frames: how many it must have; None for any number.

    Raises:
        InputError: it is absent, damaged, cut short, or of another number of frames.
    """
    path = Path(path)
    have = probe(path, kind=media_kind(path)).frames
    if frames is not None and have != frames:
        raise InputError(f"{path} has {have} of {frames} frames")
    if path.suffix.lower() == ".gif":
        with path.open("rb") as file:
            file.seek(-len(GIF_END), os.SEEK_END)
            if file.read() != GIF_END:
                raise InputError(f"{path} is truncated: it has no end")


def read_video(path: str | Path, *, last: int | None = None) -> Clip:
    """Decode a video, or an animated GIF, to upright RGB.

    A clip of varying frame rate gives its frames as they are: none repeated, none dropped.

    Args:
        path: a file of any of `VIDEO_SUFFIXES`; the contents decide, not the suffix.
        last: keep only so many frames from the end, in memory too; all where the clip has fewer.

    Raises:
        InputError: missing, unreadable, not a video, damaged, or without frames.
    """
    path = Path(path)
    if last is not None and last < 1:
        raise ValueError(f"last is {last}; at least 1 frame must be kept")
    kept: deque[av.VideoFrame] = deque(maxlen=last)
    images: list[NDArray[np.uint8]] = []
    with opened(path) as (container, stream):
        for frame in decoded(path, container, stream):
            if last is None:
                images.append(frame_to_rgb(frame))
            else:
                kept.append(frame)  # converted at the end: only what stays is worth the work
        images.extend(frame_to_rgb(frame) for frame in kept)
        fps = _rate(stream)
    if not images:
        raise InputError(f"{path} has no video frames")
    if len({image.shape for image in images}) > 1:
        raise InputError(f"{path}: its frames change size within the clip, which is not supported")
    return Clip(np.stack(images), fps)


def read_image(path: str | Path) -> Clip:
    """Decode an image to one upright RGB frame, see `to_rgb`; the first of an animated WebP.

    Pillow warns of images above half of what it refuses: these are read, without a word.

    Raises:
        InputError: missing, unreadable, not an image, damaged, or larger than Pillow's limit.
    """
    path = Path(path)
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as stored:
                return to_rgb(stored, str(path))
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image{_guess(path)}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: {_bomb_size(error)}") from None
    except _DAMAGE as error:
        raise InputError(f"{path} is a damaged image: {error}") from None


def _bomb_size(error: Image.DecompressionBombError) -> str:
    """Return how large an image is that Pillow refuses; its error alone tells that."""
    counts = [f"{int(number):,}" for number in re.findall(r"\d+", str(error))]
    if len(counts) != 2:
        return str(error)
    return f"it has {counts[0]} pixels; at most {counts[1]} are read"


def to_rgb(stored: Image.Image, name: str) -> Clip:
    """Turn a picture into one upright RGB frame.

    Transparent pixels show white, as the diffusion members of the family have it; grey, palette,
    CMYK and 16-bit images become 8-bit RGB. Colour profiles are ignored, as in the reference.

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


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a media file")
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path} is empty (0 bytes)")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path} cannot be read: {_reason(error)}") from None


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay (..., 4) over white; opaque pixels keep their value exactly."""
    alpha = rgba[..., 3:].astype(np.uint16)
    colour = rgba[..., :3].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _guess(path: Path) -> str:
    """Name what a wrong file most likely is, for the end of a message; "" if nothing is known."""
    with path.open("rb") as file:
        head = file.read(512)
    found = disguise(head)
    if found == "git-lfs pointer":
        return " but a git-lfs pointer: the file itself was never fetched"
    if found == "web page":
        return " but a web page, perhaps saved by a failed download"
    if head.isascii() and b"\0" not in head:
        return " but text"
    return ""


def _container_format(path: Path) -> str:
    """Pick the demuxer by the first bytes.

    Left to itself FFmpeg also takes playlists, which may open other files, and draws plain text.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:8] in MOV_ATOMS:
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"GIF8":
        return "gif"
    raise InputError(f"{path} is not an mp4, mov, mkv, webm or gif video{_guess(path)}")


def _check_length(path: Path, format_name: str) -> None:
    """Refuse a file that is shorter than its own outline says.

    FFmpeg takes a cut-off Matroska file, or a cut between two frames, for a shorter clip.
    """
    have = path.stat().st_size
    need = 0
    with path.open("rb") as file:
        if format_name == "mov":
            while need < have:
                file.seek(need)
                header = file.read(16)
                if len(header) < 8:
                    break  # a few stray bytes at the end harm nobody
                size = int.from_bytes(header[:4], "big")
                if size == 1:  # the size follows as 64 bits
                    size = int.from_bytes(header[8:], "big")
                if size < 8 or not header[4:8].isascii():
                    break  # 0 reaches to the end of the file; what is no atom is FFmpeg's to judge
                need += size
        elif format_name == "matroska":
            head = file.read(4096)
            place = 4
            size, place = _matroska_size(head, place)
            place += size  # past the EBML header: the Segment, which holds everything
            if head[place : place + 4] == b"\x18\x53\x80\x67":
                size, place = _matroska_size(head, place + 4)
                need = place + size
    if need > have:
        raise InputError(f"{path} is truncated: it has {have} of {need} bytes")


def _matroska_size(head: bytes, place: int) -> tuple[int, int]:
    """Read a size of variable length: its value (0 if unknown, as in a live recording), its end."""
    first = head[place] if place < len(head) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(head[place : place + length], "big") & ((1 << 7 * length) - 1)
    return (0 if value == (1 << 7 * length) - 1 else value), place + length


@contextlib.contextmanager
def opened(
    path: Path,
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """Open a video for the time of a `with`, and choose its stream.

    Raises:
        InputError: missing, unreadable, not a video, or truncated.
    """
    _check_file(path)
    format_name = _container_format(path)
    _check_length(path, format_name)
    try:
        container = av.open(str(path), format=format_name)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated: {_reason(error)}") from None
    with container:
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            raise InputError(f"{path} has no video stream")
        stream = streams[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _is_cover(stream: av.video.stream.VideoStream) -> bool:
    """Tell the picture of an audio file, which FFmpeg shows as a video of one frame."""
    flags = getattr(stream, "disposition", 0)  # the oldest PyAV cannot tell, some give an enum
    return bool(getattr(flags, "value", flags) & ATTACHED_PIC)


def _packets(
    path: Path,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
) -> Iterator[av.Packet[av.video.stream.VideoStream]]:
    """Yield the packets that hold data; a cut-off one is an error, not a shorter clip."""
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"{path} is damaged or truncated: {_reason(error)}") from None
        if packet is None:
            return
        if packet.size and packet.is_corrupt:
            raise InputError(f"{path} is damaged or truncated: it ends within a frame")
        if packet.size:  # PyAV ends with an empty packet
            yield packet


def decoded(
    path: Path,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
) -> Iterator[av.VideoFrame]:
    """Yield the frames of what `opened` gave, in the order in which they are shown.

    Raises:
        InputError: the file is damaged or truncated.
    """
    count = 0
    # None at the end: the decoder gives what it still holds back for reordering.
    for packet in chain(_packets(path, container, stream), [None]):
        try:
            frames = stream.codec_context.decode(packet)
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(
                f"{path} is damaged or truncated after {count} frames: {_reason(error)}"
            ) from None
        for frame in frames:
            count += 1
            yield frame


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _rate(stream: av.video.stream.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else 0.0


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Read the display matrix: (swap rows and columns, then flip rows, then flip columns).

    The nine numbers are [a b u; c d v; x y w], and pixel (x, y) shows at (ax + cy, bx + dy).
    """
    item: Any  # PyAV's stubs call it a str
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=5i", bytes(item)[:20])
            if abs(b) > abs(a):
                return True, b < 0, c < 0
            return False, d < 0, a < 0
    return False, False, False


def frame_to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """Return a decoded frame as uint8 (H, W, 3), upright, transparent parts over white."""
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
