"""Frames to files that are either whole or not there.

A file is encoded in memory, written under a temporary name in its own folder, then renamed. So an
interrupted run leaves no partial video, a full disk leaves the older file whole, and of two runs
that write the same name the later wins entirely.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from worldline.errors import Error, InputError
from worldline.files import replacing
from worldline.video.read import BT709, Frames

# Quality is above the reference's (crf 25): a finer quantiser costs little on 33 frames, and clips
# get chained and compared. Both encoders give other bytes with other numbers of threads, so the
# number is fixed, whatever the machine has.
_H264 = {"crf": "18", "preset": "medium", "threads": "16"}
_VP9 = {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1", "threads": "8"}
# No random identifiers, no version of the muxer; in MP4 and MOV the index goes to the front, so
# that a browser plays before it has the whole file.
_MUXER = {"fflags": "+bitexact"}
_MP4 = {**_MUXER, "movflags": "+faststart"}

# Container and its options, encoder and its options.
ENCODINGS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {
    ".mp4": ("mp4", _MP4, "libx264", _H264),
    ".mov": ("mov", _MP4, "libx264", _H264),
    ".mkv": ("matroska", _MUXER, "libx264", _H264),
    ".webm": ("webm", _MUXER, "libvpx-vp9", _VP9),
    ".gif": ("gif", _MUXER, "gif", {}),
}
PICTURE_SUFFIXES = (".jpg",)  # for a single frame

_LIMITED_RANGE = 1  # FFmpeg's number


def write_video(frames: Frames, path: str | Path, fps: float) -> None:
    """Write a clip; the suffix chooses the format, and no suffix a folder of numbered PNGs.

    Equal frames give equal bytes. H.264 and VP9 are yuv420p with the BT.709 matrix, tagged as such:
    what plays everywhere. H.264 stores even sides only, so an odd side grows by one repeated row or
    column. A GIF keeps every frame and one palette; its delays are whole 1/100 s.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        path: `.mp4`, `.mov`, `.mkv`, `.webm` or `.gif` in any case, or no suffix; for one frame
            `.jpg` too. Missing parent folders are made.
        fps: frames a second; unused for PNGs.

    Raises:
        InputError: unknown suffix, or a place that cannot be written.
        Error: the disk is full, this build of PyAV lacks the encoder, or the encoder cannot take
            frames of this size or rate.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; give uint8 (T, H, W, 3)")
    check_destination(path)
    if not suffix:
        with _writing(path) as temporary:
            temporary.mkdir()
            for index, frame in enumerate(frames):
                Image.fromarray(frame).save(temporary / f"{index:05d}.png")
    elif suffix in PICTURE_SUFFIXES:
        if len(frames) > 1:
            raise InputError(f"{path}: a picture has 1 frame, not {len(frames)}; use .mp4")
        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, format="JPEG", quality=95)
        write_bytes(path, file.getbuffer())
    elif suffix == ".gif":
        _encode(path, fps, _in_palette(frames))
    else:
        write_stream([frames], path, fps)


def write_stream(pieces: Iterable[Frames], path: str | Path, fps: float) -> int:
    """Write a video as `write_video` does, piece by piece; its number of frames.

    Args:
        pieces: uint8 (T, H, W, 3), all of one size; at least one.
        path: `.mp4`, `.mov`, `.mkv` or `.webm`; the file is there once it is whole.
        fps: frames a second, above 0.

    Raises:
        InputError: as `write_video`; or a format that needs the whole clip.
        Error: as `write_video`.
    """
    path = Path(path)
    check_destination(path)
    suffix = path.suffix.lower()
    if suffix not in ENCODINGS or suffix == ".gif":
        raise InputError(f"{path}: {suffix or 'a folder of PNGs'} needs the whole clip; use .mp4")
    multiple = 2 if ENCODINGS[suffix][2] == "libx264" else 1

    def pictures() -> Iterator[av.VideoFrame]:
        for piece in pieces:
            edges = [(0, -side % multiple) for side in piece.shape[1:3]] + [(0, 0)]
            for frame in piece:
                picture = _picture(np.pad(frame, edges, mode="edge"))
                yield picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)

    return _encode(path, fps, pictures())


def check_destination(path: str | Path) -> None:
    """Refuse, before any work is done, a name that `write_video` would not take.

    Raises:
        InputError: unknown suffix, a name that is too long, a place that cannot be looked at, or a
            folder is in the way.
    """
    path = Path(path)
    temporary = path.name + 24 * "x"  # as long as the name that `replacing` gives
    size = max(len(os.fsencode(name)) for name in (*path.parts, temporary))
    if size > 255:  # limit of Linux and macOS
        raise InputError(f"{path} cannot be written: a name has {size} bytes; give a shorter one")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # parent folders are made; a file in their place is refused then
    except OSError as error:
        raise _cannot_write(path, error) from error
    if path.suffix and path.suffix.lower() not in (*ENCODINGS, *PICTURE_SUFFIXES):
        raise InputError(
            f"{path}: cannot write {path.suffix} videos; use {' '.join(ENCODINGS)}, "
            "or a name without suffix for a folder of PNGs"
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise InputError(f"{path} is a folder{'' if path.suffix else ' that is not empty'}")
    if not path.suffix and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a folder of PNGs cannot take its name")


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all; missing parent folders are made.

    Raises:
        InputError: the place cannot be written.
        Error: the disk is full or failed.
    """
    with _writing(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`replacing`, in a folder that is made, with errors of ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> Error:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return Error(f"{path} was not written: {reason}; files that were there are untouched")
    return InputError(f"{path} cannot be written: {reason}")


def _encode(path: Path, fps: float, pictures: Iterator[av.VideoFrame]) -> int:
    """Write pictures, which get their times here, in the format of `path`; their number."""
    container, muxing, encoder, encoding = ENCODINGS[path.suffix.lower()]
    if encoder not in av.codec.codecs_available:
        raise Error(f"this build of PyAV has no {encoder} encoder; install PyAV's own wheel")
    first = next(pictures)
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()

    def reopened(*_: object) -> io.BytesIO:  # faststart reads again what it moves
        return io.BytesIO(file.getvalue())

    with av.open(file, "w", format=container, options=muxing, io_open=reopened) as output:
        options = {**encoding, **_deterministic()} if encoder == "libx264" else encoding
        stream: Any = output.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width = first.height, first.width
        stream.pix_fmt = first.format.name
        if encoder != "gif":
            # Without tags players guess the matrix from the height, and the colours shift.
            stream.codec_context.colorspace = BT709
            stream.codec_context.color_primaries = BT709
            stream.codec_context.color_trc = BT709
            stream.codec_context.color_range = _LIMITED_RANGE
        # None at the end: the encoder gives what it holds back.
        for index, picture in enumerate(chain([first], pictures, [None])):
            if picture is not None:
                picture.pts, picture.time_base = index, 1 / rate
            try:
                output.mux(stream.encode(picture))
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                raise Error(
                    f"{path} was not written: {encoder} cannot encode frames of "
                    f"{first.width} x {first.height} at {fps:g} a second: {error.strerror or error}"
                ) from error
    write_bytes(path, file.getbuffer())
    return index


@functools.cache
def _deterministic() -> dict[str, str]:
    """Options of x264 by which equal frames give equal bytes.

    With AVX-512 its macroblock tree reads memory that was never written, so it is capped at AVX2;
    `docs/LOG.md` has the trials. Only Linux runs on processors with AVX-512 here.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        if "avx512" in file.read(8192):  # flags of the first processor
            return {"x264-params": "asm=avx2"}
    return {}


def _picture(frame: Frames) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


def _in_palette(frames: Frames) -> Iterator[av.VideoFrame]:
    """Frames in one palette of 256 colours, so that what stands still does not flicker.

    Pillow could write the GIF, but merges equal neighbours and so loses frames.
    """
    graph = av.filter.Graph()
    unit = Fraction(1)  # of time; the palette does not depend on it
    height, width = frames.shape[1:3]
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=unit
    )
    split = graph.add("split")
    make = graph.add("palettegen", "reserve_transparent=0")
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(make, 0, 0)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(frames):
        picture = _picture(frame)
        picture.pts, picture.time_base = index, unit
        graph.push(picture)
    graph.push(None)
    with contextlib.suppress(av.error.EOFError, av.error.BlockingIOError):
        while True:
            filtered = graph.pull()
            assert isinstance(filtered, av.VideoFrame)
            yield filtered
