"""Images and videos to uint8 RGB frames, upright, with square pixels.

Contents decide what a file is, not its suffix. One that is missing, no regular file, unreadable,
damaged, cut short, too large or without frames is an InputError of one line; the reference opens
two image types and `.mp4`, drops other files without a word and crashes on alpha and grey. Axes: T
frames, H rows, W columns, and three colours last.
"""

import contextlib
import stat
import struct
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice, pairwise
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
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from worldline.errors import InputError, strerror
from worldline.files import disguise

Frames: TypeAlias = NDArray[np.uint8]
Packets: TypeAlias = Iterator["av.Packet[VideoStream] | None"]
MediaKind: TypeAlias = Literal["image", "video"]

# what claims to be media, in a folder with other files
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".gif", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".ogv"),
)
# Formats that are known by their first bytes; others run programs, draw text, or are not pictures.
_PICTURES = (
    *("AVIF", "BMP", "DDS", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TIFF", "WEBP"),
)
_ANIMATED = ("AVIF", "PNG", "TIFF", "WEBP")  # in others further pictures are layers, or thumbnails
# FFmpeg may take no others: else it takes playlists, which may open other files, and draws text.
_VIDEOS = (
    "mov,matroska,gif,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,ivf,dv,mxf,nut,rm,"
    "yuv4mpegpipe"
)

# Pixels of a frame of a video (8K), of an image (a phone's), and of all frames that are held (9 of
# 4K): a file below 10 MB takes about 1 GB of memory at most. A large one may have more.
MAX_FRAME, MAX_IMAGE, MAX_HELD = 32 << 20, 48 << 20, 80 << 20
_PIXELS_PER_BYTE = 5

BT709 = 1  # FFmpeg's number for the matrix of high definition
_HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers for transfer curves
_NO_FRAMES = "it has no video frames"
_UNEVEN = 2  # ratio of the longest frame to the shortest, up to which times are only rounded

_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"))
_MATROSKA_IDS = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")  # EBML header and segment, in this order


class Clip(NamedTuple):
    """Decoded frames."""

    frames: Frames  # uint8 (T, H, W, 3), RGB, upright, contiguous
    fps: float  # average frames a second; 0 if unknown, as for an image
    notes: tuple[str, ...] = ()  # what reading changed


class MediaInfo(NamedTuple):
    """Measurements of a media file, after rotation by its metadata."""

    kind: MediaKind
    frames: int  # as many as `read_video` gives; 1 for an image
    height: int
    width: int
    fps: float  # as of a clip
    notes: tuple[str, ...]


def media_kind(path: str | Path) -> MediaKind:
    """Kind of a file by its contents: images are what Pillow reads, but for GIFs."""
    path = Path(path)
    if _is_picture(path):
        return "image"
    with _opened(path):
        return "video"


def kind_in_folder(path: Path) -> MediaKind | None:
    """Kind of a file among others: by its contents, else as its suffix claims; None if neither."""
    with contextlib.suppress(InputError):
        return media_kind(path)
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def probe(path: str | Path) -> MediaInfo:
    """Measurements of a file, of which the first frame is decoded and the others are counted."""
    return probe_times(path)[0]


def probe_times(path: str | Path) -> tuple[MediaInfo, list[int]]:
    """Measurements as of `probe`, and when frames are displayed, ticks; [] if the file lacks it."""
    info, times, _ = probe_ticks(path)
    return info, times


def probe_ticks(path: str | Path) -> tuple[MediaInfo, list[int], Fraction]:
    """Measurements and times as of `probe_times`, and the seconds of a tick; 0 if unknown."""
    path = Path(path)
    if _is_picture(path):
        clip = read_image(path)
        _, height, width, _ = clip.frames.shape
        return MediaInfo("image", 1, height, width, 0.0, clip.notes), [], Fraction(0)
    with _opened(path) as video:
        first = next(video.frames())
        deque(video.packets, maxlen=0)  # counts them
        height, width, _ = video.to_rgb(first).shape
        count = len(video.delays) or video.count
        times = sorted({*video.times})
        info = MediaInfo("video", count, height, width, video.fps, video.notes())
        times = times if len(times) == count == video.count else []
        return info, times, video.stream.time_base or Fraction(0)


def check_written(path: str | Path, frames: int | None) -> None:
    """Refuse a video or picture of `write_video` that is no longer whole; cheap, as `probe`.

    Or that has another number of frames, unless `frames` is None.
    """
    count = probe(path).frames
    if frames not in (count, None):
        raise InputError(f"{path} has {count} of {frames} frames")


def read_video(path: str | Path, *, last: int | None = None) -> Clip:
    """Frames of a video or an animated GIF; those of a varying frame rate, each once.

    Only the `last` frames are kept, in memory too, or all of a shorter clip.
    """
    path = Path(path)
    with _opened(path) as video:
        kept: deque[av.VideoFrame] = deque(maxlen=last)
        for frame in video.frames():
            kept.append(frame)
            if last:
                check_pixels(path, len(kept), *video.square(frame.height, frame.width), MAX_FRAME)
        # only the kept frames are worth their conversion, one after another
        count = len(kept)
        images = (video.to_rgb(kept.popleft()) for _ in range(count))
        return Clip(_gather(images, count), video.fps, video.notes(last))


def stream_media(path: str | Path, count: int) -> Iterator[Frames]:
    """Frames of a video, or the one of an image, in pieces of `count`; the last may be shorter.

    Pieces of large frames are shorter, as `check_pixels` has it.
    """
    path = Path(path)
    if _is_picture(path):
        yield read_image(path).frames
        return
    with _opened(path) as video:
        images = map(video.to_rgb, video.frames())
        for first in images:
            size = min(count, at_most(path, MAX_HELD) // (first.size // 3))
            yield _gather(chain([first], islice(images, size - 1)), size)


def read_frames(
    path: str | Path, numbers: Sequence[int], times: Sequence[int] = ()
) -> Iterator[Frames]:
    """Frames (H, W, 3) of a video by their numbers, as `read_video` counts; no others are made.

    Args:
        path: the video.
        numbers: ascending.
        times: as of `probe_times`; with them, decoding begins at the key frame before the first.

    Raises:
        InputError: as of `read_video`, or a frame is absent.
    """
    path, missing = Path(path), deque(numbers)
    places = {time: number for number, time in enumerate(times)}
    for seeks in (True, False) if times else (False,):
        try:
            with _opened(path) as video:
                if seeks:
                    video.seek(missing[0], times)
                for count, frame in enumerate(video.frames()):
                    number = places.get(frame.pts or 0, -1) if seeks else count
                    if number > missing[0] or (number == missing[0] and frame.is_corrupt):
                        raise ValueError(f"its frame {missing[0]} cannot be decoded")
                    if number == missing[0]:
                        missing.popleft()
                        yield video.to_rgb(frame)
                        if not missing:
                            return
                raise ValueError(f"it ends before frame {missing[0]}")
        except InputError:  # where a file cannot be entered, it is decoded from its start
            if not seeks:
                raise


def _gather(images: Iterator[Frames], count: int) -> Frames:
    """Up to `count` frames, at least one, in one array; a list would hold them twice."""
    first = next(images)
    frames = np.empty((count, *first.shape), np.uint8)
    frames[0], made = first, 1
    for made, image in enumerate(images, 2):
        frames[made - 1] = image
    return frames[:made]


def check_pixels(path: Path, frames: int, height: int, width: int, limit: int) -> None:
    """Refuse a file with more pixels than `limit` a frame, or `MAX_HELD` in `frames` frames.

    Raises:
        InputError: there are too many.
    """
    for count, most in ((1, limit), (frames, MAX_HELD)):
        most = at_most(path, most)
        if count * height * width > most:
            several = f"{count} frames of " if count > 1 else ""
            raise InputError(
                f"{path}: {several}{width} x {height} pixels are too many; give "
                f"{most / 1e6:.0f} million at most"
            )


def at_most(path: Path, pixels: int) -> int:
    """Limit of pixels for a file, by its size."""
    return max(pixels, _PIXELS_PER_BYTE * path.stat().st_size)


def read_image(path: str | Path) -> Clip:
    """One upright RGB frame, as `to_rgb` makes it; the first of an animated image."""
    path = Path(path)
    head = _read_head(path)
    try:
        with _open_picture(path) as stored:
            planes = max(3, len(stored.getbands()))  # those of an alpha channel are held twice
            check_pixels(path, 1, stored.height, stored.width, MAX_IMAGE * 3 // planes)
            clip, count = to_rgb(stored, str(path)), getattr(stored, "n_frames", 1)
            if count == 1 or stored.format not in _ANIMATED:
                return clip
            if stored.format == "PNG":
                with _open_picture(path) as chunks:
                    chunks.verify()  # else one that ends early passes
            return clip._replace(notes=(f"the first of its {count} pictures is taken",))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise InputError(
            f"{path} is damaged, too large or not an image{_guess(head)}: {error}"
        ) from None


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the first bytes of a file, which may be damaged further on."""
    _read_head(path)
    try:
        _open_picture(path).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # see `read_image`, which names it
        pass
    return True


def _open_picture(path: Path) -> Image.Image:
    """A picture that is not decoded, as Pillow opens it."""
    Image.init()
    with warnings.catch_warnings():  # of damage and, above half of its limit, of size
        warnings.simplefilter("ignore")
        return Image.open(path, formats=[name for name in _PICTURES if name in Image.OPEN])


def to_rgb(stored: Image.Image, name: str) -> Clip:
    """One upright RGB frame of a picture in any mode, its EXIF orientation applied.

    Transparent pixels become white, as in the diffusion members of the family; grey, palette, CMYK
    and 16-bit images become 8-bit RGB. Colour profiles are ignored, as in the reference.
    """
    if not stored.width or not stored.height:
        raise InputError(f"{name} has no pixels")
    try:
        stored.load()
        turned = stored.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except MemoryError:
        raise
    except Exception as error:  # see `read_image`
        raise InputError(f"{name} is a damaged image: {error}") from None
    image = ImageOps.exif_transpose(stored) if turned else stored  # Pillow always copies
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        rows = (row.astype(np.int64).clip(0, 65535) for row in np.asarray(image))
        image = Image.fromarray(np.stack([((row + 128) // 257).astype(np.uint8) for row in rows]))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    frame = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, 256):  # whole, a large picture would be copied several times
        bottom = min(image.height, top + 256)
        pixels = np.asarray(image.crop((0, top, image.width, bottom)).convert(mode))
        frame[top:bottom] = _over_white(pixels) if mode == "RGBA" else pixels
    return Clip(frame[None], 0.0)


def _over_white(rgba: Frames) -> Frames:
    """Colours (H, W, 3) of (H, W, 4) over white; opaque pixels keep their value exactly."""
    frame = rgba[..., :3].copy()
    for row, stored in zip(frame, rgba, strict=True):  # a large picture in 16 bits fills the memory
        color, alpha = np.split(stored.astype(np.uint16), [3], axis=-1)
        total = color * alpha + 255 * (255 - alpha) + 128
        row[:] = (total + (total >> 8)) >> 8  # divided by 255 and rounded, exactly
    return frame


def _read_head(path: Path) -> bytes:
    """First bytes of a regular file, at least one; a pipe or a device could wait for ever."""
    try:
        mode, head = path.stat().st_mode, b""
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                head = file.read(4096)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path}: {strerror(error).lower()}") from None
    if not stat.S_ISREG(mode):
        kind = "is a directory, " if stat.S_ISDIR(mode) else "is "
        raise InputError(f"{path} {kind}not a regular file; give a video or an image")
    if not head:
        raise InputError(f"{path} is empty (0 bytes)")
    return head


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


def _gif_delays(data: bytes) -> list[int]:
    """Delays of the frames of a GIF, 1/100 s; to FFmpeg one that was cut is a shorter one."""

    def table(flags: int) -> int:  # bytes of a palette
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    delays, delay, place = list[int](), 0, 13 + table(data[10])
    try:
        while (block := data[place]) != 0x3B:  # the end mark
            if block == 0x2C:
                delays.append(delay or 10)  # as browsers take 0
                delay = 0  # each is of one frame
                place += 11 + table(data[place + 9])
            elif block == 0x21:  # an extension
                if data[place + 1] == 0xF9:
                    delay = int.from_bytes(data[place + 4 : place + 6], "little")
                place += 2
            while size := data[place]:
                place += 1 + size
            place += 1
    except IndexError:
        raise ValueError("it ends within a frame") from None
    return delays


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["_Video"]:
    """Video of a file; what fails inside the `with` is damage of the file."""
    head = _read_head(path)
    try:
        if _segment_end(head) > path.stat().st_size:  # to FFmpeg a shorter video
            raise ValueError("its segment ends early")
        delays = []
        if head.startswith(b"GIF8"):
            width, height = struct.unpack("<HH", head[6:10])
            check_pixels(path, 1, height, width, MAX_FRAME)
            delays = _gif_delays(path.read_bytes())
        if head[4:12] in _HEIC:  # to FFmpeg a video of its tiles
            raise InputError(f"{path} is a HEIC picture; convert it to .jpg or .png")
        most = at_most(path, MAX_FRAME)
        options = {"format_whitelist": _VIDEOS, "max_pixels": str(most)}
        with (
            path.open("rb") as file,
            # without its name, for FFmpeg also goes by suffixes and protocols
            av.open(f"/dev/fd/{file.fileno()}", options=options) as container,
        ):
            # not the picture of an audio file, which to FFmpeg is a video of one frame
            covers = Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise InputError(f"{path} has no video stream")
            if (codec := streams[0].codec_context) is None:
                raise InputError(f"{path}: its video codec is unknown, so it cannot be decoded")
            if not codec.width or not codec.height:  # as FFmpeg leaves what is too large
                raise ValueError(f"frames without size, or above {most / 1e6:.0f} million pixels")
            yield _Video(path, container, streams[0], delays)
    except (InputError, MemoryError):
        raise
    except (av.error.FFmpegError, OSError, ValueError, LookupError, struct.error) as error:
        raise InputError(
            f"{path} is damaged, truncated or not an mp4, mov, mkv, webm or gif video"
            f"{_guess(head)}, nor of another known format: {strerror(error)}"
        ) from None


class _Video:
    """Video stream of an open file.

    Attributes:
        whole: whether packets are read from the first on.
        packets: compressed frames, then the None at which a decoder gives what it holds back.
        count: packets so far that are displayed.
        times: when they are displayed, in ticks of the stream.
        delays: of the frames of a GIF, 1/100 s.
        aspect: width of a pixel as a multiple of its height.
        matrix: of rotation and mirroring, as FFmpeg has it.
    """

    def __init__(
        self, path: Path, container: InputContainer, stream: VideoStream, delays: list[int]
    ) -> None:
        self.container, self.stream, self.delays = container, stream, delays
        self.packets, self.whole = self._packets(), True
        self.count, self.times = 0, list[int]()
        context = stream.codec_context
        self.aspect = stream.sample_aspect_ratio or Fraction(1)
        self.matrix = 1, 0, 0, 0, 1
        check_pixels(path, 1, *self.square(context.height, context.width), MAX_FRAME)
        context.options = {"max_pixels": str(at_most(path, MAX_FRAME))}
        stream.thread_type = "AUTO"

    def square(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a stored frame with square pixels; neither is smaller."""
        whole = Fraction(1)
        return round(height / min(self.aspect, whole)), round(width * max(self.aspect, whole))

    def seek(self, number: int, times: Sequence[int]) -> None:
        """Go on from a key frame that is displayed when frame `number` is, or before."""
        self.whole = False
        back, step = 0, 1 + (times[-1] - times[0]) // len(times)
        while back == 0 or times[number] - back > times[0]:
            self.container.seek(times[number] - back, stream=self.stream)
            packets = self._packets()
            packet = next((one for one in packets if one is None or one.is_keyframe), None)
            if packet and packet.pts is not None and packet.pts <= times[number]:
                self.packets = chain([packet], packets)
                return
            back = 2 * back or 4 * step  # FFmpeg goes by times of decoding, or to any frame
        raise ValueError(f"no key frame is found before its frame {number}")

    def _packets(self) -> Packets:
        total = 0
        for packet in self.container.demux(self.stream):
            # PyAV ends with an empty packet; those of AVI repeat a frame
            total += bool(packet.size) or packet.dts is not None
            if packet.size:
                if packet.is_corrupt:
                    raise ValueError("it ends within a frame")
                self.count += not packet.is_discard
                if packet.pts is not None and not packet.is_discard:
                    self.times.append(packet.pts)
                yield packet
        # of the index of MP4, MOV and AVI; 0 in other files
        frames, entries = self.stream.frames, getattr(self.stream, "index_entries", ())
        if len(entries) and "mp4" in self.container.format.name:  # others an edit list leaves out
            frames = min(frames, len(entries))
        if self.whole and total < frames:
            raise ValueError(f"it has {total} of {frames} frames")
        yield None

    def frames(self) -> Iterator[av.VideoFrame]:
        """Frames in the order of display, at least one, all of one size."""
        size = None
        for frame in chain.from_iterable(map(self.stream.codec_context.decode, self.packets)):
            if size is None:
                size = frame.height, frame.width
                # of one frame: those that are asked wait in memory for the garbage collector
                matrix: Any = frame.side_data.get("DISPLAYMATRIX")
                if matrix is not None:
                    self.matrix = struct.unpack("=5i", bytes(matrix)[:20])
            if size != (frame.height, frame.width):
                raise ValueError("its frames change size")
            yield frame
        if size is None:
            raise ValueError(_NO_FRAMES)

    @property
    def fps(self) -> float:
        """Average frames a second; 0 if unknown."""
        if self.delays:  # FFmpeg's rate is that of the commonest delay
            return 100 * len(self.delays) / sum(self.delays)
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    def notes(self, last: int | None = None) -> tuple[str, ...]:
        """What reading changed in the `last` frames of those so far, by default in all."""
        notes, context = [], self.stream.codec_context
        stored = context.height, context.width
        if stored != (square := self.square(*stored)):
            shape = f"{self.aspect.numerator}:{self.aspect.denominator}"
            sizes = (f"{width} x {height}" for height, width in (stored, square))
            notes.append(f"pixels of {shape} made square ({' to '.join(sizes)})")
        if curve := _HDR.get(context.color_trc):
            notes.append(f"{curve} colours taken as of standard range, so paler")
        tick = Fraction(1, 100) if self.delays else self.stream.time_base or Fraction(1)
        steps = self.delays or [b - a for a, b in pairwise(sorted(self.times))]
        steps = steps[-(last or 0) :]
        if steps and max(steps) > _UNEVEN * min(steps):
            least, most = (float(1000 * ticks * tick) for ticks in (min(steps), max(steps)))
            notes.append(f"frames of {least:.0f} to {most:.0f} ms made equally long")
        return tuple(notes)

    def to_rgb(self, frame: av.VideoFrame) -> Frames:
        """A decoded frame as (H, W, 3), upright, transparent parts over white, pixels square."""
        alpha = any(component.is_alpha for component in frame.format.components)
        # PyAV before 17 applies the tag only where the two matrices differ; for RGB the second has
        # no meaning. Without a tag every version takes BT.601, as the reference does.
        options: dict[str, Any] = {}
        if int(frame.colorspace) == BT709:
            options = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU601}
        height, width = self.square(frame.height, frame.width)
        if (height, width) != (frame.height, frame.width):
            options |= {"width": width, "height": height, "interpolation": "BICUBIC"}
        converted = frame.reformat(format="rgba" if alpha else "rgb24", **options)
        image: Any = converted.to_ndarray()
        if alpha:
            image = _over_white(image)
        # [a b u; c d v; x y w]: pixel (x, y) goes to (ax + cy, bx + dy)
        a, b, _, c, d = self.matrix
        if abs(b) > abs(a):
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(image)
